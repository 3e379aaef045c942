"""`deltaw scale`: the slider between base and fine-tune, measured (evaluation/slider.py), or a point of it written."""

import math
from collections.abc import Sequence
from dataclasses import asdict

from deltaw.adapter.algebra import scaled
from deltaw.commands.made import Made, saved
from deltaw.errors import InputError
from deltaw.evaluation.forgetting import general_text
from deltaw.evaluation.rows import rows_of
from deltaw.evaluation.slider import Point, slide
from deltaw.files.lock import new_folder
from deltaw.named import Named
from deltaw.show.chart import bar
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.table import table

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
    if to is None and output is not None:
        raise InputError("by which factor is the adapter to be written?", fix="add --to FACTOR, or leave out --output")
    if to is not None and factors:
        raise InputError("--to writes one adapter and measures nothing, --factors measures", fix="give one of the two")
    if to is not None:
        if output is None:
            raise InputError("where is the scaled adapter to go?", fix="add --output FOLDER")
        with new_folder(output) as folder:
            return saved(Made(scaled(named.adapter, to)), folder, named.adapter, name)
    model, examples = rows_of(named, data, base=base, display=display)
    general = general_text((named.local and named.local.evaluate.general) or "builtin:general", model.renderer)
    points = slide(model, factors or FACTORS, examples, general, display=display)
    return Result({"points": [asdict(point) for point in points], "rows": len(examples)}, point_table(points))


def point_table(points: Sequence[Point]) -> str:
    """Both losses at each factor, a bar beside each, longest for the largest of its column."""
    columns = [[p.task_loss for p in points], [p.general_loss for p in points]]
    bars = [_bars(losses) for losses in columns]
    rows = [
        (f"{p.factor:g}", f"{p.task_loss:.4f}", task, f"{p.general_loss:.4f}", general)
        for p, task, general in zip(points, *bars, strict=True)
    ]
    return table(rows, ("factor", "task loss", "", "general text, loss", ""), align="rrlrl")


def _bars(losses: Sequence[float]) -> list[str]:
    """None for a loss that isn't a number: a large factor can break a model."""
    top = max((loss for loss in losses if math.isfinite(loss)), default=0.0)
    return [bar(loss / top if top > 0 else 0.0, BAR) if math.isfinite(loss) else "" for loss in losses]
