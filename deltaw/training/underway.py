"""A run between its steps: what is due after each of them, and what is kept of it.

    note        a step's record, into metrics.jsonl
    due         an evaluation on held-out rows, samples, a checkpoint: in this order, so that the best step has one
    tell        the caller's `on_step`

If any of these raises, no step is lost: the run is saved first. Steps are taken elsewhere: one run's in run.py, those
of several runs on one base in sweep/joint.py, which is why what is measured here is measured with this run's adapter
`leading`, whoever else is on the model.
"""

import math
from collections.abc import Callable
from typing import Any

from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training.checkpoint import save_checkpoint
from deltaw.training.learner import Learner
from deltaw.training.log import EventLog
from deltaw.training.measuring import Attempts, held_out_words, loss_on_the_way, note_evaluation, record_of, samples
from deltaw.training.opening import Opened
from deltaw.training.stop import Stopped, StopRequest
from deltaw.training.together import check_adapter
from deltaw.training.world import ALONE

OnStep = Callable[[dict[str, Any]], object]


class Underway:
    """Without a `log` nothing is written but checkpoints: this process isn't the one that does."""

    def __init__(
        self,
        opened: Opened,
        learner: Learner,
        run: Run,
        stop: StopRequest,
        display: Display,
        attempts: Attempts,
        log: EventLog | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.opened, self.learner, self.run = opened, learner, run
        self.stop, self.display, self.attempts = stop, display, attempts
        self._log, self._on_step, self._figures = log, on_step, dict[str, Any]()
        self._saved_step, self._world = learner.state.step, opened.world
        self._sharing = ALONE if opened.shards else opened.world  # evaluations; a pass of shards takes all, abreast

    @property
    def is_over(self) -> bool:
        """Whether no step is left to take."""
        return self.learner.state.step >= self.opened.total or self.learner.out_of_patience

    @property
    def in_short(self) -> str:
        """The last step, for whoever watches."""
        known = next((name for name in ("loss", "reward") if name in self._figures), None)
        words = "skipped" if known is None or "skipped" in self._figures else f"{known} {self._figures[known]:.3f}"
        return f"{words}  {self.learner.state.tokens_per_second:.0f} tokens/s"

    def begin(self) -> None:
        """Before the first step of this process: what the adapter that it starts from has on these held-out rows (what
        there is to improve upon), and the evaluation that a stop cut off."""
        rows, start = self.opened.dataset.eval, self.opened.lineage.started_from
        if not self.learner.state.step and rows and start:
            with self.opened.attached.leading():
                loss, figures = loss_on_the_way(self.opened, self._sharing)
            self.display.say(f"{held_out_words(loss, figures)} at the start, from {start.name}")
            if math.isfinite(loss):
                self._write(record_of(0, loss, figures, self.learner.objective))
        self.do_what_is_due()

    def note(self, record: dict[str, Any]) -> None:
        """A step was taken."""
        self._figures = {}
        self._write(record)

    def do_what_is_due(self) -> None:
        """Do what comes after a step. If it raises, no step is lost."""
        every, state, total = self.opened.config.train, self.learner.state, self.opened.total
        if not state.step:
            return
        try:
            due = every.eval_every and (state.step % every.eval_every == 0 or state.step == total)
            if due and self.opened.dataset.eval and state.evaluated < state.step:
                loss, figures = self.held_out()
                with self.stop.held():
                    self._write(note_evaluation(loss, figures, self.learner, self.run, self.display))
            if every.sample_every and state.step % every.sample_every == 0 and self._saved_step < state.step:
                self._samples(f"step {state.step}: no samples")
        except Exception:
            self.save()
            raise
        if due:
            self.agree()
        if state.step % every.save_every == 0 or state.step in (total, state.best_step):
            self.save(joint=True)

    def held_out(self) -> tuple[float, dict[str, float]]:
        """The loss of the adapter as it stands, finite or not, and what its objective says beside it."""
        with self.opened.attached.leading():
            return loss_on_the_way(self.opened, self._sharing)

    def agree(self) -> None:
        """Stop here where one of several processes was asked to."""
        if not self._world.is_alone:
            self.stop.agree(int(self._world.most(self.stop.signal or 0, "the end of the step")))

    def tell(self) -> None:
        """Call `on_step` with the step's figures. What it raises is the caller's own, with a note."""
        try:
            if self._on_step is not None:
                self._on_step(self._figures)
        except Stopped:  # a signal that came meanwhile
            raise
        except BaseException as error:
            self.save()
            error.add_note(f"on_step raised this; step {self.learner.state.step} is saved; {self.stop.advice}")
            raise

    def save(self, *, joint: bool = False) -> None:
        """Write a checkpoint of this step, unless there is one (the run was then resumed from it). `joint`: all
        processes are here, and none of them on its way out."""
        if self._saved_step == self.learner.state.step:
            return
        if joint:
            check_adapter(self.learner, self._world)
        if not self._world.is_first:
            self._saved_step = self.learner.state.step
            return
        with self.stop.held():
            self.run.sync_metrics()
            save_checkpoint(self.run.checkpoints, self.learner.saved(), self.opened.config.train.keep)
            self._saved_step = self.learner.state.step

    def _samples(self, what: str) -> None:
        """Answers to held-out rows, by rank 0."""
        if self._world.is_first:
            with self.opened.shards.leads():
                self.attempts("samples", self._sample, what=what)
        else:
            self.opened.shards.follow()
        self._world.barrier("the samples")

    def _sample(self) -> None:
        with self.opened.attached.leading():
            lines = samples(self.opened.model, self.opened.dataset.eval, self.opened.answering)
        for line in lines:
            self.display.say(f"step {self.learner.state.step}: {line}")

    def _write(self, record: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(record)
        self._figures |= record
        self.learner.state.metrics_lines += 1
