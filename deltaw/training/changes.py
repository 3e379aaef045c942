"""Resuming a run: which settings may have changed, which would make it a different run, restoring its checkpoint.

    fixed            what decides which numbers there are, in which order the rows come, and how it is computed
    with --allow     all the rest: the rate and its schedule, the length (no shorter than it is), how much at a time,
                     what is measured and kept; of a finished run only what is measured

`base`, `data.train`, `data.eval` and `adapter.from` may have new names (files move); whether they are the same is for
the fingerprints of weights, rows, template and start to say, which are compared once these are read. `tokens_per_batch`
changes how a step is divided, not which rows it trains on.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from deltaw.base.fingerprint import same_base
from deltaw.config import RunConfig, load_config, parse_config
from deltaw.config.own_rows import at_home
from deltaw.config.sources import ROWS
from deltaw.errors import InputError, listed
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training.checkpoint import Saved, checkpoint_at, is_whole
from deltaw.training.learner import Learner
from deltaw.training.optim import WARMUP

FIXED = (
    *("base_weights", "adapter", "data", "train.seed", "train.tokens_per_step", "train.dtype"),
    *("train.retain.data", "train.retain.share"),
)
NAMES = ("data.train", "data.eval", "adapter.from", "train.retain.data")  # those of FIXED that are only names
FREE = ("output",)  # the run folder was moved
MEASURING = "evaluate."  # all that a finished run can still measure


def settled(
    run: Run, saved: Saved | None, overrides: Iterable[str], *, allow: bool, finished: bool, display: Display
) -> tuple[RunConfig, bool]:
    """The settings that the run resumes with, and whether they differ from its config.yaml. Raises InputError
    where it can't resume with them."""
    written = load_config(run.config)
    # The checkpoint knows what it was made with, whatever was written into config.yaml since.
    began = parse_config(saved.state.config, source="the checkpoint", begun=True) if saved else written
    began = at_home(began, run.folder)
    began, config = (_as_begun(one, saved) for one in (began, load_config(run.config, overrides)))
    for line in check_changes(began, config, allow=allow, run=str(run.folder), finished=finished):
        display.say(f"changed: {line}")
    config = config.model_copy(update={"output": written.output})  # it is this run, wherever it lies by now
    if saved is not None and config.train.steps:  # `restore` looks for itself, when much has been read
        check_length(config.train.steps, saved.state.step, run=str(run.folder))
    return config, config != written


def _as_begun(config: RunConfig, saved: Saved | None) -> RunConfig:
    """The config as it was meant when the run began: a checkpoint that doesn't say which deltaw wrote it is from when a
    warm-up of 10, the default, was cut to a tenth of a short run, which now needs that it is left open."""
    if saved is None or "deltaw" in saved.state.conditions or config.train.warmup_steps != WARMUP:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"warmup_steps": None})})


def restore(learner: Learner, saved: Saved, run: Run, display: Display) -> None:
    """Restore a checkpoint. Raises InputError when it belongs to another base, data, template or adapter."""
    now, then = learner.state.fingerprints, saved.state.fingerprints
    changed = [name for name, value in now.items() if not same_base(then.get(name, ""), value)]
    if changed:
        raise InputError(
            f"{run.folder} can't be resumed: its {' and '.join(changed)} changed after it stopped",
            fix="put it back as it was, or start a new run",
        )
    check_length(learner.total, saved.state.step, run=str(run.folder))
    now, then = learner.state.conditions, {"processes": 1} | saved.state.conditions  # it used to be always one
    rewritten = [name for name, code in learner.state.code.items() if saved.state.code.get(name, code) != code]
    learner.restore(saved)
    other = [f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]
    if other:
        display.say(f"warning: it resumes with {', '.join(other)}, so the last bits will differ")
    if rewritten:
        display.say(
            f"warning: the code of the reward {', '.join(rewritten)} isn't what it was: answers are worth "
            f"other numbers from step {learner.state.step + 1} on"
        )
    state = learner.state
    if state.best_step and not is_whole(checkpoint_at(run.checkpoints, state.best_step)):
        display.say(
            f"warning: step {state.best_step} was the best, but its checkpoint is gone; the steps to come decide"
        )
        state.best_step, state.best_loss, state.no_better = 0, None, 0
    if missing := run.cut_metrics(state.metrics_lines):
        display.say(f"{run.metrics} lacks {missing} of the {state.metrics_lines} lines it had")
    display.say(f"resumed after step {state.step} of {learner.total}")


def differences(before: RunConfig, after: RunConfig) -> dict[str, tuple[Any, Any]]:
    """(before, after) by dotted field, in the order of the run file."""
    old, new = (dict(_flat(config.model_dump(mode="json"))) for config in (before, after))
    names = [*old, *(name for name in new if name not in old)]
    return {n: (old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n) and n not in FREE}


def check_changes(before: RunConfig, after: RunConfig, *, allow: bool, run: str, finished: bool = False) -> list[str]:
    """The changes in words. Raises InputError with them where they can't be made or weren't allowed. `finished`: all
    steps are taken."""
    changed = differences(before, after)
    words = {name: f"{name}: {_word(old)} -> {_word(new)}" for name, (old, new) in changed.items()}
    late = [name for name in changed if finished and not name.startswith(MEASURING)]
    refused = [line for name, line in words.items() if name in late or _is_fixed(name, *changed[name])]
    if refused:
        raise InputError(
            f"{run} can't be resumed with these settings, which differ from its own:\n{listed(refused)}",
            fix="put them back, or start a new run with another output",
        )
    if idle := [line for line in after.without_effect() if line not in before.without_effect()]:
        raise InputError("; ".join(idle))
    if words and not allow:
        raise InputError(
            f"{run} was started with other settings:\n{listed(list(words.values()))}",
            fix="to resume with the new ones, add --allow; otherwise put the old ones back",
        )
    return list(words.values())


def check_length(total: int, taken: int, *, run: str) -> None:
    """Raise InputError where a run would become shorter than it already is, which its schedule can't describe."""
    if total < taken:
        raise InputError(
            f"{run} has taken {taken} steps already, more than the {total} asked for",
            fix=f"train.steps={taken} ends it here, a higher number continues it; for fewer steps start a new run",
        )


def _is_fixed(name: str, old: Any, new: Any) -> bool:
    if name in NAMES and isinstance(old, str | list) and isinstance(new, str | list):
        return _weights(old) != _weights(new)
    return any(name == fixed or name.startswith(fixed + ".") for fixed in FIXED)


def _weights(sources: str | list[Any]) -> list[float]:
    """Of each source that is named."""
    named = [sources] if isinstance(sources, str) else sources
    return [float(one.get("weight", 1)) if isinstance(one, dict) else 1.0 for one in named]


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    fields: list[tuple[str, Any]] = []
    for name, item in value.items():
        fields += _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else [(prefix + name, item)]
    return fields


def _word(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(one, str | dict) for one in value):
        value = " + ".join(one if isinstance(one, str) else _source(one) for one in value)
    return "none" if value is None else f"{value:.60}" if isinstance(value, str) else f"{value!s:.60}"


def _source(value: Mapping[str, Any]) -> str:
    """A source with its weight; a row that was given has no name."""
    weight = value.get("weight", 1)
    return f"{value.get('path', ROWS)} x {weight:g}" if weight != 1 else str(value.get("path", ROWS))
