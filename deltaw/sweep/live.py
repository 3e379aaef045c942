"""The runs of a sweep, opened on one base: what all share is opened once, what is each one's own is as in any run.

    once       base, tokenizer, rows of one `data` section, general text, the base's figures on held-out rows, and the
               rehearsal of the largest batch, of runs that have the same rows
    each       an adapter with a number of its own on the model, optimiser, state, log, run folder, checkpoints

A line that several of them would say in opening is said once.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from deltaw.adapter.attach import discard
from deltaw.base.source import Source
from deltaw.config import DataConfig, RunConfig
from deltaw.config.places import placed
from deltaw.data.dataset import Dataset
from deltaw.data.examples import Examples, fingerprint
from deltaw.data.loader import Ahead
from deltaw.data.opening import open_dataset
from deltaw.data.render import Renderer
from deltaw.errors import InputError, RunError
from deltaw.evaluation.held_out import Evaluation
from deltaw.evaluation.own_metric import Consent
from deltaw.files.output import gib
from deltaw.run import Run
from deltaw.show.progress import Display, Within
from deltaw.show.text import counted
from deltaw.sweep.grid import Variant
from deltaw.training.batch_size import sized
from deltaw.training.changes import restore, settled
from deltaw.training.checkpoint import Saved, latest_checkpoint, list_checkpoints
from deltaw.training.finish import finish, report
from deltaw.training.learner import Learner
from deltaw.training.log import EventLog, open_log
from deltaw.training.measuring import Attempts, measure_base
from deltaw.training.memory import free_memory
from deltaw.training.opening import Ground, Looked, Opened, begin, general_rows, look, opened_beside, opened_on
from deltaw.training.preflight import disk_needed, free_disk, short_form
from deltaw.training.recomputing import choose
from deltaw.training.preflight import work_of
from deltaw.training.stop import StopRequest
from deltaw.training.underway import Underway

ROOM = 0.9  # of the free memory, for what all adapters will take
HELD_PER_BYTE = 3  # of a factor: its gradient and two moments


@dataclass(frozen=True)
class Waiting:
    """A run that is about to be opened. `config`: with names that lead from here; `written`: with its own."""

    variant: Variant
    run: Run
    config: RunConfig
    written: RunConfig
    saved: Saved | None


class Live:
    """A run that is being trained beside others."""

    def __init__(
        self, waiting: Waiting, opened: Opened, general: Examples, stop: StopRequest, display: Display, began: float
    ) -> None:
        self.variant, self.run, self.opened, self.general = waiting.variant, waiting.run, opened, general
        self.display, self.stop, self._began = display, stop, began
        self.learner: Learner = opened.learner(display)
        self.before: Evaluation | None = None
        self._stack = ExitStack()
        self.attempts = Attempts(opened.device, display.say, lambda error: None)

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def share(self) -> float:
        """How much of its steps it has taken."""
        return self.learner.state.step / self.opened.total

    def open_log(self) -> None:
        """From here on its steps are written down, and its rows are fetched."""
        log: EventLog = self._stack.enter_context(
            open_log(self.run, self.opened.config, self.learner.state.step, self.display.say)
        )
        on_the_way = Attempts(self.opened.device, self.display.say, lambda error: None)
        self.underway = Underway(self.opened, self.learner, self.run, self.stop, self.display, on_the_way, log)
        self.steps = iter(Ahead(self.opened.loader(self.learner.state)))

    def finish(self, waited: float | None) -> None:
        """After its last step: the adapter is saved and measured, and leaves the model."""
        self.underway.save()
        self._stack.close()
        with self.opened.attached.leading():
            finish(
                self.opened,
                self.learner,
                self.run,
                self.before,
                self.general,
                self.attempts,
                self.display,
                self._began,
                waited,
            )
        self.leave()

    def report(self) -> None:
        """Its page. The adapter needn't be on the model any more."""
        report(self.run, self.attempts, self.display, wanted=self.opened.config.evaluate.report)

    def leave(self) -> None:
        """Off the model, its log closed, its memory free."""
        self._stack.close()
        self.learner.optimizer.zero_grad()
        self.learner.optimizer.state.clear()
        discard(self.opened.attached)


def waiting_for(variant: Variant, run: Run, display: Display) -> Waiting:
    """A run as it lies in its folder, or as it was asked for where it hasn't begun. Raises InputError."""
    if not run.config.is_file():
        return Waiting(variant, run, variant.config, variant.config, None)
    saved = latest_checkpoint(run.checkpoints, display)
    config, _ = settled(run, saved, [], allow=False, finished=False, display=display)
    return Waiting(variant, run, placed(config, run.folder), config, saved)


class Rows:
    """Opens the rows of each `data` section once."""

    def __init__(self) -> None:
        self._opened: dict[DataConfig, tuple[Source, Renderer, Dataset]] = {}

    def __call__(self, config: RunConfig, display: Display, source: Source) -> tuple[Source, Renderer, Dataset]:
        key = config.data
        known = next((opened for data, opened in self._opened_pairs() if data == key), None)
        if known is None:
            known = open_dataset(config, display, source)
            self._pairs.append((key, known))
        return known
