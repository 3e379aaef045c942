"""Extending a finished run: `deltaw train RUN train.epochs=3 --extend` takes it from its last step to a later end.

The last checkpoint has all that a run is, so it goes on as if it had been stopped there: the factors of the last step
(not of the best one, which was saved), the optimiser's moments, and the data where it stood. Under a constant rate the
bits are those of a run that was as long from the beginning (if that has the same warm-up). A schedule that falls to 0
had fallen there, and it is a function of the whole length: now it ends at the new end, so the rate rises from the one
to the other between two steps, and the run says from what to what. Rejected: a second warm-up and decay after the first
one (a run's rate would no longer be a function of its config and the step), and refusing (users want more epochs).

What was measured at the earlier end stays, under another name (deltaw/run.py), and so does the adapter until the
longer run is finished. A kill at any time leaves either the finished run or one that resumes as usual.
"""

from collections.abc import Sequence
from dataclasses import replace

from deltaw.config import RunConfig, load_config
from deltaw.errors import InputError, command
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training.checkpoint import Saved
from deltaw.training.learner import Learner
from deltaw.training.opening import Opened
from deltaw.training.optim import learning_rate


def check_extension(run: Run, saved: Saved | None, overrides: Sequence[str]) -> None:
    """Raise InputError, before anything is opened, where a finished run can't be extended or isn't asked to be."""
    if saved is None:
        start = command("train", "run.yaml", f"adapter.from={run.folder}")
        raise InputError(
            f"{run.folder} can't be extended: its checkpoints are gone, and with them the optimiser's state",
            fix=f"start a new run from its adapter: {start}",
        )
    train, step = load_config(run.config, overrides).train, saved.state.step
    if train.patience is not None and saved.state.no_better >= train.patience:
        raise InputError(
            f"{run.folder} stopped after {saved.state.no_better} evaluations without a better one, so it would at once",
            fix=f"set train.patience higher, or null: {_again(run, 'train.patience=null')}",
        )
    if train.steps and train.steps <= step:
        raise _no_longer(run, step, train.steps)
    before = saved.state.config["train"]
    if not train.steps and not before["steps"] and train.epochs <= before["epochs"] and not _stopped_early(run):
        raise _no_longer(run, step, step)


def extended(opened: Opened, learner: Learner, run: Run, config: RunConfig, display: Display) -> Opened:
    """Make a finished run, whose last state `learner` has, one that goes on to `opened.total` steps. Raises InputError
    where that isn't more."""
    step = learner.state.step
    if opened.total <= step:
        raise _no_longer(run, step, opened.total)
    before = run.read_json(run.result).get("planned_steps", step)
    steps = dict.fromkeys([*opened.lineage.extended_after, step])
    lineage = opened.lineage.model_copy(update={"extended_after": tuple(steps)})
    run.extended(lineage, config)
    display.say(f"extended: it goes on after step {step:,}, to step {opened.total:,}")
    train = config.train
    last, following = learning_rate(step - 1, before, train), learning_rate(step, opened.total, train)
    if last != following:
        display.say(
            f"the {train.schedule} schedule ends at step {opened.total:,} now, so the learning rate, {last:.3g} at the "
            f"last step, goes on from {following:.3g}"
        )
    return replace(opened, lineage=lineage)


def _stopped_early(run: Run) -> bool:
    return bool(run.read_json(run.result).get("stopped_early"))


def _no_longer(run: Run, taken: int, total: int) -> InputError:
    return InputError(
        f"{run.folder} has taken {taken:,} steps, and with these settings it has {total:,}: nothing is left to take",
        fix=f"say how long it is to be, for example: {_again(run, run.longer())}",
    )


def _again(run: Run, setting: str) -> str:
    return command("train", run.folder, setting, options=["--extend"])
