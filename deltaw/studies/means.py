"""What arms come to over the seeds, as pictures and tables take it: means with their intervals."""

from collections.abc import Callable, Mapping, Sequence

from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.studies.statistics import Estimate, Paired

Band = tuple[Sequence[float], Sequence[float | None], Sequence[float | None]]


def mean_bars(arms: Mapping[str, Mapping[int, float]], y_label: str, caption: str) -> Picture:
    """`arms`: a number by seed, for each. The intervals are of the means, wider than those of the pairs that a rule
    asks about."""
    means = {arm: Paired(tuple(by_seed.values())) for arm, by_seed in arms.items()}
    rows: list[list[Cell]] = [[arm, one.value, *one.bounds(), *one.values] for arm, one in means.items()]
    seeds = [f"seed {seed}" for seed in next(iter(arms.values()))]
    drawn = pictures.bars(
        list(arms),
        {"mean of the seeds": [one.value for one in means.values()]},
        y_label=y_label,
        errors={"mean of the seeds": [one.bounds()[1] - one.value for one in means.values()]},
    )
    table = Table(["", "mean", "from", "to", *seeds], rows, "Intervals are of the means, not of the pairs")
    return Picture(drawn, caption, "A bar for each, with its interval", table)


def band(xs: Sequence[float], estimates: Sequence[Estimate], shown: Callable[[float], float] = float) -> Band:
    """(xs, lower ends, upper ends) of the intervals. `shown`: what a value is drawn as, rising with it."""
    ends = [estimate.bounds() for estimate in estimates]
    return list(xs), [shown(low) for low, _ in ends], [shown(high) for _, high in ends]


def mean_of(by_seed: Mapping[int, float]) -> Paired:
    """The mean over seeds, with what is known of it."""
    return Paired(tuple(by_seed.values()))


def cells(estimate: Estimate, shown: Callable[[float], float] = float) -> list[Cell]:
    """A value and the ends of its interval."""
    return [shown(value) for value in (estimate.value, *estimate.bounds())]
