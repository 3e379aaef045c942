"""`deltaw scale`: the slider between base and fine-tune, measured (evaluate/slider.py), or one point of it written."""

import math
from collections.abc import Sequence
from dataclasses import asdict

from deltaw.adapter.algebra import scaled
from deltaw.commands.made import Made, saved
from deltaw.errors import InputError
from deltaw.evaluate.forgetting import general_text
from deltaw.evaluate.rows import rows_of
from deltaw.evaluate.slider import Point, slide
from deltaw.files.lock import new_folder
from deltaw.named import Named
from deltaw.show.progress import Display
from deltaw.show.result import Result

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
BAR = 24  # characters


def scale_named(
    name: str,
    *,
    to: float | None,
    output: str | None,
    factors: Sequence[float] | None,
    data: str | None,
    base: str | None,
    display: Display,
) -> Result:
    """With `to`: the adapter times a factor, written. Without: the task's loss and general text's along the slider."""
    named = Named(name)
    if to is not None:
        if output is None:
            raise InputError("where is the scaled adapter to go?", fix="add --output FOLDER")
        with new_folder(output) as folder:
            return saved(Made(scaled(named.adapter, to)), folder, named.adapter, name)
    model, examples = rows_of(named, data, base=base, display=display)
    general = general_text((named.config and named.config.evaluate.general) or "builtin:general", model.renderer)
    points = slide(model, factors or FACTORS, examples, general, display=display)
    return Result({"points": [asdict(point) for point in points], "rows": len(examples)}, point_lines(points))


def point_lines(points: Sequence[Point]) -> str:
    """Both losses at each factor, a bar beside each, longest for the largest of its column."""
    finite = [[loss for loss in losses if math.isfinite(loss)] for losses in zip(*map(_losses, points), strict=True)]
    most = [max(losses, default=0.0) for losses in finite]
    rows = [f"{'factor':>7}  {'task loss':{BAR + 10}}general text, loss"]
    for point in points:
        parts = [f"{loss:8.4f} {_bar(loss, top):{BAR}} " for loss, top in zip(_losses(point), most, strict=True)]
        rows.append(f"{point.factor:7g} {''.join(parts)}".rstrip())
    return "\n".join(rows)


def _losses(point: Point) -> tuple[float, float]:
    return point.task_loss, point.general_loss


def _bar(loss: float, top: float) -> str:
    """At most `BAR` wide, none for a loss that isn't a number: a large factor can break a model."""
    return "█" * max(1, round(BAR * (loss / top if top > 0 else 0))) if math.isfinite(loss) else ""
