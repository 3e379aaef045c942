"""Estimates as pictures and tables take them."""

from collections.abc import Callable, Mapping, Sequence

from deltaw.analysis.page import Cell
from deltaw.studies.statistics import Estimate, Paired

Band = tuple[Sequence[float], Sequence[float | None], Sequence[float | None]]


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
