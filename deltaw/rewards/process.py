"""A scorer in a process of its own: code of the user's, a pattern, a package's scorers (rewards/worker.py).

    what it is for       code that may hang, crash, take all memory or write to stdout must not take the run with it
    one process          per reward, for the whole run: a file that loads a model loads it once
    one message          for all answers of a step, an answer for each row as soon as it is there
    deadline             of each row, by the clock; memory is bounded beyond what the file took when it was loaded

The pipe, its deadlines and its end are those of files/bounded.py. What was late or died is started again by the next
question; whether that is an error is for whoever asks.

Rejected: a process for each answer (a Python that imports NumPy takes as long as a step's answers); a thread with a
deadline (nothing stops a thread); `multiprocessing` (its pipes carry pickles).
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.errors import InputError
from deltaw.files.bounded import Failed, Worker, line
from deltaw.rewards.scored import Asked, Value, failed

LOADING = 600.0  # seconds: a file may load a model
START = "import sys; sys.path.insert(0, sys.argv[1]); from deltaw.rewards.worker import main; main()"


class Process:
    """`spec`: what the worker is to open; `named`: what that is, for errors."""

    def __init__(self, spec: Mapping[str, Any], named: str, seconds: float) -> None:
        self._spec, self._seconds = spec, seconds
        own = spec.get("file")  # of the user's, which may end the process that loads it
        fix = f"try: {shlex.join([sys.executable, own] if own else [sys.executable, '-c', 'import deltaw'])}"
        self._worker = Worker(self._start, f"the process for {named}", fix, start_limit=LOADING)

    def open(self) -> None:
        """Start it. Raises InputError with the worker's own words where it can't open what it is for."""
        with self._worker.asking(b"", LOADING) as worker:
            self._check(worker)

    def answers(self, questions: Sequence[Any]) -> Iterator[Any]:
        """An answer to each. Raises Failed in place of one that doesn't come: the others are to be asked again."""
        message = b"".join(line(one, str) for one in (len(questions), *questions))
        with self._worker.asking(message, self._seconds) as worker:
            self._check(worker)
            for _ in questions:
                yield worker.answer()

    def scored(
        self,
        asked: Sequence[Asked],
        questions: Sequence[Any],
        valued: Callable[[dict[str, Any], Asked], Value],
        explained: Callable[[Failed], tuple[str, str]],
    ) -> list[Value]:
        """What each answer is worth, by `valued`. Raises RunError that names the row whose value doesn't come, with
        what is wrong and what to do as `explained` has it."""
        values: list[Value] = []
        try:
            for answer in self.answers(questions):
                values.append(valued(answer, asked[len(values)]))
        except Failed as error:
            raise failed(asked[len(values)], *explained(error)) from None
        return values

    def close(self) -> None:
        self._worker.stop()

    def _check(self, worker: Worker) -> None:
        if (refusal := worker.ready).get("error"):
            raise InputError(refusal["error"], fix=refusal.get("fix"))

    def _start(self) -> "subprocess.Popen[bytes]":
        own = self._spec["kind"] == "function"  # whose warnings are its writer's; those of a package are nobody's
        process = subprocess.Popen(
            [sys.executable, "-P", *([] if own else ["-W", "ignore"]), "-c", START, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={"PYTHONHASHSEED": "0", **os.environ},  # else what hangs on the order of a set isn't repeated
            start_new_session=True,  # Ctrl-C is for us
        )
        assert process.stdin is not None
        rest = memoryview(line({**self._spec, "parent": os.getpid()}))
        while rest:
            rest = rest[process.stdin.write(rest) :]
        return process
