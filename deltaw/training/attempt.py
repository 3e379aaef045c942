"""Measuring is tried: what a run has earned can't be lost to what is only looked at.

Everything that is measured once there is something to lose (answers beside the base's loss, samples on the way, the
adapter at the end, the page) goes through `Attempts`. What raises there is said in a line and noted by name, for
result.json's `failed`. A signal is no Exception and gets through: then the run stops, and goes on where it was.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from deltaw.errors import DeltawError
from deltaw.training.memory import release
from deltaw.training.preflight import evaluation_in, explain

if TYPE_CHECKING:
    from deltaw.training.trainer import Trainer

Result = TypeVar("Result")


class Attempts:
    """`failed`: why, by the name of what was tried."""

    def __init__(self, trainer: "Trainer") -> None:
        self.failed: dict[str, str] = {}
        self._trainer = trainer

    def __call__(self, name: str, work: Callable[[], Result], *, what: str) -> Result | None:
        """What `work` returns, or None where it raised. `what`: who lacks it then, for people."""
        release(self._trainer.model.base.device)
        self.failed.pop(name, None)
        try:
            return work()
        except Exception as error:
            self.note(name, error, what=what)
            return None

    def note(self, name: str, error: Exception, *, what: str) -> None:
        """`error` is why something couldn't be had."""
        reason = self._reason(error)
        self.failed[name] = reason.splitlines()[0]
        self._trainer.display.say(f"warning: {what}: {reason}")

    def _reason(self, error: Exception) -> str:
        explained = explain(error, self._trainer) if evaluation_in(error) else None
        if isinstance(error := explained or error, DeltawError):
            return error.what
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
