"""A sweep, top to bottom: several runs on one base in one process.

    claim the sweep's folder and each run's; open what all share once, put an adapter of each run on the base (live.py)
    take the runs' steps together, stop the worse settings where that was asked for (joint.py, halving.py)
    each run that is done is saved, measured and written like any run; then say how they stand (standing.py, page.py)

It is resumed from its folder, whatever stopped it: runs that are finished stay as they are, the others go on from their
newest checkpoints. A run that can't go on ends alone. Whatever else fails (memory, the disk, a signal) ends the sweep,
each run saved as far as that can be done.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import torch

from deltaw.errors import DeltawError, command
from deltaw.evaluation.own_metric import ASKED_FOR, Consent
from deltaw.show.progress import Display, Once
from deltaw.show.text import counted
from deltaw.sweep.folder import FAILED, HALVED, Rung, SweepFolder, held
from deltaw.sweep.halving import by_setting, kept, shares, stopped
from deltaw.sweep.joint import Joint
from deltaw.sweep.live import HEAD, Live, Waiting, begin_all, open_all, rehearse_all, start_all, waiting_for
from deltaw.sweep.page import write_page
from deltaw.sweep.standing import Ranking, ranked
from deltaw.training.contention import Contention
from deltaw.training.shortage import explain
from deltaw.training.stop import Stopped, StopRequest
from deltaw.training.watch import CannotGoOn


def run_sweep(
    sweep: SweepFolder, *, new: bool, replace: bool = False, allow_code: bool = False, display: Display
) -> Ranking:
    """Take a sweep to its end, from its beginning or from where it was stopped, and say how its runs stand. `new`: it
    begins now, and `replace` discards runs that lie in its way; `allow_code`: run the metrics' code that a sweep's
    folder names. Raises InputError, RunError, `Stopped`."""
    with held(sweep.grid, new=new, replace=replace):
        going = _Going(sweep, display, ASKED_FOR if new else Consent(str(sweep.path), allow_code))
        going.train(fresh=new, replace=replace)
        ranking = ranked(going.sweep)
        write_page(going.sweep, ranking)
    return ranking


class _Going:
    """A sweep that is under way. `sweep`: as it stands."""

    def __init__(self, sweep: SweepFolder, display: Display, consent: Consent) -> None:
        self.sweep, self._display, self._consent = sweep, display, consent
        self._done: list[Live] = []

    def train(self, *, fresh: bool, replace: bool) -> None:
        """All that is left."""
        began, variants = time.monotonic(), self.sweep.to_train
        if not variants:
            return
        with ExitStack() as claims, StopRequest() as stop:
            waiting = list[Waiting]()
            for variant in variants:
                run = self.sweep.run(variant)
                claims.enter_context(run.claimed(new=fresh, replace=replace))
                waiting.append(waiting_for(variant, run, self._display, fresh=fresh))
            consents = [self._consent if wait.run.config.is_file() else ASKED_FOR for wait in waiting]
            live = open_all(waiting, stop, self._display, consents, began)
            first = live[0]
            try:
                if not replace:  # else a run that is there would be taken for one of this sweep's
                    self.sweep.begin()
                begin_all(live, waiting)
                self.sweep.begin()
                rehearse_all(live, self._display)
                stop.advice = f"resume with: {command('sweep', self.sweep.path)}"
                self._say(live)
                self._take(live, stop)
            except Exception as error:
                fix = "lower train.tokens_per_batch, or sweep fewer runs at once"
                raise explain(error, first.opened, first.learner, first.run, fix) or error from None
            stop.advice = f"the runs are trained, but not all have a report: {command('sweep', self.sweep.path)}"
            for one in self._done:
                one.report()

    def _say(self, live: Sequence[Live]) -> None:
        """What is going to happen."""
        finished = [v for v in self.sweep.grid.variants if self.sweep.is_finished(v)]
        trained = sum(p.numel() for one in live for p in one.opened.attached.parameters)
        self._display.say(f"{counted(len(live), 'run')} on one base, {trained:,} parameters trained in all")
        if finished:
            self._display.say(f"{counted(len(finished), 'run is', 'runs are')} finished already")

    def _take(self, live: list[Live], stop: StopRequest) -> None:
        contention = Contention(self.sweep.path, torch.get_num_threads(), self._display.say)
        forward = start_all(live, self._display)
        joint = Joint(live, forward, stop, contention, self._ended, Once(self._display).say)
        settings = len({variant.setting for variant in self.sweep.grid.variants})
        shortest = min(one.opened.total for one in live)
        rungs = shares(settings, shortest) if self.sweep.grid.halving else [1.0]
        looked = {rung.share for rung in self.sweep.rungs}
        try:
            total = sum(one.opened.total for one in live)
            with self._display.board("training", total, HEAD) as board:
                for one in live:
                    one.underway.begin()
                for share in rungs:
                    joint.take_until(share, board)
                    if share < 1 and share not in looked:
                        self._halve(joint, share, kept(share, settings), stop)
        except Stopped as stopped_by:
            if not stopped_by.at_once:
                joint.save()
                stop.check(f"stopped, and {counted(len(joint.live), 'run is', 'runs are')} saved")
            raise
        except Exception:
            with suppress(DeltawError):  # the disk may be why, and what failed is said below
                joint.save()
            raise

    def _halve(self, joint: Joint, share: float, keep: int, stop: StopRequest) -> None:
        """Look at the held-out losses, and stop all but the best settings."""
        live = [one.variant for one in joint.live]
        losses = {one.name: _finite(one.underway.held_out()[0]) for one in joint.live}
        with stop.held():
            out = stopped(live, losses, keep)
            self.sweep = self.sweep.with_rung(Rung(share, losses))
            for variant in out:
                why = f"stopped after {share:.0%} of its steps with a held-out loss of {_shown(losses[variant.name])}"
                self.sweep = self.sweep.with_ended(variant.name, HALVED, why)
            joint.drop([variant.name for variant in out])
            self.sweep.write()
        best, loss = by_setting(live, losses)[0]
        going_on = counted(len(joint.live), "run goes", "runs go")
        self._display.say(f"after {share:.0%} of the steps {best} is best ({_shown(loss)}), and {going_on} on")

    def _ended(self, one: Live, error: CannotGoOn | None) -> None:
        if error is None:
            self._done.append(one)
            return
        what = error.what.splitlines()[0]
        one.display.say(f"warning: it can't go on, and the others do: {error.what}\n  {error.fix or ''}".rstrip())
        self.sweep = self.sweep.with_ended(one.name, FAILED, what)
        self.sweep.write()


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _shown(loss: float | None) -> str:
    return "NaN" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"
