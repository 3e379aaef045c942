"""`make torture`: every fault, every try, on two workers; prints `fault n: passed/tries`, writes docs/reliability.md.

    python -m tests.faults [--only 5,7 [--record]] [--try N] [--sample] [--jobs 2]

The page is written by a run of the whole list; `--record` puts the rows of a part of it into the page that is there.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from tests.faults.fault import SEEN, Fault, Outcome, load_faults, run_tries
from tests.faults.report import update_page, write_page

CHUNK_LIMIT = 900.0  # seconds that a worker may take for one chunk before it is killed
ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--only", default="", help="numbers of faults, comma-separated")
    parser.add_argument("--try", type=int, dest="number", help="this try alone, in this process")
    parser.add_argument("--sample", action="store_true", help="as many tries as `make test` makes")
    parser.add_argument("--record", action="store_true", help="put the figures of --only into the page")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    wanted = {int(number) for number in given.only.split(",") if number}
    faults = [known for known in load_faults(peers=not given.sample) if not wanted or known.number in wanted]
    if given.number is not None:
        for known in faults:
            print(f"fault {known.number}: {run_tries(known, range(given.number, given.number + 1))}")
        return 0
    peers = [n for n, seen in enumerate(SEEN) if not wanted or seen.number in wanted]
    began = time.monotonic()
    outcomes, said = run_in_workers(faults, peers, given.sample, given.jobs)
    seconds = time.monotonic() - began
    missed = [known for known in faults if outcomes[known.name].passed < _tries(known, given.sample)]
    print(f"{len(faults) - len(missed)} of {len(faults)} at their figure in {seconds / 60:.1f} minutes")
    if not wanted and not given.sample:
        print(f"written: {write_page(faults, outcomes, said, seconds)}")
    elif given.record and not given.sample:
        print(f"written: {update_page(faults, outcomes, said)}")
    return 1 if missed else 0


@dataclass
class _Board:
    """What is known so far, printed as each fault's last chunk comes in."""

    left: dict[str, int]
    sample: bool
    outcomes: dict[str, Outcome] = field(default_factory=lambda: defaultdict(Outcome))
    said: dict[int, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, known: Fault, part: Outcome) -> None:
        with self.lock:
            whole = self.outcomes[known.name]
            whole.passed += part.passed
            whole.failures += part.failures
            whole.seconds += part.seconds
            self.left[known.name] -= 1
            if self.left[known.name] == 0:
                tries = _tries(known, self.sample)
                print(
                    f"fault {known.number}: {whole.passed}/{tries}  {known.title} ({whole.seconds:.0f} s)", flush=True
                )
                for line in whole.failures[:5]:
                    print(f"    {line[:300]}", flush=True)


def _tries(known: Fault, sample: bool) -> int:
    return known.sample if sample else known.tries


def run_in_workers(
    faults: list[Fault], peers: list[int], sample: bool, jobs: int
) -> tuple[dict[str, Outcome], dict[int, str]]:
    """What came of the tries of each fault, by its name, and what each peer said; in the order given."""
    queue: Queue[tuple[dict[str, Any], Fault | None]] = Queue()
    left: dict[str, int] = {}
    for known in faults:
        tries = _tries(known, sample)
        starts = range(0, tries, known.at_once)
        left[known.name] = len(starts)
        for start in starts:
            queue.put(({"fault": known.name, "from": start, "to": min(tries, start + known.at_once)}, known))
    for number in peers:
        queue.put(({"peer": number}, None))
    board = _Board(left, sample)
    threads = [threading.Thread(target=_serve, args=(queue, board), daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return board.outcomes, board.said


def _serve(queue: "Queue[tuple[dict[str, Any], Fault | None]]", board: _Board) -> None:
    """Feed one worker until the queue is empty; a worker that dies is replaced."""
    worker: subprocess.Popen[str] | None = None
    while True:
        try:
            asked, known = queue.get_nowait()
        except Empty:
            break
        worker = worker if worker is not None and worker.poll() is None else _start()
        answer = _ask(worker, asked)
        if known is None:
            board.said[asked["peer"]] = answer["said"] if answer else "the process died of it"
        elif answer is None:
            reason = f"tries {asked['from']} to {asked['to'] - 1}: the process died (exit {worker.wait()})"
            board.take(known, Outcome(0, [reason]))
        else:
            board.take(known, Outcome(**answer))
    if worker is not None and worker.stdin is not None:
        worker.stdin.close()
        worker.wait()


def _start() -> "subprocess.Popen[str]":
    from tests.faults.shim import environment

    command = [sys.executable, "-m", "tests.faults.worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    quiet = None if os.environ.get("FAULTS_DEBUG") else subprocess.DEVNULL
    return subprocess.Popen(command, text=True, cwd=ROOT, env=environment(), stderr=quiet, **pipes)


def _ask(worker: "subprocess.Popen[str]", asked: dict[str, Any]) -> dict[str, Any] | None:
    """The worker's answer, or None where it died or was too slow."""
    assert worker.stdin is not None and worker.stdout is not None
    timer = threading.Timer(CHUNK_LIMIT, worker.kill)
    timer.start()
    try:
        worker.stdin.write(json.dumps(asked) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        timer.cancel()
    return json.loads(line) if line else None


if __name__ == "__main__":
    sys.exit(main())
