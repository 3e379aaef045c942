"""`deltaw resize`, `combine`, `extract` and `scale`: names in, a new adapter folder out, and what was lost on the way.

The functions of adapter/algebra.py and its neighbours do the work on values; here names become values, the folder that
is to be written is claimed before anything is computed, and losses become a table.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltaw.adapter.algebra import mixed, pad_all, resize, scaled
from deltaw.adapter.combine import combine
from deltaw.adapter.cut import Loss
from deltaw.adapter.extract import extract_adapter, extract_folders
from deltaw.adapter.file import Adapter
from deltaw.config import load_config
from deltaw.errors import InputError
from deltaw.evaluate.budget import Trial, resize_to_loss
from deltaw.evaluate.forgetting import general_text
from deltaw.evaluate.rows import rows_of
from deltaw.evaluate.slider import Point, slide
from deltaw.files.atomic import write_text_atomic
from deltaw.files.lock import new_folder
from deltaw.model import is_run, load_adapter, template_beside
from deltaw.show.progress import Display

WORST = 5  # modules shown
BAR = 24  # characters
FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
Shown = tuple[dict[str, Any], str]  # for machines, for people


@dataclass(frozen=True)
class Made:
    """A new adapter and what is to be said of it."""

    adapter: Adapter
    losses: Sequence[Loss] = ()
    lines: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


def resize_named(
    name: str,
    output: str,
    *,
    rank: int | None,
    energy: float | None,
    max_loss_increase: float | None,
    data: str | None,
    base: str | None,
    uniform: bool,
    display: Display,
) -> Shown:
    """A smaller adapter: by rank, by energy, or the smallest whose held-out loss rises by at most a share."""
    if sum(way is not None for way in (rank, energy, max_loss_increase)) != 1:
        raise InputError("give one of --rank, --energy and --max-loss-increase")
    with new_folder(output) as folder:
        if max_loss_increase is None:
            adapter = load_adapter(Path(name))
            return _save(Made(*resize(adapter, rank=rank, energy=energy, uniform=uniform)), folder, adapter, name)
        model, examples = rows_of(name, data, base=base, display=display)
        adapter = load_adapter(Path(name))
        smaller, trials = resize_to_loss(model, adapter, examples, max_loss_increase, display=display)
        made = Made(
            pad_all(smaller) if uniform else smaller, (), _trials(trials), {"trials": [asdict(t) for t in trials]}
        )
        return _save(made, folder, adapter, name)


def combine_named(
    names: Sequence[str],
    output: str,
    *,
    weights: Sequence[float] | None,
    method: str,
    rank: int | None,
    energy: float | None,
    density: float | None,
    seed: int,
    display: Display,
) -> Shown:
    """The weighted sum of several adapters of one base; without weights each counts once."""
    with new_folder(output) as folder:
        adapters = [load_adapter(Path(name)) for name in names]
        with display.task("combining", len({path for adapter in adapters for path in adapter.factors})) as progress:
            made = combine(
                adapters,
                weights or [1.0] * len(adapters),
                method=method,
                rank=rank,
                energy=energy,
                density=density,
                seed=seed,
                progress=progress,
            )
        return _save(Made(*made), folder, None, names[0])


def extract_named(
    tuned: str, base: str | None, output: str, *, rank: int | None, energy: float | None, display: Display
) -> Shown:
    """A LoRA out of a run with `adapter: full`, or out of a fine-tuned model's folder and its base."""
    with new_folder(output) as folder:
        if base is None:
            if not is_run(Path(tuned)) and (Path(tuned) / "config.json").is_file():
                raise InputError(f"{tuned} is a model: what changed can't be told without its base", "add --base BASE")
            adapter = load_adapter(Path(tuned))
            return _save(
                Made(*extract_adapter(adapter, rank=rank, energy=energy, display=display)), folder, adapter, tuned
            )
        if not Path(tuned).is_dir():
            raise InputError(f"{tuned}: no such folder", fix="name the fine-tuned model's folder")
        found, report = extract_folders(Path(tuned), base, rank=rank, energy=energy, display=display)
        missing = report.warning()
        more = {"not_in_adapter": [asdict(change) for change in report.unadapted], "settings": report.config}
        more["rounding"] = report.rounding
        return _save(Made(found, report.losses, [missing] if missing else [], more), folder, None)


def scale_named(
    name: str,
    *,
    to: float | None,
    output: str | None,
    factors: Sequence[float] | None,
    data: str | None,
    base: str | None,
    display: Display,
) -> Shown:
    """With `to`: the adapter times a factor, written. Without: the task's loss and general text's along the slider."""
    if to is not None:
        if output is None:
            raise InputError("where is the scaled adapter to go?", fix="add --output FOLDER")
        with new_folder(output) as folder:
            adapter = load_adapter(Path(name))
            return _save(Made(scaled(adapter, to)), folder, adapter, name)
    model, examples = rows_of(name, data, base=base, display=display)
    config = load_config(Path(name) / "config.yaml") if is_run(Path(name)) else None
    general = general_text((config and config.evaluate.general) or "builtin:general", model.renderer)
    points = slide(model, factors or FACTORS, examples, general, display=display)
    return {"points": [asdict(point) for point in points], "rows": len(examples)}, _points(points)


def _save(made: Made, folder: Path, before: Adapter | None, source: str = "") -> Shown:
    """`source`: a run or an adapter that it was made of, whose chat template goes along."""
    if source and (template := template_beside(Path(source))):
        write_text_atomic(folder / template.name, template.read_text(encoding="utf-8"))
    made.adapter.save(folder)
    errors = [loss.relative_error for loss in made.losses]
    ranks = sorted(update.rank for update in made.adapter.factors.values())
    result: dict[str, Any] = {
        "output": str(folder),
        "modules": len(ranks),
        "parameters": made.adapter.parameters,
        "parameters_before": before.parameters if before else None,
        "ranks": {"least": ranks[0], "median": statistics.median(ranks), "largest": ranks[-1]},
        "relative_error": {"median": statistics.median(errors), "largest": max(errors)} if errors else None,
        "losses": [asdict(loss) for loss in made.losses],
        **made.more,
    }
    said = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    was = f" (before: {before.parameters:,})" if before else ""
    lines = [f"{folder}: {len(ranks)} modules, {said}, {made.adapter.parameters:,} parameters{was}"]
    if errors and max(errors) > 0:
        lines.append(
            f"lost of each update, ‖ΔW − ΔW'‖ / ‖ΔW‖: {statistics.median(errors):.1%} in the middle, the worst"
        )
        worst = sorted(made.losses, key=lambda loss: -loss.relative_error)[:WORST]
        lines += [f"  {lo.relative_error:6.1%}  rank {lo.old_rank} → {lo.new_rank}  {lo.module}" for lo in worst]
    elif errors:
        lines.append("nothing was lost")
    warning = mixed(made.adapter)
    lines += [*made.lines, *([f"note: {warning} (--uniform)"] if warning else [])]
    return result, "\n".join(lines)


def _trials(trials: Sequence[Trial]) -> list[str]:
    head = f"{'energy':>9} {'parameters':>12} {'mean rank':>10} {'held-out loss':>14}"
    full = trials[0].loss
    rows = [
        f"{t.energy:9.3%} {t.parameters:12,} {t.mean_rank:10.1f} {t.loss:14.4f}"
        + (f"  {t.loss / full - 1:+.2%}" if full > 0 else f"  {t.loss - full:+.4f}")  # of a memorised task it is 0
        for t in trials
    ]
    return [head, *rows]


def _points(points: Sequence[Point]) -> str:
    """Both losses at each factor, a bar beside each, longest for the largest of its column."""
    finite = [[loss for loss in losses if math.isfinite(loss)] for losses in zip(*map(_losses, points), strict=True)]
    most = [max(losses, default=0.0) for losses in finite]
    rows = [f"{'factor':>7}  {'task loss':{BAR + 10}}general text, loss"]
    for p in points:
        task, general = (f"{loss:8.4f} {_bar(loss, top):{BAR}} " for loss, top in zip(_losses(p), most, strict=True))
        rows.append(f"{p.factor:7g} {task}{general}".rstrip())
    return "\n".join(rows)


def _losses(point: Point) -> tuple[float, float]:
    return point.task_loss, point.general_loss


def _bar(loss: float, top: float) -> str:
    """At most `BAR` wide, none for a loss that is no number: a large factor can break a model."""
    return "█" * max(1, round(BAR * (loss / top if top > 0 else 0))) if math.isfinite(loss) else ""
