"""Ctrl-C and SIGTERM: where something would be lost, finish the step and save; elsewhere leave at once. Twice: at once.

with StopRequest() as stop:
    …                       a signal raises Stopped here, wherever that is
    with stop.held():
        …                   here it waits; a second one raises Stopped
        stop.check()        raises Stopped for the one that waited
        with stop.released():
            …               nothing would be lost here: it raises Stopped, also the one that waited
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Stopped(BaseException):
    """A run was asked to stop. `exit_code` is 130 for Ctrl-C, 143 for SIGTERM; the message says how to go on.

    No Exception: like KeyboardInterrupt it must get through a library's `except Exception`.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """Turns SIGINT and SIGTERM into `Stopped` inside its block. `advice`: what to do next, for the message."""

    def __init__(self, advice: str = "nothing was trained yet") -> None:
        self.advice = advice
        self.signal: int | None = None  # the last one that came
        self._held = False
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

    @contextmanager
    def held(self) -> Iterator[None]:
        """A first signal waits beyond the block, until `check`."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def released(self) -> Iterator[None]:
        """Inside a held block, a stretch that can be cut off."""
        before, self._held = self._held, False
        try:
            self.check()
            yield
        finally:
            self._held = before

    def check(self, done: str = "stopped") -> None:
        """Raise Stopped where a signal came while it was held. `done`: what was."""
        if self.signal is not None:
            raise Stopped(self.signal, f"{done}; {self.advice}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if again or not self._held:
            self.check("stopped at once" if again else "stopped")
