"""The runs of a sweep, opened on one base: what all share is opened once, what is each one's own is as in any run.

    once       base, tokenizer, rows of one `data` section, general text, the base's figures on held-out rows, and the
               rehearsal of the largest batch, of runs that have the same rows
    each       an adapter with a number of its own on the model, optimiser, state, log, run folder, checkpoints

A line that several of them would say in opening is said once.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from deltaw.adapter.attach import discard
from deltaw.adapter.history import NOTHING
from deltaw.base.forward import Forward
from deltaw.base.source import Source
from deltaw.config import RunConfig
from deltaw.config.places import placed
from deltaw.data.dataset import Dataset
from deltaw.data.examples import Examples, fingerprint
from deltaw.data.loader import Ahead
from deltaw.data.opening import open_dataset
from deltaw.data.render import Renderer
from deltaw.errors import RunError
from deltaw.evaluation.held_out import Evaluation
from deltaw.evaluation.own_metric import Consent
from deltaw.files.output import gib
from deltaw.run import Run
from deltaw.show.progress import Display, Once, Within
from deltaw.show.text import counted
from deltaw.sweep.grid import Variant
from deltaw.training.batch_size import sized
from deltaw.training.changes import restore, settled
from deltaw.training.checkpoint import Saved, latest_checkpoint, list_checkpoints
from deltaw.training.finish import finish, report
from deltaw.training.frozen_layers import above_the_frozen
from deltaw.training.learner import Learner
from deltaw.training.log import EventLog, open_log
from deltaw.training.looking import Ground, Terms, look
from deltaw.training.measuring import Attempts, measure_base
from deltaw.training.memory import free_memory
from deltaw.training.opening import Opened, begin, general_rows, opened_beside, opened_on
from deltaw.training.preflight import disk_needed, free_disk, short_form, work_of
from deltaw.training.recomputing import choose
from deltaw.training.references import Asked, with_references
from deltaw.training.retain import KEPT, Kept
from deltaw.training.stop import StopRequest
from deltaw.training.underway import Underway

HEAD = ("run", "step", "last step", "best held-out loss")
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
    is_new: bool = False


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

    def is_before(self, share: float) -> bool:
        """Whether it has steps to take up to this share of them."""
        return self.learner.state.step < round(share * self.opened.total)

    @property
    def cells(self) -> list[str]:
        """For the table that shows how it goes: `HEAD`."""
        state = self.learner.state
        best = "" if state.best_loss is None else f"{state.best_loss:.4f}"
        return [self.name, f"{state.step} of {self.opened.total}", self.underway.in_short, best]

    def open_log(self) -> None:
        """From here on its steps are written down."""
        log: EventLog = self._stack.enter_context(
            open_log(self.run, self.opened.config, self.learner.state.step, self.display.say)
        )
        on_the_way = Attempts(self.opened.device, self.display.say, lambda error: None)
        self.underway = Underway(self.opened, self.learner, self.run, self.stop, self.display, on_the_way, log)

    def start(self, forward: Forward, kept: Kept | None) -> None:
        """Its steps, which `forward` takes, are fetched. `kept`: where what the base says of its general text is."""
        state = self.learner.state
        items, self.retain = self.opened.loader(state), self.opened.retain(forward, kept)
        self.steps = Ahead(items if self.retain is None else self.retain.beside(items, state.step))

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


def waiting_for(variant: Variant, run: Run, display: Display, *, fresh: bool) -> Waiting:
    """A run as it lies in its folder, or as it was asked for where it hasn't begun, or is to begin anew (`fresh`).
    Raises InputError."""
    if fresh or not run.config.is_file():
        return Waiting(variant, run, variant.config, variant.config, None, is_new=True)
    saved = latest_checkpoint(run.checkpoints, display)
    config, _ = settled(run, saved, [], allow=False, finished=False, display=display)
    return Waiting(variant, run, placed(config, run.folder), config, saved)


def open_all(
    waiting: Sequence[Waiting], stop: StopRequest, display: Display, consents: Sequence[Consent], began: float
) -> list[Live]:
    """Raises InputError, before weights are read where that is possible: a run that can't be opened, or that can't be
    trained beside the others."""
    once, rows = Once(display), Rows()
    ground = Ground.of(waiting[0].config, display)
    looked = []
    for one, consent in zip(waiting, consents, strict=True):
        needed, lineage = one.saved is None, NOTHING if one.is_new else one.run.read_lineage()
        looked.append(look(one.config, once, Terms(consent, lineage, needed), ground=ground, rows=rows))
    live, texts = list[Live](), dict[str, Examples]()
    for one, known in zip(waiting, looked, strict=True):
        opened = sized(
            opened_beside(known, [other.opened for other in live], once) if live else opened_on(known, once), once
        )
        if one.config is not one.written:
            opened = opened.named_as(one.written)
        retain = one.config.train.retain  # which general text mustn't be a part of
        source = f"{one.config.evaluate.general} {opened.model.renderer.template_fingerprint} {retain and retain.data}"
        if source not in texts:
            texts[source] = general_rows(one.config, opened.model, opened.retained)
        live.append(Live(one, opened, texts[source], stop, Within(display, one.variant.name), began))
    check_memory(live)
    return live


def begin_all(live: Sequence[Live], waiting: Sequence[Waiting]) -> None:
    """Each run as it begins, or as its checkpoint has it."""
    for one, wait in zip(live, waiting, strict=True):
        with one.opened.attached.leading():
            if wait.saved is None:
                begin(one.opened, one.run, one.display)
            else:
                restore(one.learner, wait.saved, one.run, one.display)
    check_disk(live)


def rehearse_all(live: Sequence[Live], display: Display) -> None:
    """Try the largest of what is to come and measure the base, once for all that have the same rows."""
    tried, choice, measured, asked = set[str](), None, dict[tuple[object, ...], Evaluation](), Asked()
    for one in live:
        with one.opened.attached.leading():
            if choice is None:
                work = work_of(one.opened, one.learner, display.say)
                one.opened, choice = choose(one.opened, one.learner, work, display)
                forward = one.opened.model.forward
            one.opened = replace(one.opened, model=replace(one.opened.model, forward=forward))
            rows = f"{one.opened.dataset.fingerprint} {one.opened.config.train.batch_tokens}"
            if rows not in tried:
                short_form(one.opened, one.learner, one.run, one.general)
                tried.add(rows)
            fresh = not one.learner.state.step
            one.opened = with_references(one.opened, one.run, one.display, fresh=fresh, asked=asked)
            one.before = _measured_once(one, measured, display)
        one.open_log()


def start_all(live: Sequence[Live], display: Display) -> Forward:
    """Each run's steps, and the forward that takes them. What the base says of general text is kept once for all that
    take the same in the same order."""
    forward = above_the_frozen([one.opened for one in live], display)
    texts = {
        one.name: (text.fingerprint, len(text.pieces), (train := one.opened.config.train).seed, train.batch_tokens)
        for one in live
        if (text := one.opened.kept_text)
    }
    kept = {which: Kept(KEPT // len({*texts.values()})) for which in {*texts.values()}}
    for one in live:
        one.start(forward, kept[texts[one.name]] if one.name in texts else None)
    return forward


def _measured_once(one: Live, measured: dict[tuple[object, ...], Evaluation], display: Display) -> Evaluation | None:
    """The base on its held-out rows, by another run's figures where these were of the same rows in the same way."""
    opened, asked = one.opened, one.opened.config.evaluate
    ways = (asked.samples, asked.max_new_tokens, tuple((metric.name, metric.code) for metric in opened.metrics))
    what = (fingerprint(opened.dataset.eval), opened.model.renderer.template_fingerprint, *ways)
    if what in measured and not one.run.before.is_file():
        one.run.write_json(one.run.before, measured[what].to_json())
    before = measure_base(opened, one.run, Attempts(opened.device, one.display.say, lambda error: None), display)
    if before is not None:
        measured.setdefault(what, before)
    return before


def check_memory(live: Sequence[Live]) -> None:
    """Raise RunError where the adapters won't fit beside the base: their gradients and moments come with the steps."""
    factors = sum(p.nbytes for one in live for p in one.opened.attached.parameters)
    needed, free = HELD_PER_BYTE * factors, free_memory(live[0].opened.device)
    if needed > ROOM * free:
        fits = max(1, int(len(live) * ROOM * free / needed))
        raise RunError(
            f"{len(live)} adapters need {gib(needed)} more beside the base, and {gib(free)} are free",
            fix=f"sweep about {counted(fits, 'of them', 'of them')} at once, or with a lower adapter.rank",
        )


def check_disk(live: Sequence[Live]) -> None:
    """Raise RunError where the disk hasn't room for what all of them will write."""
    needed = 0
    for one in live:
        written = len(list_checkpoints(one.run.checkpoints)) * one.learner.checkpoint_bytes()
        needed += disk_needed(one.opened, one.learner) - written
    free = free_disk(live[0].run.folder)
    if needed > free:
        raise RunError(
            f"{len(live)} runs need {gib(needed)} for checkpoints and adapters, and only {gib(free)} are free",
            fix="free some space, choose another output, or set train.keep=1",
        )


class Rows:
    """Opens the rows of each `data` section once."""

    def __init__(self) -> None:
        self._opened: list[tuple[RunConfig, tuple[Source, Renderer, Dataset]]] = []

    def __call__(self, config: RunConfig, display: Display, source: Source) -> tuple[Source, Renderer, Dataset]:
        known = next((opened for other, opened in self._opened if other.data == config.data), None)
        if known is None:
            known = open_dataset(config, display, source)
            self._opened.append((config, known))
        return known
