"""Ctrl-C and SIGTERM, for every verb.

Ctrl-C stays Python's KeyboardInterrupt (a chat answers it by cutting an answer short), SIGTERM raises `Stopped` at the
same places; a run has rules of its own inside (training/stop.py). Which of them came is kept: a library that calls back
into Python, or that guards its imports, may turn what is raised inside it into an error of its own.
"""

import signal
from types import FrameType

from deltaw.training.stop import Stopped


class Signals:
    """Inside the block the first signal is kept as `exit_code`, None where none came. Once `leaving` is set all is said
    and another signal does nothing: it would turn the last line into a traceback."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.leaving = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if before is signal.SIG_IGN:  # as of a job in the background: its shell wants it so
                continue
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.leaving:
            return
        self.exit_code = self.exit_code or 128 + number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(number, "stopped")
