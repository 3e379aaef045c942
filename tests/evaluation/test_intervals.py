"""Intervals and tests against closed forms, enumeration, and the rates at which they must be right."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.evaluation.intervals import EXACT, Scores, compare, interval, mcnemar, permutation


def binary(points: list[int] | np.ndarray) -> Scores:
    return Scores(np.stack([np.asarray(points, float), np.ones(len(points))], 1))


def rates(pairs: list[tuple[float, float]]) -> Scores:
    return Scores(np.array(pairs, float))


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [(0, 0, 1), (1, 0, 1), (5, 0, 2 / 32), (6, 0, 2 / 64), (1, 7, 2 * 9 / 256), (4, 4, 1), (2, 10, 2 * 79 / 4096)],
)
def test_mcnemar_on_tables_that_can_be_counted(b: int, c: int, p: float) -> None:
    assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(p, rel=1e-12)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=9))
def test_mcnemar_is_the_permutation_test_of_zeros_and_ones(rows: list[tuple[int, int]]) -> None:
    one, other = (binary([row[side] for row in rows]) for side in (0, 1))
    b, c = sum(x > y for x, y in rows), sum(y > x for x, y in rows)
    assert mcnemar(b, c) == pytest.approx(permutation(one, other, seed=0))


def test_mcnemar_of_many_rows_is_what_the_normal_law_says() -> None:
    b, c = 5200, 4800
    z = (abs(b - c) - 1) / math.sqrt(b + c)
    assert mcnemar(b, c) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=5e-3)


row = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9))  # points of either side, weight


@settings(max_examples=30)
@given(st.lists(row, min_size=1, max_size=7))
def test_few_rows_are_exchanged_in_every_way(rows: list[tuple[int, int, int]]) -> None:
    one, other = rates([(p, w) for p, _, w in rows]), rates([(q, w) for _, q, w in rows])
    total = sum(w for _, _, w in rows)
    seen = abs(sum(q - p for p, q, _ in rows))
    ways = [abs(sum(s * (q - p) for s, (p, q, _) in zip(signs, rows, strict=True)))
            for signs in product((1, -1), repeat=len(rows))]  # fmt: skip
    assert permutation(one, other, seed=1) == pytest.approx(sum(way >= seen for way in ways) / len(ways))
    difference = compare(one, other, higher_is_better=False, seed=1)
    assert difference.value == pytest.approx(sum(q - p for p, q, _ in rows) / total)


def test_random_exchanges_come_near_to_all_of_them() -> None:
    random = np.random.default_rng(3)
    one = rates([(x, 1) for x in random.normal(size=EXACT)])
    other = Scores(one.stats_NK + np.array([[1, 0]]) * random.normal(0.4, 1, (EXACT, 1)))
    exact = permutation(one, other, seed=0)
    # A row that differs by nothing that counts: more rows than are enumerated, the same p.
    longer = [Scores(np.vstack([side.stats_NK, [[tiny, 0]]])) for side, tiny in ((one, 0.0), (other, 1e-13))]
    assert permutation(longer[0], longer[1], seed=0) == pytest.approx(exact, abs=0.02)


def test_an_interval_holds_the_truth_95_times_in_100() -> None:
    """Every outcome of 100 Bernoulli rows of 0.3, each as often as it comes: no sample of them, so no luck."""
    covered = 0.0
    for right in range(12, 51):
        low, high = _ends(binary([1] * right + [0] * (100 - right)), right)
        covered += math.comb(100, right) * 0.3**right * 0.7 ** (100 - right) * (low <= 0.3 <= high)
    assert 0.935 < covered < 0.965


def test_an_interval_is_as_wide_as_the_normal_law_says() -> None:
    low, high = _ends(binary([1] * 600 + [0] * 400), 0)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 1000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06) and (high + low) / 2 == pytest.approx(0.6, abs=0.003)


def test_a_test_finds_nothing_where_there_is_nothing() -> None:
    """Of sides that are alike, at most 1 in 20 is called more than noise."""
    random, called = np.random.default_rng(1), 0
    for seed in range(60):
        one, other = (rates([(x, 1) for x in random.normal(size=40)]) for _ in range(2))
        called += not compare(one, other, higher_is_better=True, seed=seed).is_noise
    assert called / 60 < 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / 60)


def test_pairing_tells_what_two_intervals_cannot() -> None:
    random = np.random.default_rng(2)
    hard = random.normal(0, 10, 200)
    one = rates([(x, 1) for x in hard])
    other = rates([(x + 0.5 + e, 1) for x, e in zip(hard, random.normal(0, 1, 200), strict=True)])
    apart = [_ends(side, 0) for side in (one, other)]
    assert apart[0][1] > apart[1][0]  # they overlap
    difference = compare(one, other, higher_is_better=True, seed=0)
    assert difference.better == "adapter" and difference.low is not None and difference.low > 0
    assert compare(one, other, higher_is_better=False, seed=0).better == "base"


def test_none_right_is_not_surely_none() -> None:
    low, high = _ends(binary([0] * 20), 0)
    assert low == 0 and (1 - high) ** 20 == pytest.approx(0.025)
    assert _ends(binary([1] * 20), 0) == pytest.approx((1 - high, 1))
    same = compare(binary([0] * 20), binary([0] * 20), higher_is_better=True, seed=0)
    assert same.p == 1 and same.low == -same.high == pytest.approx(-high)
    every = compare(binary([0] * 20), binary([1] * 20), higher_is_better=True, seed=0)
    assert every.high == 1 and 0.5 < every.low < 1 and every.better == "adapter"


def test_one_row_has_no_interval_and_seeds_repeat() -> None:
    assert interval(rates([(3, 4)]), 0).low is None
    scores = rates([(k, 2 + k % 3) for k in range(30)])
    assert interval(scores, 5) == interval(scores, 5) != interval(scores, 6)
    with pytest.raises(ValueError, match="no rows"):
        interval(Scores(np.zeros((0, 2))), 0)


def _ends(scores: Scores, seed: int) -> tuple[float, float]:
    found = interval(scores, seed)
    assert found.low is not None and found.high is not None
    return found.low, found.high


@pytest.mark.parametrize(("rows", "too_few"), [(1, True), (5, True), (6, False), (40, False)])
def test_a_change_that_no_such_number_of_rows_could_prove_is_not_called_noise(rows: int, too_few: bool) -> None:
    wrong, right = (Scores(np.tile([float(points), 1.0], (rows, 1))) for points in (0, 1))
    all_changed = compare(wrong, right, higher_is_better=True, seed=0)
    assert all_changed.is_too_few == too_few == (all_changed.better is None)
    assert (all_changed.words() == compare(wrong, wrong, higher_is_better=True, seed=0).words()) == too_few
