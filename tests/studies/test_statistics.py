"""The statistics that verdicts rest on: intervals that cover, rules that err in one study of twenty at most, power that
is what it is said to be, all counted on redrawn noise."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.studies.statistics import (
    ALPHA,
    POWER,
    Criterion,
    Exact,
    Paired,
    Quotient,
    Resampled,
    Tuned,
    Verdict,
    differences,
    log_ratios,
    together,
    tune,
    valley,
)
from deltaw.studies.study import NAMES, Outcome, Rule, find_study, judge, nothing_learnt

RECORDS = Path(__file__).parents[2] / "benchmarks" / "studies"
DRAWS = 1000
MOST = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / DRAWS)  # what DRAWS coins of 5 % stay below


def measured_noise() -> np.ndarray:
    """Noise of one seed as the records have it; normal where there are few.

    A residual divided by the deviation of its own five numbers is never beyond 1.8, whatever the noise. Times a
    deviation drawn anew (χ of n − 1 degrees of freedom, which doesn't depend on such residuals where noise is normal)
    it is normal where the noise is. With both signs: which arm of a pair is taken from which is a matter of writing,
    and a few dozen numbers lean to one side by chance.
    """
    random, pool, known = np.random.default_rng(0), [], 0
    for file in sorted(RECORDS.glob("*.json")):
        for finding in json.loads(file.read_text(encoding="utf-8")).get("findings", []):
            values = np.array(finding["estimate"].get("values", []), float)
            if len(values) > 2 and np.isfinite(values).all() and values.std() > 0:
                residuals = (values - values.mean()) / values.std(ddof=1)
                fresh = np.sqrt(random.chisquare(len(values) - 1, (2000, 1)) / (len(values) - 1))
                pool += [(residuals * fresh).ravel(), (-residuals * fresh).ravel()]
                known += len(values)
    return np.concatenate(pool) if known >= 30 else random.normal(size=100_000)


NOISE = measured_noise()


def rule_of(*criteria: Criterion) -> Rule:
    return Rule("x", "", "", "", "", criteria, "", "")


def verdicts(rule: Rule, truth: Mapping[str, float], deviation: float, noise: np.ndarray = NOISE) -> list[Verdict]:
    """Of many studies with this truth, each with five seeds of redrawn noise."""
    random = np.random.default_rng(1)
    drawn = random.choice(noise, (DRAWS, len(rule.criteria), 5)) * deviation
    found = []
    for study in drawn:
        estimates = {
            c.quantity: Paired(tuple(truth[c.quantity] + each)) for c, each in zip(rule.criteria, study, strict=True)
        }
        found.append(judge(rule, Outcome(estimates, [], {})).verdict)
    return found


def ends(criterion: Criterion) -> list[float]:
    return [bound for bound in (criterion.above, criterion.below) if bound is not None]


SHAPES = {
    tuple((c.above is not None, c.below is not None) for c in find_study(name).RULE.criteria): name for name in NAMES
}


@pytest.mark.parametrize("name", SHAPES.values())
def test_a_rule_errs_in_one_study_of_twenty_at_most(name: str) -> None:
    """Rules of one shape err alike, whatever their margins: one of each shape is taken. Noise is small beside the room
    between two bounds, where both sides of a rule can err as often as they ever do."""
    rule: Rule = find_study(name).RULE
    size = 0.01 * min(
        (abs(c.below - c.above) for c in rule.criteria if c.above is not None and c.below is not None), default=1
    )
    inside = {c.quantity: (sum(ends(c)) / 2 if len(ends(c)) == 2 else _beyond(c)) for c in rule.criteria}
    at_bound = {c.quantity: ends(c)[0] for c in rule.criteria}
    for criterion in rule.criteria[:1]:  # one only just fails, the others hold clearly
        truth = {**inside, criterion.quantity: ends(criterion)[0]}
        assert verdicts(rule, truth, size).count("held") / DRAWS <= MOST
    assert verdicts(rule, at_bound, size).count("did not hold") / DRAWS <= MOST  # all only just hold


def _beyond(criterion: Criterion) -> float:
    return criterion.above + 100 if criterion.above is not None else (criterion.below or 0.0) - 100


@pytest.mark.parametrize("seeds", [3, 5])
def test_what_is_said_to_be_detectable_is_detected_four_times_in_five(seeds: int) -> None:
    random = np.random.default_rng(2)
    error = Paired(tuple(random.normal(size=100_000))).deviation * _unit_error(seeds)
    criterion = Criterion("x", above=0.0)
    found = [criterion.find(Paired(tuple(random.normal(error, 1, seeds)))).verdict for _ in range(DRAWS)]
    assert found.count("held") / DRAWS == pytest.approx(POWER, abs=0.035)


def _unit_error(seeds: int) -> float:
    """Paired.error of `seeds` values whose deviation is 1."""
    values = np.arange(seeds) - (seeds - 1) / 2
    return Paired(tuple(values / values.std(ddof=1))).error


def test_the_margin_of_old_erred_three_times_as_often() -> None:
    """2√2 s with s of three seeds: what this room replaced."""
    random = np.random.default_rng(3)
    spread = random.normal(size=(DRAWS, 3)).std(1, ddof=1)
    apart = random.normal(size=DRAWS) - random.normal(size=DRAWS)
    assert (np.abs(apart) > 2 * math.sqrt(2) * spread).mean() > 0.13


def test_a_quotients_interval_covers() -> None:
    random, missed = np.random.default_rng(4), 0
    for _ in range(DRAWS):
        tops, bottoms = random.normal(3, 0.5, 5), random.normal(2, 0.3, 5)
        low, high = Quotient(tuple(tops), tuple(bottoms)).bounds()
        missed += not low <= 1.5 <= high
    assert missed / DRAWS <= 2 * MOST


def test_a_quotient_of_what_may_be_zero_is_not_bounded() -> None:
    assert Quotient((1.0, 1.1, 0.9), (0.1, -0.2, 0.15)).bounds() == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.1, 0.11, 0.12, 0.1, 0.11), "held"),
        ((-0.1, -0.11, -0.12, -0.1, -0.11), "did not hold"),
        ((0.1, -0.1, 0.05, -0.05, 0.01), "not settled"),
        ((0.1, 0.1, math.inf, 0.1, 0.1), "not settled"),  # one diverged
        ((0.1, 0.1, math.nan, 0.1, 0.1), "not settled"),
        ((5.0,), "not settled"),  # one seed
        ((), "not settled"),
    ],
)
def test_an_interval_decides_and_a_tie_does_not(values: tuple[float, ...], verdict: str) -> None:
    assert Criterion("x", above=0.0).find(Paired(values)).verdict == verdict


def test_non_inferiority_and_equivalence() -> None:
    near = Paired((0.01, 0.02, 0.0, 0.01, 0.015))
    assert Criterion("x", below=0.05).find(near).verdict == "held"
    assert Criterion("x", below=0.012).find(near).verdict == "not settled"
    assert Criterion("x", above=-0.05, below=0.05).find(near).verdict == "held"
    assert Criterion("x", above=0.05, below=0.1).find(near).verdict == "did not hold"
    assert Criterion("x", below=1e-12).find(Exact(1e-13)).verdict == "held"
    draws = tuple(np.random.default_rng(0).normal(1, 0.1, 2000))
    assert Criterion("x", above=0.7).find(Resampled(1.0, draws)).verdict == "held"
    with pytest.raises(ValueError, match="bound"):
        Criterion("x")


def test_a_rule_holds_if_all_of_it_does() -> None:
    assert together(["held", "held"]) == "held"
    assert together(["held", "not settled"]) == "not settled"
    assert together(["not settled", "did not hold"]) == "did not hold"


def test_a_rate_at_the_grids_end_settles_nothing_and_void_is_said_first() -> None:
    rule, sure = rule_of(Criterion("x", above=0.0)), {"x": Paired((1.0, 1.1, 1.0, 1.2, 1.1))}
    end, inside = Tuned(1.0, {1.0: 0.1, 2.0: 0.2, 4.0: 0.3}), Tuned(2.0, {1.0: 0.2, 2.0: 0.1, 4.0: 0.3})
    assert judge(rule, Outcome(sure, [], {}, {"arm": inside})).verdict == "held"
    assert judge(rule, Outcome(sure, [], {}, {"arm": end})).verdict == "not settled"
    assert judge(rule, Outcome(sure, [], {}, {"arm": end}, void="nothing was learnt")).verdict == "void"
    assert nothing_learnt(1.0, 4.0) is None and nothing_learnt(3.0, 4.0) and nothing_learnt(math.nan, 4.0)


@given(st.floats(1e-4, 1.0), st.sampled_from([2.0, 3.0]))
def test_tuning_goes_on_until_the_best_rate_has_neighbours(least: float, factor: float) -> None:
    asked: list[float] = []

    def losses(rates):  # type: ignore[no-untyped-def]
        asked.extend(rates)
        return {rate: math.log(rate / least) ** 2 for rate in rates}

    tuned = tune(losses, (0.01, 0.01 * factor, 0.01 * factor**2), extra=20)
    assert tuned.is_interior and len(asked) == len(set(asked)) == len(tuned.losses)
    assert abs(math.log(tuned.rate / least)) <= math.log(factor) / 2 + 1e-3
    assert not tune(losses, (10.0, 20.0), extra=0).is_interior


def test_a_rate_that_diverges_is_never_the_best() -> None:
    assert tune(lambda rates: {rate: math.nan if rate > 2 else 1 / rate for rate in rates}, (1.0, 2.0, 4.0)).rate == 2.0


@given(st.floats(1e-4, 1e-1), st.floats(0.05, 2))
def test_a_valleys_least_point(least: float, curve: float) -> None:
    losses = {least * 2.0**k: math.exp(curve * (k * math.log(2)) ** 2) for k in (-1, 0, 1)}
    assert valley(losses) == pytest.approx(math.log(least), abs=1e-6)
    assert math.isnan(valley({rate: 1 / loss for rate, loss in losses.items()}))


def test_pairs_are_of_one_seed_each() -> None:
    one, other = {0: 2.0, 1: 4.0, 2: 8.0}, {1: 2.0, 0: 2.0, 7: 1.0}
    assert differences(one, other).values == (0.0, 2.0)
    assert log_ratios(one, other).values == pytest.approx((0.0, math.log(2)))


def test_a_rules_hash_is_of_all_of_it() -> None:
    rule: Rule = find_study("rank").RULE
    assert rule.hash == dataclasses.replace(rule).hash
    for change in (
        {"criteria": (Criterion(rule.criteria[0].quantity, below=0.06, is_log=True),)},
        {"seeds": (0, 1, 2)},
        {"design": {**rule.design, "steps": 151}},
        {"void": "never"},
        {"exploratory": True},
    ):
        assert dataclasses.replace(rule, **change).hash != rule.hash  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_says_all_that_a_reader_needs(name: str) -> None:
    rule: Rule = find_study(name).RULE
    assert all((rule.claim, rule.source, rule.definition, rule.void, rule.change, rule.design))
    assert rule.tuned_with not in rule.seeds and len(set(rule.seeds)) >= 5
    assert len({c.quantity for c in rule.criteria}) == len(rule.criteria)
    assert json.loads(json.dumps(rule.to_json()))["hash"] == rule.hash
