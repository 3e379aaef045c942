"""Ctrl-C and SIGTERM: where something would be lost, finish it first; elsewhere leave at once. Twice: at once.

with StopRequest() as stop:
    …                       a signal raises Stopped here, wherever that is
    with stop.held():
        …                   here it waits for the end of the block; a second one doesn't, and says `at_once`
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Stopped(BaseException):
    """A run was asked to stop. `exit_code` is 130 for Ctrl-C, 143 for SIGTERM; the message says how to go on.

    Not an Exception: like KeyboardInterrupt, it must get through a library's `except Exception`.
    """

    def __init__(self, number: int, message: str, at_once: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.at_once = 128 + number, at_once


class StopRequest:
    """Turns SIGINT and SIGTERM into `Stopped` inside its block. `advice`: what to do next, for the message."""

    def __init__(self, advice: str = "nothing has been trained yet") -> None:
        self.advice = advice
        self.signal: int | None = None  # the last one that came
        self._holding = self._raised = False
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
        asked, self._holding = self.signal, True
        try:
            yield
        finally:
            self._holding = False
        if self.signal != asked:
            self.check()

    def check(self, done: str = "stopped") -> None:
        """Raise Stopped where a signal has come. `done`: what was."""
        if self.signal is not None:
            raise Stopped(self.signal, f"{done}; {self.advice}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        self._raised = again or not self._holding
        if again:
            raise Stopped(number, f"stopped at once; {self.advice}", at_once=True)
        if not self._holding:
            self.check()
