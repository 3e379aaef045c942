"""A picture that most studies have: each arm's mean over the seeds, with its interval, and every seed in a table."""

from collections.abc import Mapping

from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.studies.statistics import Paired


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
