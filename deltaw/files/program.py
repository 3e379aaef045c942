"""A program that a model wrote, run in a process of its own: did it come to its end?

The process (`program_worker.py`) is like the one for templates (`bounded.py`), and stricter, since this is any Python:
one process for each program, so that none finds what another left; no system call but those that computing needs. It is
killed when it takes longer than `SECONDS`, or writes more than `MAX_OUTPUT`.

A program that ends itself hasn't come to its end. So it is the worker that says so, by a word that is another each
time. That is no wall against a program that looks for the word in its caller's frames, which none does by accident.

Rejected: a container (not everywhere, and root's), `multiprocessing` (the child has all that we have), checking the
program's text for what it may not do (there is always another way to say it).
"""

import os
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from deltaw.errors import RunError
from deltaw.files.bounded import MEMORY, START_LIMIT, line, shut_in

SECONDS = 10.0
MAX_OUTPUT = 65_536  # bytes
LONGEST = 1_000_000  # characters of a program
READY, REFUSED = b"R", b"X"
START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from deltaw.files.program_worker import main; main(int(sys.argv[2]))"
)


@dataclass(frozen=True)
class Outcome:
    """Whether a program came to its end, and if not, why."""

    passed: bool
    why: str = ""


def run_program(program: str, seconds: float = SECONDS) -> Outcome:
    """Raises RunError where this machine can't run one safely."""
    if len(program) > LONGEST:
        return Outcome(False, f"it has more than {LONGEST:,} characters")
    word = os.urandom(16).hex().encode()
    process = _started()
    assert process.stdin is not None and process.stdout is not None
    try:
        first = _read(process, START_LIMIT, 1)
        if first != READY:
            reason = (_read(process, 1.0) or b"").decode("utf-8", "replace") or "the process doesn't start"
            raise RunError(
                f"programs can't be run safely on this machine: {reason}",
                fix="leave pass_at_1 out, or use a newer Linux",
            )
        try:
            process.stdin.write(line({"word": word.decode(), "program": program}))
            process.stdin.close()
        except BrokenPipeError:
            return Outcome(False, "it crashed")
        output = _read(process, seconds)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    if output is None:
        return Outcome(False, f"it takes more than {seconds:g} s")
    if output.endswith(word):
        return Outcome(True)
    if len(output) == MAX_OUTPUT:
        return Outcome(False, "it writes too much")
    _, told, why = output.rpartition(b"\0")
    return Outcome(False, why.decode("utf-8", "replace")[:300] if told else "it ended itself, or crashed")


def _started() -> "subprocess.Popen[bytes]":
    root = str(Path(__file__).parents[2])
    try:
        return shut_in("-c", START, root, str(MEMORY))
    except OSError as error:
        raise RunError(f"the process for programs can't be started: {error}") from None


def _read(process: "subprocess.Popen[bytes]", seconds: float, most: int = MAX_OUTPUT) -> bytes | None:
    """What it writes until it ends or has written `most`; None where it takes longer than `seconds`."""
    assert process.stdout is not None
    pipe, output, until = process.stdout.fileno(), b"", time.monotonic() + seconds
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while len(output) < most:
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            return None
        part = os.read(pipe, most - len(output))
        if not part:
            break
        output += part
    return output
