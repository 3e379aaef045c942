"""train(config): the whole run, top to bottom. One step is in step.py.

    claim the run folder; check everything that can be checked before the model is loaded
    open base, rows and adapter (opening.py); or put a checkpoint back
    try the largest pieces of what is to come (preflight.py); measure the base
    take the steps; after each what is due (underway.py): an evaluation on held-out rows, samples, a checkpoint
    stop before the last one where `train.patience` evaluations in a row weren't the best so far
    save the adapter, measure it, write result.json and the report (finish.py)

A signal waits for the end of a step or a write; an evaluation is cut off, and made up for when the run resumes. Where
several processes train together (world.py), rank 0 does all of this and the others `_follow`.
"""

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deltaw.adapter.file import Adapter
from deltaw.adapter.history import NOTHING, History
from deltaw.config import RunConfig, config_of
from deltaw.config.places import placed
from deltaw.data.loader import Ahead, Item
from deltaw.data.opening import open_dataset
from deltaw.errors import command
from deltaw.evaluation.own_metric import ASKED_FOR, Consent, open_metrics
from deltaw.model import open_model
from deltaw.run import Run
from deltaw.show.progress import QUIET, Display
from deltaw.training.batch_size import sized
from deltaw.training.captured import captured_on
from deltaw.training.changes import restore, settled
from deltaw.training.checkpoint import Saved, latest_checkpoint
from deltaw.training.contention import Contention
from deltaw.training.extend import check_extension, extended
from deltaw.training.finish import finish, measure_again, report
from deltaw.training.frozen_layers import above_the_frozen
from deltaw.training.learner import Learner
from deltaw.training.length import count_steps
from deltaw.training.log import open_log
from deltaw.training.looking import Terms
from deltaw.training.measuring import Attempts, measure_base
from deltaw.training.memory import Heap, bound_caches, bounded
from deltaw.training.opening import Opened, begin, general_rows, open_run
from deltaw.training.preflight import short_form, work_of
from deltaw.training.recomputing import choose, keeping
from deltaw.training.references import with_references
from deltaw.training.rewarding import with_rewards
from deltaw.training.shortage import explain
from deltaw.training.step import step
from deltaw.training.stop import Lost, Stopped, StopRequest
from deltaw.training.together import alike, hand_out, settings, settled_dtype
from deltaw.training.underway import OnStep, Underway
from deltaw.training.watch import CannotGoOn
from deltaw.training.world import World


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    replace: bool = False,
    on_step: OnStep | None = None,
    display: Display | None = None,
) -> Adapter:
    """Run `config`, a run file or what would stand in one, and return the adapter, which is also in `<output>/adapter`.

    `replace` discards an earlier run in the same folder. `on_step` is called after each step with its figures (step,
    loss, lr, …; eval_loss where there was an evaluation); what it raises ends the run, with the step saved.

    Raises InputError before the weights are loaded where that is possible, RunError when it fails later,
    `Stopped` on a signal.
    """
    config, world = config_of(config), World.of_environment()
    run = Run(Path(config.output))
    with world.joined():
        if not world.is_first:
            return _follow(run, world)
        if world.is_marked(_begun(run)):  # by this very torchrun, which has started its processes again
            return _resume(run, on_step, display or Display())
        with run.claimed(new=True, replace=replace):
            return _run(config, run, None, ASKED_FOR, display or Display(), on_step)


def resume(
    folder: str | Path,
    overrides: Iterable[str] = (),
    *,
    allow: bool = False,
    extend: bool = False,
    allow_code: bool = False,
    on_step: OnStep | None = None,
    display: Display | None = None,
) -> Adapter:
    """Resume an interrupted run from its newest intact checkpoint, or measure what a finished one lacks.

    `overrides` (`train.lr=1e-4`) need `allow`; with `extend` a finished run goes on (`train.epochs=3`); a metric that
    is a function in a file needs `allow_code`, unless that very file was asked for here before; `on_step` is as for
    `train`. Raises InputError when it isn't a run, is finished, or can't be resumed like this.
    """
    run, display, overrides = Run(Path(folder).expanduser()), display or Display(), list(overrides)
    consent, world = Consent(str(folder), allow_code), World.of_environment()
    with world.joined():
        if not world.is_first:
            return _follow(run, world)
        extend = extend and not world.is_marked(_begun(run))  # else it is extended already
        return _resume(run, on_step, display, consent, overrides, allow=allow, extend=extend)


def _resume(
    run: Run,
    on_step: OnStep | None,
    display: Display,
    consent: Consent = ASKED_FOR,
    overrides: list[str] | None = None,
    *,
    allow: bool = False,
    extend: bool = False,
) -> Adapter:
    folder, overrides = run.folder, overrides or []
    with run.resumed(overrides, extend=extend) as finished:
        saved = None if finished and not extend else latest_checkpoint(run.checkpoints, display)
        if extend:
            check_extension(run, saved, overrides)
        late = finished and not extend
        config, changed = settled(run, saved, overrides, allow=allow or extend, finished=late, display=display)
        local = placed(config, run.folder)
        if late:
            return _measure_again(config, local, run, consent, display)
        lineage = run.read_lineage()
        if saved is None:
            display.say(f"{folder} has no checkpoint yet, so it starts from the beginning")
            return _run(local, run, None, consent, display, on_step, lineage, extend=extend)  # begun anew, and here
        return _run(config, run, saved, consent, display, on_step, lineage, local, changed=changed, extend=extend)


def _run(
    config: RunConfig,
    run: Run,
    saved: Saved | None,
    consent: Consent,
    display: Display,
    on_step: OnStep | None,
    lineage: History = NOTHING,
    local: RunConfig | None = None,
    *,
    changed: bool = False,
    extend: bool = False,
) -> Adapter:
    """Take a run from its beginning or a checkpoint to its end, in a folder that is claimed. `local`: the config with
    its names where they lead from the current folder, if that isn't where the run was started."""
    began, world, given = time.monotonic(), World.of_environment(), local
    if not world.is_alone:
        config, given = settled_dtype(config), given and settled_dtype(given)
    local = given or config
    with StopRequest(relayed=not world.is_alone) as stop, ExitStack() as stack:
        local = settings(local, world)
        terms = Terms(consent, lineage, start_is_needed=saved is None, world=world)
        opened = alike(sized(open_run(local, display, terms), display))
        world.start(opened.device)
        opened = with_rewards(opened if local is config else opened.named_as(config), stack)
        general = general_rows(local, opened.model, opened.retained)
        learner = opened.learner(display)
        shortage = partial(explain, opened=opened, learner=learner, run=run)
        try:
            with opened.shards.leads():
                if saved is None:
                    begin(opened, run, display)
                else:
                    restore(learner, saved, run, display)
                    if extend:  # and now it is certain that it can go on like this
                        opened = extended(opened, learner, run, config, display)
                    elif changed:
                        run.write_config(config)
                world.mark(_begun(run))
                stop.advice = f"resume with: {command('train', run.folder)}"
                opened, choice = choose(opened, learner, work_of(opened, learner, display.say), display)
                shortage = partial(explain, opened=opened, learner=learner, run=run)
                short_form(opened, learner, run, general)
            world.first(lambda: choice.way, "what activations are kept")
            on_the_way, attempts = (Attempts(opened.device, display.say, shortage) for _ in range(2))
            with open_log(run, opened.config, learner.state.step, display.say) as log:
                with opened.shards.leads():
                    opened = with_references(opened, run, display, fresh=saved is None)
                    before = measure_base(opened, run, on_the_way, display)
                opened = hand_out(opened, learner, world)
                waited = Steps(Underway(opened, learner, run, stop, display, on_the_way, log, on_step)).take()
            with opened.shards.leads():
                adapter = finish(opened, learner, run, before, general, attempts, display, began, waited)
            stop.advice = f"the run is finished, but its report isn't: {command('inspect', run.folder)}"
            report(run, attempts, display, wanted=config.evaluate.report)
            _last(learner, world)
            return adapter
        except Exception as error:
            raise shortage(error) or error from None


def _follow(run: Run, world: World) -> Adapter:
    """Take the steps of rank 0's run with it, and return its adapter."""
    with StopRequest(relayed=True) as stop:
        config = settings(None, world)
        opened = alike(sized(open_run(config, QUIET, Terms(start_is_needed=False, world=world)), QUIET))
        world.start(opened.device)
        learner = opened.learner(QUIET)
        shortage = partial(explain, opened=opened, learner=learner, run=run)
        try:
            opened.shards.follow()  # rank 0 prepares
            opened = keeping(opened, world.first(lambda: "none", "what activations are kept"))
            opened.shards.follow()  # and measures the base
            opened = hand_out(opened, learner, world)
            attempts = Attempts(opened.device, QUIET.say, shortage)
            Steps(Underway(opened, learner, run, stop, QUIET, attempts)).take()
            opened.shards.follow()  # it measures the adapter
        except Exception as error:
            raise shortage(error) or error from None
        _last(learner, world)
        return learner.attached.adapter(opened.id)


def _last(learner: Learner, world: World) -> None:
    """When all is measured: every process has the adapter that rank 0 has saved, the best one."""
    world.barrier("the measurements at the end")
    world.hand_out(list(learner.saved().factors.values()), "the adapter")


def _begun(run: Run) -> str:
    """The mark that this start of torchrun began this run."""
    return f"begun {run.folder.resolve()}"


def _measure_again(config: RunConfig, local: RunConfig, run: Run, consent: Consent, display: Display) -> Adapter:
    """Measure what result.json lists as failed, on the adapter as it was saved."""
    with StopRequest("the run is finished, but some measurements are missing") as stop, ExitStack() as stack:
        bound_caches()
        metrics = open_metrics(config.evaluate.metrics, consent)
        model = open_model(run.folder, device=config.train.device, display=display)
        _, _, dataset = open_dataset(local, display, model.base.source)
        general = general_rows(local, model)
        run.write_config(config)
        known = {"lineage": run.read_lineage(), "consent": consent}
        opened = Opened(config, model, dataset, count_steps(config, dataset), metrics, **known)  # type: ignore[arg-type]
        opened = with_rewards(opened, stack)
        learner = opened.learner(display)
        attempts = Attempts(opened.device, display.say, partial(explain, opened=opened, learner=learner, run=run))
        measure_again(opened, run, learner.state.fingerprints, general, attempts, display)
        stop.advice = f"the run is finished, but its report isn't: {command('inspect', run.folder)}"
        report(run, attempts, display, wanted=config.evaluate.report)
    return Adapter.load(run.folder)


class Steps:
    """A run's remaining steps."""

    def __init__(self, underway: Underway) -> None:
        self.underway, self.opened, self.learner = underway, underway.opened, underway.learner
        self.stop, self.display = underway.stop, underway.display

    def take(self) -> float | None:
        """All of them; the share of time without a core (contention.py). Saves and raises Stopped at a signal."""
        learner, state, total, device = self.learner, self.learner.state, self.opened.total, self.opened.device
        captured, abreast, world, underway = None, bool(self.opened.shards), self.opened.world, self.underway
        contention = Contention(underway.run.folder, torch.get_num_threads(), self.display.say)
        try:
            forward, heap = above_the_frozen([self.opened], self.display), Heap(device)
            retain, rollouts = self.opened.retain(forward), self.opened.rollouts(state, self.display.say)
            retains = {} if retain is None else {self.opened.attached.number: retain}
            items: Iterable[Item] = rollouts or self.opened.loader(state)
            loader = Ahead(items if retain is None else retain.beside(items, state.step))
            if not self.opened.shards:
                captured = captured_on(device, forward, learner, self.opened.longest, self.display.say, loader.fetch)
            together = nullcontext() if world.is_alone else self.stop.held()
            with together, self.display.task("training", total) as progress:
                progress(state.step)
                underway.begin()
                first = True  # the step of this process that shows whether there is memory enough
                while not underway.is_over:
                    batches, position = next(loader)
                    with self.stop.held():
                        with bounded(device) if first else nullcontext():
                            how = captured, world, abreast, retains
                            (record,) = step(forward, [learner], batches, position, *how)
                        underway.note(rollouts.completed(record) if rollouts else record)
                    underway.agree()
                    first = False
                    if device.type == "cpu":
                        contention.stepped()
                    progress(state.step, underway.in_short)
                    underway.do_what_is_due()
                    underway.tell()
                    heap.tidy()
            underway.save(joint=True)  # the last step, where patience ended it
        except Stopped as stopped:
            if stopped.at_once or not state.step:
                raise
            underway.save()
            self.stop.check(f"stopped after step {state.step} of {total} and saved")
        except (CannotGoOn, Lost):
            if state.step:
                underway.save()
            raise
        finally:
            if captured is not None:
                captured.release()
        return contention.waited
