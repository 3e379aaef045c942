"""A new adapter folder, and what is said of it: the end of resize, combine, extract and scale.

Each of them claims the folder before anything is computed (`new_folder`), makes an adapter by the functions of
adapter/, and hands it to `saved` with what was lost on the way.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltaw.adapter.algebra import mixed
from deltaw.adapter.cut import Loss
from deltaw.adapter.file import Adapter
from deltaw.files.atomic import write_text_atomic
from deltaw.named import template_beside
from deltaw.show.result import Result
from deltaw.show.text import counted, percent

WORST = 5  # modules shown


@dataclass(frozen=True)
class Made:
    """A new adapter and what there is to say about it: losses per module, more lines, more fields of the JSON."""

    adapter: Adapter
    losses: Sequence[Loss] = ()
    lines: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


def saved(made: Made, folder: Path, before: Adapter | None, source: str = "") -> Result:
    """`before`: the adapter that it was made of, if it was one. `source`: the run or the adapter whose chat template
    goes along."""
    if source and (template := template_beside(Path(source))):
        write_text_atomic(folder / template.name, template.read_text(encoding="utf-8"))
    made.adapter.save(folder)
    errors = [loss.relative_error for loss in made.losses]
    ranks = sorted(update.rank for update in made.adapter.factors.values())
    data: dict[str, Any] = {
        "output": str(folder),
        "modules": len(ranks),
        "parameters": made.adapter.parameters,
        "parameters_before": before.parameters if before else None,
        "ranks": {"least": ranks[0], "median": statistics.median(ranks), "largest": ranks[-1]},
        "relative_error": {"median": statistics.median(errors), "largest": max(errors)} if errors else None,
        "losses": [asdict(loss) for loss in made.losses],
        **made.more,
    }
    return Result(data, "\n".join([*_head(made, folder, ranks, before), *_lost(made.losses), *_notes(made)]))


def _head(made: Made, folder: Path, ranks: Sequence[int], before: Adapter | None) -> list[str]:
    rank = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    was = f" (before: {before.parameters:,})" if before else ""
    return [f"{folder}: {counted(len(ranks), 'module')}, {rank}, {counted(made.adapter.parameters, 'parameter')}{was}"]


def _lost(losses: Sequence[Loss]) -> list[str]:
    errors = [loss.relative_error for loss in losses]
    if not errors:
        return []
    if max(errors) <= 0:
        return ["nothing was lost"]
    middle = f"{percent(statistics.median(errors), 1)}"
    worst = sorted(losses, key=lambda loss: -loss.relative_error)[:WORST]
    return [
        f"lost from each update, ‖ΔW − ΔW'‖ / ‖ΔW‖: {middle} (median); the worst modules:",
        *(f"  {percent(lo.relative_error, 1):>7}  rank {lo.old_rank} → {lo.new_rank}  {lo.module}" for lo in worst),
    ]


def _notes(made: Made) -> list[str]:
    warning = mixed(made.adapter)
    return [*made.lines, *([f"note: {warning} (--uniform)"] if warning else [])]
