"""The scale of an adapter as a slider: between the base (0) and what was trained (1), or beyond either.

    W + f ΔW

Weights between a base and its fine-tune often keep most of what was learnt and lose less of what was known (Wortsman
et al. 2022). With the update apart that costs nothing to try: the scale is all that changes. So each factor is measured
twice, on the task's rows and on general text, and the trade is the user's to pick.

Letters: f the factor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.data.example import Example
from deltaw.errors import InputError
from deltaw.evaluation.budget import check_rows, restored
from deltaw.evaluation.held_out import held_out_loss
from deltaw.model import Model
from deltaw.replaced import REPLACED
from deltaw.show.progress import Display


@dataclass(frozen=True)
class Point:
    """Loss in nats per supervised token at one factor, on both kinds of rows."""

    factor: float
    task_loss: float
    general_loss: float


def slide(
    model: Model,
    factors: Sequence[float],
    task_examples: Sequence[Example],
    general_examples: Sequence[Example],
    *,
    display: Display,
) -> list[Point]:
    """A point for each factor, in the order given. The model is left as it was.

    Raises InputError: no adapter on the model, DoRA, trained tokens and whole modules (of which there is no multiple),
    no rows, a factor that is not finite.
    """
    if model.attached is None:
        raise InputError("this model carries no adapter, so there is nothing to scale", fix="name a run or an adapter")
    if not factors or not all(math.isfinite(factor) for factor in factors):
        raise InputError("at least one factor is needed, and each must be a finite number: 0 0.5 1, for example")
    check_rows(task_examples)
    check_rows(general_examples)
    layers, points = model.attached.layers, []
    values = [update for path, layer in layers.items() for update in layer.values(path).items()]
    if replaced := [path for path, update in values if update.kind in REPLACED]:
        raise InputError(
            f"{replaced[0]} has new rows in place of the base's, of which there is no multiple",
            fix="measure it as it is: deltaw eval",
        )
    with restored(model.attached), display.task("sliding", len(factors)) as progress:
        trained = {path: layer.factors() for path, layer in layers.items()}
        for factor in factors:
            for path, layer in layers.items():
                layer.set_factors(trained[path].times(factor))
            losses = [held_out_loss(model.forward, rows)[0] for rows in (task_examples, general_examples)]
            points.append(Point(factor, *losses))
            progress(len(points), f"{factor:g}: task {losses[0]:.4f}, general {losses[1]:.4f}")
    return points
