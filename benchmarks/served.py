"""The server itself: how long a first token takes, and what 1,000 adapters do to it (what it costs over its engine:
server.py).

    python -m benchmarks.served [first] [adapters] [--count 1000] [--threads 2] [--record]

`deltaw serve` runs in a process of its own, on the builtin in float32, and is asked as clients ask it, by streams.

    first     while 15 streams go on, a prompt of 1,000 tokens comes: seconds to its first token, beside those on an
              idle server, and the longest time for which one of the 15 waited for a token, beside their median
    adapters  `--count` of rank 16 on all linear layers in one folder (16 different ones under many names, as links):
              seconds to the first answer beside a folder of 16, memory, and the time of an answer of one token of an
              adapter that isn't on the model yet (a miss) and of one that is (a hit)

To be run on an idle machine, where it takes some three minutes. `--record` notes the figures.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.figures import Measured, note
from benchmarks.serving import BASE, PROMPT, STREAMS, make_adapters

SECTION = "Serving"
LONG = 1000  # tokens of a prompt
NAME = BASE.partition(":")[2]


class Server:
    """`deltaw serve` in its own process, until `close`. `seconds`: from its start to its first answer."""

    def __init__(self, folder: Path | None, threads: int) -> None:
        command = [sys.executable, "-m", "deltaw", "serve", BASE, "--port", "0", "--json"]
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, *(["--adapters", str(folder)] if folder else [])],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )
        assert self.process.stdout is not None
        told = self.process.stdout.readline()
        if not told:
            sys.exit("the server didn't start")
        data = json.loads(told)
        self.base = data["base"]
        host, _, port = data["address"].removeprefix("http://").rpartition(":")
        self.place = host, int(port)
        list(self.ask(self.base, [1, 2, 3], 1))
        self.seconds = time.perf_counter() - began

    def ask(self, model: str, prompt: list[int], new: int) -> Iterator[float]:
        """When each piece of a stream came."""
        connection = http.client.HTTPConnection(*self.place, timeout=600)
        try:
            body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                sys.exit(answer.read().decode())
            for line in answer:
                if line.startswith(b"data: {"):
                    yield time.perf_counter()
        finally:
            connection.close()

    @property
    def memory(self) -> float:
        """GB that it holds, without pages that files could give back."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / 1e9

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def prompts(count: int, length: int = PROMPT) -> list[list[int]]:
    """Random ids, other ones in each call."""
    import torch

    return torch.randint(1000, 40_000, (count, length)).tolist()  # type: ignore[no-any-return]


def first(asked: argparse.Namespace) -> dict[str, tuple[float, str]]:
    """Times of a long prompt's first token, and of the others'."""
    server = Server(None, asked.threads)
    try:
        alone = _first_token(server)
        times: list[list[float]] = [[] for _ in range(STREAMS - 1)]

        def follow(number: int, prompt: list[int]) -> None:
            times[number] += server.ask(server.base, prompt, 400)

        threads = [threading.Thread(target=follow, args=each) for each in enumerate(prompts(STREAMS - 1))]
        for thread in threads:
            thread.start()
        while min(map(len, times)) < 8:
            time.sleep(0.01)
        began = time.perf_counter()
        beside = _first_token(server)
        ended = time.perf_counter()
        waits = [(b - a, b) for one in list(map(list, times)) for a, b in pairwise(one)]
        return {
            f"first token of {LONG:,} tokens, idle server": (alone, "s"),
            f"first token of {LONG:,} tokens beside 15 streams": (beside, "s"),
            "a stream's longest wait for a token meanwhile": (
                max(wait for wait, at in waits if began < at < ended),
                "s",
            ),
            "a stream's median wait before": (statistics.median(wait for wait, at in waits if at < began), "s"),
        }
    finally:
        server.process.kill()
        server.process.wait()


def _first_token(server: Server) -> float:
    began = time.perf_counter()
    return next(server.ask(server.base, prompts(1, LONG)[0], 1)) - began


def adapters(asked: argparse.Namespace) -> dict[str, tuple[float, str]]:
    """Start, memory, misses and hits with a folder of many."""
    with TemporaryDirectory() as folder:
        made, _ = make_adapters(Path(folder), STREAMS)
        few, many = Path(folder) / "few", Path(folder) / "many"
        for root, count in ((few, STREAMS), (many, asked.count)):
            for number in range(count):
                own = root / f"adapter-{number:04}"
                own.mkdir(parents=True)
                for file in made[number % STREAMS].iterdir():
                    os.link(file, own / file.name)
        server = Server(few, asked.threads)
        started = server.seconds
        server.close()
        server = Server(many, asked.threads)
        try:
            before, used = server.memory, min(64, asked.count)
            misses, hits = (
                [_answer(server, f"adapter-{number:04}") for number in range(used)] for _ in ("miss", "hit")
            )
            held = server.memory - before
            print(f"{used} of {asked.count:,} adapters used: {held:.2f} GB more, {before:.2f} GB before", flush=True)
            return {
                f"start with {asked.count:,} adapters over one with {STREAMS}": (server.seconds - started, "s"),
                f"memory with {asked.count:,} adapters of rank 16 registered": (before, "GB"),
                f"memory of an adapter that is used, of {used}": (held / used, "GB"),
                "an answer of one token, adapter not on the model yet": (statistics.median(misses[1:]), "s"),
                "an answer of one token, adapter on the model": (statistics.median(hits), "s"),
            }
        finally:
            server.close()


def _answer(server: Server, name: str) -> float:
    prompt = prompts(1)[0]
    began = time.perf_counter()
    list(server.ask(name, prompt, 1))
    return time.perf_counter() - began


PARTS = {"first": first, "adapters": adapters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--count", type=int, default=1000, help="adapters in the folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/performance.md")
    asked: Any = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    for part in asked.parts:
        for name, (value, unit) in PARTS[part](asked).items():
            print(f"{name}: {value:.3g} {unit}", flush=True)
            if asked.record:
                note(Measured(SECTION, name, value, unit, at_most=True))


if __name__ == "__main__":
    main()
