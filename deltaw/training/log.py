"""Where a run's figures go besides the screen: metrics.jsonl, and the programs that `train.log_to` names.

metrics.jsonl is the run's own: where it can't be written, the run stops. The others only look on. One that isn't
installed, or doesn't start, is an error before anything is trained; one that fails later is left out, with a line that
says so, and the run goes on. Each has its home file, which imports it when it is opened.

A run that resumes writes the steps after its checkpoint again; how each of them takes that is said in its file.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from deltaw.config import RunConfig
from deltaw.errors import InputError, RunError, with_kind
from deltaw.run import Run
from deltaw.training.to_tensorboard import TensorBoard
from deltaw.training.to_wandb import WeightsAndBiases


class Logger(Protocol):
    """A program that shows a run's figures."""

    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self, finished: bool) -> None:
        """`finished`: whether all steps were taken."""


LOGGERS: dict[str, Callable[[Run, RunConfig, int], Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_loggers(names: Sequence[str]) -> None:
    """Raise InputError for one that isn't installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        fix = f"pip install {' '.join(missing)}, or leave it out"
        raise InputError(f"train.log_to: {' and '.join(missing)} isn't installed", fix=fix)


def open_log(run: Run, config: RunConfig, step: int, say: Callable[[str], None]) -> "EventLog":
    """The log of a run that has taken `step` steps. Raises RunError where a program doesn't start that it wants to log
    to."""
    log = EventLog(run, say)
    for name in config.train.log_to:
        try:
            log.loggers[name] = LOGGERS[name](run, config, step)
        except Exception as error:  # whatever a foreign program makes of this machine
            log.close(finished=False)
            what = f"train.log_to: {name} doesn't start: {with_kind(error)}"
            raise RunError(what, fix="mend that, or leave it out of train.log_to") from None
    return log


class EventLog:
    """`write` appends one record to metrics.jsonl and hands its numbers on; a block, at whose end all are closed."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self.run, self._say = run, say
        self.loggers: dict[str, Logger] = {}

    def write(self, record: dict[str, Any]) -> None:
        """`record` has `step` and numbers by name."""
        self.run.append_metrics(record)
        figures = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
        for name in list(self.loggers):
            self._try(name, lambda logger: logger.write(record["step"], figures))

    def close(self, *, finished: bool) -> None:
        for name in list(self.loggers):
            self._try(name, lambda logger: logger.close(finished))
        self.loggers = {}

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(finished=error is None)

    def _try(self, name: str, work: Callable[[Logger], None]) -> None:
        try:
            work(self.loggers[name])
        except Exception as error:  # it only looks on
            del self.loggers[name]
            self._say(f"warning: {name} failed: {with_kind(error)}; the run goes on, and metrics.jsonl has its figures")
