"""Ctrl-C and SIGTERM: where something would be lost, finish it first; elsewhere leave at once. Twice: at once.

with StopRequest() as stop:
    …                       a signal raises Stopped here, wherever that is
    with stop.held():
        …                   here it waits for the end of the block; a second one doesn't, and says `at_once`
        with stop.held():
            …               a block inside is part of it

Where several processes train together, none may leave alone: the steps are one such block, and after each of them the
processes agree on whether one was asked to stop (`agree`). torchrun hands on a Ctrl-C that its terminal has sent to
them already, so a second signal so soon after the first isn't a second wish.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from deltaw.errors import RunError

RELAY = 2.0  # seconds


class Lost(RunError):
    """Another process of the run failed, is gone or doesn't answer (world.py)."""


class Stopped(BaseException):
    """A run was asked to stop. `exit_code` is 130 for Ctrl-C, 143 for SIGTERM; the message says how to go on.

    Not an Exception: like KeyboardInterrupt, it must get through a library's `except Exception`.
    """

    def __init__(self, number: int, message: str, at_once: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.at_once = 128 + number, at_once


class StopRequest:
    """Turns SIGINT and SIGTERM into `Stopped` inside its block. `advice`: what to do next, for the message; `relayed`:
    whether a signal may come twice that was sent once."""

    def __init__(self, advice: str = "nothing has been trained yet", *, relayed: bool = False) -> None:
        self.advice, self._relayed, self._came = advice, relayed, 0.0
        self.signal: int | None = None  # the last one that came
        self._holding, self._raised = 0, False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread (a notebook's worker): then nobody can signal us anyway
                break
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._raised and isinstance(error, Exception):
            # A library that calls back into Python may wrap what is raised there, whatever it is (pydantic's does).
            assert self.signal is not None
            raise Stopped(self.signal, f"stopped; {self.advice}") from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """A first signal that comes inside raises Stopped at the block's end, unless an error ends it."""
        asked = self.signal
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
        if self.signal != asked and not self._holding:
            self.check()

    def check(self, done: str = "stopped") -> None:
        """Raise Stopped where a signal has come. `done`: what was."""
        if self.signal is not None:
            raise Stopped(self.signal, f"{done}; {self.advice}")

    def agree(self, number: int) -> None:
        """Raise Stopped where `number`, the signal that any of the processes was sent, isn't 0."""
        if number:
            self.signal, self._came = number, time.monotonic()
            self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._relayed and self.signal == number and now - self._came < RELAY:
            return
        again, self.signal, self._came = self.signal is not None, number, now
        self._raised = again or not self._holding
        if again:
            raise Stopped(number, f"stopped at once; {self.advice}", at_once=True)
        if not self._holding:
            self.check()
