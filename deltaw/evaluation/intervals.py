"""How sure a figure is, and whether two figures differ by more than chance would have them differ.

A metric says of each row a few numbers that add up (points and weight; counts of n-grams), and its figure is a function
of their sums. All that is done here is done to rows as wholes, so it holds for every such metric:

    interval     bootstrap (Efron 1979): draw N of the N rows with replacement, `RESAMPLES` times; the middle 95 % of
                 the figures that come of it. Of the difference: the same rows are drawn for both sides (paired)
    McNemar      for scores of 0 and 1: b rows that only one side has right, c that only the other has. If the sides
                 were alike each would be a fair coin: p = min(1, 2 Σ_{k ≤ min(b, c)} C(b + c, k) / 2^(b + c)), exactly
    permutation  for all others: if the sides were alike, a row's two scores could as well change places. p is the
                 share of such exchanges whose difference is at least as large as the one seen: of all 2^m of them where
                 m ≤ `EXACT` rows differ, else of `EXCHANGES` random ones and the one seen

A bootstrap of rows that all have the same score gives an interval of no width, which is no news of other rows. For
scores of 0 and 1 the exact bound is taken there instead (Clopper & Pearson 1934): 0 of n rows right still leaves
1 − 0.025^(1/n). Other scores that are all alike keep the interval of no width, and a single row has none.

Rejected: the normal approximation and the standard error (an error rate is a ratio, and few rows are few), BCa (on
hundreds of rows it moves the ends by less than the rounding of the table), scipy (three formulas).

Letters: N rows, K numbers per row, B resamples, M rows that differ.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES, EXCHANGES, EXACT = 2000, 10_000, 12
LEVEL, NOISE = 0.95, 0.05  # of intervals; p below which a difference is called more than noise
AT_ONCE = 4_000_000  # cells of a matrix of resamples by rows
Array = np.ndarray[Any, Any]
Figure = Callable[[Array], Array]  # sums [..., K] -> figures [...]


def ratio(sums: Array) -> Array:
    """Σ points / Σ weight, the weight counted as 1 at least (evaluation/metrics.py)."""
    return np.asarray(sums[..., 0] / np.maximum(1.0, sums[..., 1]))


@dataclass(frozen=True, eq=False)
class Scores:
    """stats_NK: what each row adds; `figure`: of their sums."""

    stats_NK: Array
    figure: Figure = ratio

    @property
    def value(self) -> float:
        return float(self.figure(self.stats_NK.sum(0)))

    @property
    def of_rows(self) -> list[float]:
        """Each row's score by itself."""
        return [float(value) for value in self.figure(self.stats_NK)]

    @property
    def is_binary(self) -> bool:
        """Whether each row is simply right or wrong."""
        points, weight = self.stats_NK[:, 0], self.stats_NK[:, -1]
        return self.figure is ratio and bool(np.isin(points, (0.0, 1.0)).all() and (weight == 1).all())


@dataclass(frozen=True)
class Interval:
    """A figure and where it would lie on other rows like these, 95 times in 100; None where that can't be told."""

    value: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Difference(Interval):
    """Adapter less base. `p`: how often chance alone gives one as large; `test`: by which test."""

    p: float
    test: str
    higher_is_better: bool

    @property
    def is_noise(self) -> bool:
        """Whether chance may have made it."""
        return self.p >= NOISE

    @property
    def better(self) -> str | None:
        """The side that is better, None where that is no more than noise."""
        return None if self.is_noise else "adapter" if (self.value > 0) == self.higher_is_better else "base"

    def words(self) -> str:
        """What to make of it."""
        if self.is_noise:
            return "no more than noise"
        return f"{'better' if self.better == 'adapter' else 'worse'}, more than noise"

    def to_json(self) -> dict[str, Any]:
        more = {"p": self.p, "test": self.test, "more_than_noise": not self.is_noise, "better": self.better}
        return {**super().to_json(), **more, "words": self.words()}


def interval(scores: Scores, seed: int) -> Interval:
    """Raises ValueError for no rows."""
    n = len(scores.stats_NK)
    if n and scores.is_binary and (exact := _all_alike(scores.stats_NK[:, 0])) is not None:
        return Interval(scores.value, *exact)
    return Interval(scores.value, *_middle(lambda counts_BN: scores.figure(counts_BN @ scores.stats_NK), n, seed))


def compare(base: Scores, adapter: Scores, *, higher_is_better: bool, seed: int) -> Difference:
    """The adapter beside its base on the same rows, in the same order. Raises ValueError for no rows."""
    n = len(base.stats_NK)
    if base.is_binary and adapter.is_binary:
        gain_N = adapter.stats_NK[:, 0] - base.stats_NK[:, 0]
        p, test = mcnemar(int((gain_N > 0).sum()), int((gain_N < 0).sum())), "exact McNemar"
        ends = _all_gain_alike(gain_N)
    else:
        p, test, ends = permutation(base, adapter, seed), "paired permutation", None
    low, high = ends or (None, None)
    if ends is None:

        def differences(counts_BN: Array) -> Array:
            return adapter.figure(counts_BN @ adapter.stats_NK) - base.figure(counts_BN @ base.stats_NK)

        low, high = _middle(differences, n, seed)
    return Difference(adapter.value - base.value, low, high, p, test, higher_is_better)


def mcnemar(b: int, c: int) -> float:
    """p of b rows that only one side has right and c that only the other has; two-sided, exact."""
    n, ways, tail = b + c, 1, 1  # ways: C(n, k)
    for k in range(min(b, c)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def permutation(one: Scores, other: Scores, seed: int) -> float:
    """p that exchanging each row's two scores at will gives as large a difference; two-sided."""
    gain_NK = other.stats_NK - one.stats_NK
    gain_MK = gain_NK[(gain_NK != 0).any(1)]
    m, sums, figure = len(gain_MK), (one.stats_NK.sum(0), other.stats_NK.sum(0)), one.figure

    def differences(swaps_BM: Array) -> Array:
        moved = swaps_BM @ gain_MK
        return np.abs(figure(sums[1] - moved) - figure(sums[0] + moved))

    seen = abs(other.value - one.value)
    enough = seen - 1e-9 * max(seen, 1e-9)  # sums in another order round otherwise
    if m <= EXACT:
        every = (np.arange(2**m)[:, None] >> np.arange(m)) & 1
        return float((differences(every.astype(float)) >= enough).mean())
    random, larger = _generator(seed, "exchanges"), 0
    for count in _parts(EXCHANGES, m):
        swaps_BM = random.integers(0, 2, (count, m)).astype(float)
        larger += int((differences(swaps_BM) >= enough).sum())
    return (larger + 1) / (EXCHANGES + 1)


def _middle(figures: Callable[[Array], Array], n: int, seed: int) -> tuple[float | None, float | None]:
    """The middle 95 % of what `figures` makes of how often each of n rows was drawn."""
    if n == 0:
        raise ValueError("no rows")
    if n == 1:
        return None, None
    random, values = _generator(seed, "resamples"), []
    for count in _parts(RESAMPLES, n):
        drawn_BN = random.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        counts_BN = np.bincount(drawn_BN.ravel(), minlength=count * n).reshape(count, n)
        values.append(figures(counts_BN.astype(float)))
    low, high = np.quantile(np.concatenate(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _all_alike(points_N: Array) -> tuple[float, float] | None:
    """The exact bounds of a share where all rows are right, or none is; None where some are."""
    right, n = points_N.sum(), len(points_N)
    least = ((1 - LEVEL) / 2) ** (1 / n)
    return (0.0, 1 - least) if right == 0 else (least, 1.0) if right == n else None


def _all_gain_alike(gain_N: Array) -> tuple[float, float] | None:
    """The same of a difference: no row changes, or all change one way. At least a share `least` of rows is like
    these, and the others may be anything."""
    least = ((1 - LEVEL) / 2) ** (1 / len(gain_N))
    first = float(gain_N[0])
    if (gain_N != first).any():
        return None
    return max(-1.0, first * least - (1 - least)), min(1.0, first * least + (1 - least))


def _parts(total: int, rows: int) -> list[int]:
    """`total` in runs whose matrices are small."""
    size = max(1, AT_ONCE // max(1, rows))
    return [min(size, total - begun) for begun in range(0, total, size)]


def _generator(seed: int, purpose: str) -> np.random.Generator:
    digest = hashlib.blake2b(purpose.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "big")])


def paired_t(differences: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of differences between pairs, with Student's interval at `level`. Raises ValueError for fewer than two:
    one says nothing of how they vary."""
    n = len(differences)
    if n < 2:
        raise ValueError(f"an interval of {n} differences")
    mean = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    half = t_quantile(n - 1, (1 + level) / 2) * spread / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def t_quantile(freedom: int, p: float) -> float:
    """t with P(T ≤ t) = p, for p ≥ 1/2 and whole degrees of freedom, by bisection on its distribution."""
    low, high = 0.0, 1.0
    while t_below(freedom, high) < p and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_below(freedom, middle) < p else (low, middle)
    return high


def t_below(freedom: int, t: float) -> float:
    """P(T ≤ t), t ≥ 0. With θ = atan(t / √n) the share between −t and t is a finite sum (Abramowitz & Stegun 26.7.3-4):

    n odd     2/π (θ + sin θ (cos θ + 2/3 cos³ θ + … + (2·4…(n−3)) / (3·5…(n−2)) cosⁿ⁻² θ))
    n even    sin θ (1 + 1/2 cos² θ + (1·3)/(2·4) cos⁴ θ + … + (1·3…(n−3)) / (2·4…(n−2)) cosⁿ⁻² θ)
    """
    angle = math.atan2(t, math.sqrt(freedom))
    cos, odd = math.cos(angle), freedom % 2
    term = cos if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cos * cos
        total += term
    inside = math.sin(angle) * total
    return 0.5 + (2 / math.pi * (angle + inside) if odd else inside) / 2
