"""What the trials of an update showed (effect.py), in a few sentences."""

from statistics import median

from deltaw.analysis.effect.effect import OTHER, TASK, Effect, Point
from deltaw.analysis.page import number
from deltaw.evaluation.intervals import Interval
from deltaw.show.text import counted, percent

CHEAP = 0.05


def measured_on(effect: Effect) -> str:
    """Which rows, how many."""
    parts = [
        f"{counted(tokens.rows, 'row')} of the task ({effect.sources[kind]}; {counted(tokens.labels, 'label')})"
        if kind == TASK
        else f"{counted(tokens.rows, 'passage')} of general text ({effect.sources[kind]}; "
        f"{counted(tokens.labels, 'token')})"
        for kind, tokens in effect.tokens.items()
    ]
    words = f"Measured on {' and '.join(parts)}."
    if any(tokens.rows == 1 for tokens in effect.tokens.values()):
        words += " One row or passage alone has no interval."
    if effect.left_out:
        words += f" The time didn't suffice for {', '.join(effect.left_out)}."
    return words


def in_words(effect: Effect) -> list[str]:
    """The main results."""
    lines = []
    chance = median(one.random for one in effect.modules.values())
    if (task := _median(effect, TASK)) is not None and (other := _median(effect, OTHER)) is not None:
        lines.append(
            f"On the task's tokens the update adds {percent(task, 1)} to what a weight gives (median module), on "
            f"general text {percent(other, 1)}, on random inputs {percent(chance, 1)}."
        )
    lines += [_tokens(effect, kind) for kind in effect.tokens]
    if point := gentlest(effect):
        how = f"At {point.name} of its scale" if point.group == "scale" else f"Cut to rank {point.name}"
        lines.append(
            f"{how} the task's loss changes by {between(point.task_change)} and KL on general text by "
            f"{between(point.kl_change)} nats per token."
        )
    if layers := effect.of("layer"):
        most = max(layers, key=lambda point: point.task_change.value)
        cost = min(layers, key=lambda point: point.kl_change.value)
        lines.append(
            f"The task needs layer {most.name}'s update most (without it the loss changes by "
            f"{between(most.task_change)}); layer {cost.name}'s moves general text most (without it KL changes by "
            f"{between(cost.kl_change)})."
        )
    return lines


def gentlest(effect: Effect) -> Point | None:
    """Of the scales and ranks that cost the task no more than `CHEAP` of what was learnt, the one with the least KL;
    None where that is the update as it was trained."""
    base, tuned = effect.of(None)
    room = CHEAP * max(0.0, base.task_loss.value - tuned.task_loss.value)
    cheap = [
        point for point in effect.of("scale", "rank") if point.task_change.value <= room and point.kl_change.value < 0
    ]
    return min(cheap, key=lambda point: point.kl.value, default=None)


def between(one: Interval, sign: bool = True) -> str:
    """ "+0.044 (0.024 to 0.064)"."""
    value = f"{'+' if sign and one.value > 0 else ''}{number(one.value)}"
    return value if one.low is None or one.high is None else f"{value} ({number(one.low)} to {number(one.high)})"


def _tokens(effect: Effect, kind: str) -> str:
    tokens = effect.tokens[kind]
    what = "the task's labels" if kind == TASK else "general tokens"
    words = f"Of {what} the update helped {percent(tokens.helped.value)} and hurt {percent(tokens.hurt.value)}"
    words += f": the loss changes by {between(tokens.change)} nats per token"
    if kind == OTHER and tokens.half_of_kl is not None:
        words += f", and half of KL is in {percent(tokens.half_of_kl)} of the tokens"
    return f"{words}."


def _median(effect: Effect, kind: str) -> float | None:
    known = [value for one in effect.modules.values() if (value := one.value(kind)) is not None]
    return median(known) if known else None
