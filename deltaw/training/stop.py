"""Ctrl-C and SIGTERM: finish the step, save, leave. Twice: leave now; the checkpoints are whole either way."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """Inside the `with` block, `signal` is the number of the first SIGINT or SIGTERM, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


class Stopped(Exception):
    """A run was asked to stop and has saved. `exit_code` is 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number
