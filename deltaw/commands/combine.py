"""`deltaw combine`: the weighted sum of several adapters on one base, exactly, by TIES or DARE (adapter/combine.py)."""

from collections.abc import Sequence

from deltaw.adapter.combine import combine
from deltaw.adapter.file import Adapter
from deltaw.commands.made import Made, saved
from deltaw.files.lock import new_folder
from deltaw.show.progress import Display
from deltaw.show.result import Result


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
) -> Result:
    """Without weights each adapter counts once."""
    with new_folder(output) as folder:
        adapters = [Adapter.load(name) for name in names]
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
        return saved(Made(*made), folder, None, names[0])
