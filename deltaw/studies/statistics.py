"""All that a study's rule may conclude from: one number per seed, an interval, a bound.

An `Estimate` is a quantity that a rule asks about, with what is known of its noise:

    Paired       one number per seed, most often the difference of two trainings with the same seed (same rows, same
                 order): x̄ ± t(1 − α, n − 1) s / √n. Of log ratios, if sizes are what is compared
    Quotient     two numbers per seed, a and b, and the question is ā / b̄: every θ that Student's test of a − θ b
                 doesn't reject (Fieller 1954). Unbounded where b̄ can't be told from zero
    Resampled    a bootstrap's draws, over passages or rows: their quantiles
    Exact        a computation that has no noise: identities, counts of one fixed thing

Modules and layers of one training share its seed, so they are never counted as if they were independent: a study takes
their mean first. Seeds that choose a learning rate are other ones than those that are compared (`tune`).

A `Criterion` wants the quantity above a bound ("better by more than δ"), below one (non-inferiority: no worse than by
δ), or between two (equivalence). With one-sided bounds at α = 5 %:

    held            the whole interval lies on the side that was asked for
    did not hold    the whole interval lies on the other side
    not settled     a bound lies within the interval: a tie is no evidence, for or against

A rule holds if all of its k criteria do, so each may be tested at α: that all of them err together is rarer (Berger
1982, intersection-union). It doesn't hold if one of them doesn't, and any may be the one that errs; so that is tested
at α / k, at half of it where there are bounds on both sides. Either way a wrong verdict comes in at most 5 % of
studies, which tests/studies/test_statistics.py counts on redrawn noise.

Power: `detectable` is how far beyond its bound the true value must lie for an 80 % chance of "held", at the noise that
was measured. With n values of deviation s it is δ s / √n, where δ solves P(T' > t) = 0.8 for T' with the noncentral t
distribution: P(T' > t) = E[Φ(δ − t √(u / ν))], u ~ χ²(ν), here by quadrature.

Rejected: twice the standard deviation of three seeds as a margin (18 % false alarms: t is 4.3 there); bootstrapping
five seeds (their 5 % quantile is about one of the five); p values (a bound that matters is asked about, not zero).

Letters: ν degrees of freedom, n seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal, Protocol

import numpy as np

from deltaw.analysis.page import number
from deltaw.evaluation.intervals import t_quantile

ALPHA, POWER = 0.05, 0.8
TUNED_WITH, TESTED_WITH = 100, (0, 1, 2, 3, 4)  # seeds
Verdict = Literal["held", "did not hold", "not settled", "void"]
UNKNOWN = (-math.inf, math.inf)


class Estimate(Protocol):
    """A quantity and its noise."""

    @property
    def value(self) -> float: ...

    def bounds(self, alpha: float = ALPHA) -> tuple[float, float]:
        """The true value lies below the first with a chance of `alpha`, and above the second with another."""

    @property
    def error(self) -> float:
        """How far beyond a bound the truth must lie for "held" at `POWER`."""


@dataclass(frozen=True)
class Paired:
    """A number per seed."""

    values: tuple[float, ...]

    @property
    def value(self) -> float:
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """s, of one value; NaN where nothing is known of it."""
        known = len(self.values) > 1 and all(map(math.isfinite, self.values))
        return float(np.std(self.values, ddof=1)) if known else math.nan

    def bounds(self, alpha: float = ALPHA) -> tuple[float, float]:
        if math.isnan(self.deviation):
            return UNKNOWN  # a training that diverged settles nothing
        half = _student(len(self.values) - 1, alpha) * self.deviation / math.sqrt(len(self.values))
        return self.value - half, self.value + half

    @property
    def error(self) -> float:
        if math.isnan(self.deviation):
            return math.inf
        return _noncentral(len(self.values) - 1) * self.deviation / math.sqrt(len(self.values))


@dataclass(frozen=True)
class Quotient:
    """ā / b̄ of a pair (a, b) per seed."""

    tops: tuple[float, ...]
    bottoms: tuple[float, ...]

    @property
    def value(self) -> float:
        return sum(self.tops) / sum(self.bottoms) if sum(self.bottoms) else math.nan

    def bounds(self, alpha: float = ALPHA) -> tuple[float, float]:
        n = len(self.tops)
        if n < 2 or not all(map(math.isfinite, self.tops + self.bottoms)):
            return UNKNOWN
        (aa, ab), (_, bb) = np.cov(self.tops, self.bottoms)
        share, a, b = _student(n - 1, alpha) ** 2 / n, sum(self.tops) / n, sum(self.bottoms) / n
        square, middle, rest = b * b - share * bb, a * b - share * ab, a * a - share * aa
        if square <= 0:
            return UNKNOWN
        half = math.sqrt(max(0.0, middle * middle - square * rest))
        return (middle - half) / square, (middle + half) / square

    @property
    def error(self) -> float:
        b = sum(self.bottoms) / len(self.bottoms)
        around = tuple((top - self.value * low) / b for top, low in zip(self.tops, self.bottoms, strict=True))
        return Paired(around).error


@dataclass(frozen=True)
class Resampled:
    """A bootstrap's draws of a quantity whose value on all rows is `value`."""

    value: float
    draws: tuple[float, ...]

    def bounds(self, alpha: float = ALPHA) -> tuple[float, float]:
        if not all(map(math.isfinite, self.draws)):
            return UNKNOWN
        low, high = np.quantile(self.draws, [alpha, 1 - alpha])
        return float(low), float(high)

    @property
    def error(self) -> float:
        return 2.486 * float(np.std(self.draws))  # z(0.95) + z(0.8)


@dataclass(frozen=True)
class Exact:
    """Without noise."""

    value: float

    def bounds(self, alpha: float = ALPHA) -> tuple[float, float]:
        return self.value, self.value

    @property
    def error(self) -> float:
        return 0.0


def estimate_of(raw: Mapping[str, Any]) -> Estimate:
    """An estimate as a record has it: its kind and its numbers, null where one isn't finite."""
    kinds: Mapping[str, Any] = {kind.__name__: kind for kind in (Paired, Quotient, Resampled, Exact)}
    fields = {name: _stored(value) for name, value in raw.items() if name != "kind"}
    estimate: Estimate = kinds[raw["kind"]](**fields)
    return estimate


@dataclass(frozen=True)
class Finding:
    """A criterion and what was found. `low`, `high`: one-sided bounds at 5 %; `detectable`: how far beyond its bound
    the truth would have had to lie to be found in four of five such studies."""

    quantity: str
    verdict: Verdict
    value: float
    low: float
    high: float
    detectable: float
    estimate: Estimate

    def to_json(self) -> dict[str, Any]:
        kind = {"kind": type(self.estimate).__name__}
        return {**vars(self), "estimate": {**kind, **asdict(self.estimate)}}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Criterion:
    """`quantity` must lie above `above` and below `below`. `is_log`: it is a natural logarithm, and is shown as a
    ratio; the bounds are logarithms, too."""

    quantity: str
    above: float | None = None
    below: float | None = None
    is_log: bool = False

    def __post_init__(self) -> None:
        if self.above is None and self.below is None:
            raise ValueError(f"no bound on {self.quantity}")

    @property
    def words(self) -> str:
        """What must hold, in words."""
        ends = [
            f"{side} {self.shown(bound)}"
            for side, bound in (("above", self.above), ("below", self.below))
            if bound is not None
        ]
        return f"{self.quantity} lies {' and '.join(ends)}"

    def shown(self, value: float) -> str:
        """A value of the quantity as it is written: a ratio of a logarithm."""
        return number(math.exp(min(value, 700)) if self.is_log else value)

    def find(self, estimate: Estimate, among: int = 1) -> Finding:
        """Apply it; `among` so many criteria of one rule."""
        above, below = (
            (-math.inf if self.above is None else self.above),
            (math.inf if self.below is None else self.below),
        )
        low, high = estimate.bounds(ALPHA)
        sides = (self.above is not None) + (self.below is not None)
        surely_low, surely_high = estimate.bounds(ALPHA / among / sides)
        if low > above and high < below:
            verdict: Verdict = "held"
        elif surely_high < above or surely_low > below:
            verdict = "did not hold"
        else:
            verdict = "not settled"
        return Finding(self.quantity, verdict, estimate.value, low, high, estimate.error, estimate)


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """A rule's, from its criteria's."""
    if "did not hold" in verdicts:
        return "did not hold"
    return "held" if verdicts and set(verdicts) == {"held"} else "not settled"


def differences(one: Mapping[int, float], other: Mapping[int, float]) -> Paired:
    """one − other, by seed."""
    return Paired(tuple(one[seed] - other[seed] for seed in _shared(one, other)))


def log_ratios(one: Mapping[int, float], other: Mapping[int, float]) -> Paired:
    """log(one / other), by seed."""
    return Paired(tuple(_log(one[seed]) - _log(other[seed]) for seed in _shared(one, other)))


@dataclass(frozen=True)
class Tuned:
    """A learning rate and the losses, by rate, that chose it."""

    rate: float
    losses: Mapping[float, float]

    @property
    def is_interior(self) -> bool:
        """Whether a lower and a higher rate were tried, and were worse. If not, the best may lie beyond the grid."""
        return min(self.losses) < self.rate < max(self.losses)

    def to_json(self) -> dict[str, Any]:
        losses = {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in sorted(self.losses.items())}
        return {"rate": self.rate, "interior": self.is_interior, "losses": losses}


def tune(
    losses_of: Callable[[Sequence[float]], Mapping[float, float]], rates: Sequence[float], extra: int = 3
) -> Tuned:
    """The rate with the lowest loss, on the tuning seed. `losses_of` trains some rates. If the best is the first or the
    last of the grid, that grows on that side by its own factor, `extra` times at most."""
    losses = {rate: _or_infinite(loss) for rate, loss in losses_of(rates).items()}
    factor = sorted(rates)[1] / sorted(rates)[0]
    for _ in range(extra):
        tuned = Tuned(min(losses, key=lambda rate: losses[rate]), losses)
        if tuned.is_interior:
            break
        beyond = float(f"{tuned.rate * (factor if tuned.rate == max(losses) else 1 / factor):.4g}")
        losses |= {rate: _or_infinite(loss) for rate, loss in losses_of([beyond]).items()}
    return Tuned(min(losses, key=lambda rate: losses[rate]), losses)


def valley(losses: Mapping[float, float]) -> float:
    """log of the rate where a parabola of log loss over log rate, fitted to all of them, is lowest; NaN if it has no
    such point."""
    if len(losses) < 3 or not all(math.isfinite(loss) and loss > 0 for loss in losses.values()):
        return math.nan
    x = np.log(list(losses))
    curve, slope, _ = np.polyfit(x - x.mean(), np.log(list(losses.values())), 2)
    return float(x.mean() - slope / (2 * curve)) if curve > 0 else math.nan


@cache
def _student(freedom: int, alpha: float) -> float:
    return t_quantile(freedom, 1 - alpha)


@cache
def _noncentral(freedom: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """δ of the module's docstring."""
    t, half = _student(freedom, alpha), freedom / 2
    u = (np.arange(1000) + 0.5) / 1000 * (freedom + 12 * math.sqrt(2 * freedom) + 12)
    weight = np.exp((half - 1) * np.log(u) - u / 2)
    weight /= weight.sum()
    scaled = t * np.sqrt(u / freedom)
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        chance = sum(w * (1 + math.erf((middle - s) / math.sqrt(2))) / 2 for w, s in zip(weight, scaled, strict=True))
        low, high = (middle, high) if chance < power else (low, middle)
    return high


def _stored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_stored(one) for one in value)
    return math.nan if value is None else value


def _shared(one: Mapping[int, float], other: Mapping[int, float]) -> list[int]:
    return sorted(one.keys() & other.keys())


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _or_infinite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
