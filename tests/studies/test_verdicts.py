"""The rules of the model studies on planted numbers, and whole studies on trainings that are made up to hold or not."""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltaw.adapter.file import Adapter
from deltaw.analysis.measure import Measures, measure, measure_adapter
from deltaw.analysis.page import Page, Section, render
from deltaw.config import AdapterSpec
from deltaw.factors import LowRank
from deltaw.kernels.weight import DenseWeight, Weight
from deltaw.kinds import Dense
from deltaw.show.progress import Display
from deltaw.studies import amp, forget, fullrank, intruder, phi
from deltaw.studies.forget import Noise, Point
from deltaw.studies.intruder import Spot
from deltaw.studies.lab import RATES, Lab
from deltaw.studies.study import Outcome, majority
from deltaw.updates import Update

M, N = 96, 112
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
PATHS = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in KINDS]

Make = Callable[[Any, int, Mapping[str, Any]], Any]  # (adapter, seed, changes) -> a trial


def basis(d: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed))).Q


class MadeUp:
    """A lab whose trainings are made, not run."""

    seeds, full = (0,), False
    display = Display(quiet=True)
    task = {"train": {"steps": 8}}  # noqa: RUF012

    def __init__(self, make: Make, weights: Mapping[str, Weight] | None = None) -> None:
        self.make, self.weights = make, weights

    def train(self, name: str, *, seed: int = 0, adapter: Any = None, **changes: Any) -> Any:
        return self.make(adapter, seed, changes)

    def sweep(self, adapter: Any, *, seed: int = 0) -> dict[float, Any]:
        share = 0.1 if adapter == "full" else 1.0
        return {rate * share: self.make(adapter, seed, {"lr": rate * share}) for rate in RATES}

    def measured(self, name: str, adapter: Adapter) -> dict[str, Measures]:
        return measure_adapter(adapter, self.weights)


def study(module: Any, make: Make, weights: Mapping[str, Weight] | None = None) -> Outcome:
    outcome: Outcome = module.run(cast(Lab, MadeUp(make, weights)))
    assert outcome.blocks and render(Page("Study", "", [Section("Results", outcome.blocks)]))
    return outcome


def trial(factors: Mapping[str, Update] | None = None, loss: float = 1.0, rise: float = 0.0, kl: float = 0.1) -> Any:
    adapter = Adapter(AdapterSpec(), factors or {})
    lost = {"loss_before": 3.0, "loss_after": 3.0 + rise, "kl": kl}
    return SimpleNamespace(loss=loss, forgetting=lost, adapter=lambda: adapter)


# Counts


@pytest.mark.parametrize(
    ("count", "of", "said"), [(61, 100, True), (60, 100, None), (40, 100, None), (39, 100, False), (0, 0, None)]
)
def test_a_majority_is_clear_two_deviations_from_a_half(count: int, of: int, said: bool | None) -> None:
    assert majority(count, of) is said


# phi


@pytest.mark.parametrize(
    ("above", "top", "rest", "said"),
    [
        (90, 0.7, 0.1, "held"),
        (90, 0.7, 0.4, "did not hold"),  # the rest is shared, too
        (10, 0.2, 0.01, "did not hold"),
        (55, 0.5, 0.1, "too noisy"),
    ],
)
def test_phi_wants_the_top_shared_and_the_rest_not(above: int, top: float, rest: float, said: str) -> None:
    assert phi.verdict([0.8] * above + [0.2] * (100 - above), top, rest) == said


def reading(shared: int) -> Make:
    """Updates whose first `shared` directions are one for all trainings, at falling strength; the others are chance."""

    def make(adapter: Any, seed: int, changes: Mapping[str, Any]) -> Any:
        rank, factors = adapter["rank"], {}
        for number, path in enumerate(PATHS):
            own = basis(N, N, 1000 * number + 10 * rank + seed + 1)[:, : rank - min(shared, rank)]
            v_NR = torch.linalg.qr(torch.cat([basis(N, N, number)[:, : min(shared, rank)], own], 1)).Q
            u_MR = basis(M, rank, number + 77 * rank + seed)
            factors[path] = LowRank(torch.linspace(3, 1, rank)[:, None] * v_NR.T, u_MR)
        return trial(factors)

    return make


def test_phi_holds_where_one_direction_is_shared() -> None:
    outcome = study(phi, reading(1))
    assert outcome.verdict == "held" and outcome.figures["above"] == len(PATHS)
    medians = outcome.figures["medians"]
    assert medians["ranks 16 and 64"]["right_phi_1"] == pytest.approx(1, abs=1e-4)
    assert abs(medians["random matrices"]["right_excess_last"]) < 0.05
    # A alone has the same right directions here: the left factor is orthonormal.
    assert medians["ranks 16 and 64, of A alone"]["right_phi_1"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shared", [0, 16])
def test_phi_does_not_hold_where_none_or_all_are(shared: int) -> None:
    assert study(phi, reading(shared)).verdict == "did not hold"


# amp


def row(on_update: float, factor: float) -> amp.Row:
    """Random directions hold 1 of W, its own 10."""
    return amp.Row(1, on_update, 10, 1, factor, 1, 1, factor)


@pytest.mark.parametrize(
    ("on_update", "factors", "said"),
    [
        ([2, 2], (20, 2), "held"),
        ([2, 2], (2, 20), "did not hold"),  # rises
        ([2, 0.5], (20, 2), "did not hold"),  # W is avoided at one rank
        ([2, 20], (20, 2), "did not hold"),  # more than W has anywhere
    ],
)
def test_amp_wants_a_fall_and_w_between_chance_and_its_own(
    on_update: list[float], factors: tuple[float, float], said: str
) -> None:
    by_rank = [{(0, str(n)): row(on, f) for n in range(20)} for on, f in zip(on_update, factors, strict=True)]
    assert amp.verdict(by_rank) == said


def test_amp_is_too_noisy_where_w_has_what_chance_gives() -> None:
    low = {(0, str(n)): row(2, 20) for n in range(20)}
    high = {(0, str(n)): row(0.9 + 0.2 * (n % 2), 2) for n in range(20)}
    assert amp.verdict([low, high]) == "too noisy"


def test_amp_reads_table_7_off_a_planted_update() -> None:
    u_MK, v_NK, sigma_K = basis(M, M, 1), basis(N, M, 2), torch.linspace(9, 1, M)
    w_MN = (u_MK * sigma_K) @ v_NK.T
    update = LowRank(v_NK[:, [40]].T, u_MK[:, [40]], 5 * float(sigma_K[40]))
    base = measure(update, w_MN).base
    assert base is not None
    found = amp.row_of(base, 0.5)
    assert found.factor == pytest.approx(5, rel=1e-4) and found.on_update == pytest.approx(float(sigma_K[40]), rel=1e-4)
    assert found.on_base == pytest.approx(9, rel=1e-4)
    assert found.random_factor == pytest.approx(found.update / 0.5)


def test_random_directions_hold_k_root_mean_squares() -> None:
    w_MN, generator = torch.randn(M, N), torch.Generator().manual_seed(0)
    drawn = [amp.on_random(w_MN, 8, generator) for _ in range(50)]
    mean_square = sum(x**2 for x in drawn) / len(drawn)
    assert math.sqrt(mean_square) == pytest.approx(8 * float(w_MN.norm()) / math.sqrt(M * N), rel=0.05)


def amplified(first: int) -> Make:
    """Updates in W's directions from number `first` on, of one size at every rank."""

    def make(adapter: Any, seed: int, changes: Mapping[str, Any]) -> Any:
        rank, factors = adapter["rank"], {}
        for number, path in enumerate(PATHS):
            u_MR, v_NR = (basis(d, M, number)[:, first : first + rank] for d in (M, N))
            factors[path] = LowRank(v_NR.T, u_MR, 10 / math.sqrt(rank))
        return trial(factors, loss=changes["lr"])

    return make


def test_amp_holds_where_w_has_some_of_it() -> None:
    dense = {p: (basis(M, M, n) * torch.linspace(9, 1, M)) @ basis(N, M, n).T for n, p in enumerate(PATHS)}
    weights = {path: DenseWeight(w_MN) for path, w_MN in dense.items()}
    outcome = study(amp, amplified(20), weights)
    assert outcome.verdict == "held", outcome.because
    assert outcome.figures["rows"]["1"]["factor"] == pytest.approx(10 / float(torch.linspace(9, 1, M)[20]), rel=1e-3)
    assert outcome.figures["rows"]["1"]["lr"] == RATES[0]  # the best, as `loss` is made
    assert study(amp, amplified(0), weights).verdict == "did not hold"  # W's own: none is below


# fullrank


@pytest.mark.parametrize(
    ("lora", "short", "long", "said"),
    [(4, 80, 100, "held"), (4, 30, 40, "did not hold"), (4, 100, 80, "did not hold"), (0, 0, 0, "did not hold")],
)
def test_fullrank_wants_ten_times_and_growth(lora: int, short: int, long: int, said: str) -> None:
    assert fullrank.verdict([lora] * 20, [short] * 20, [long] * 20) == said


def test_fullrank_is_too_noisy_where_half_of_the_modules_grow() -> None:
    assert fullrank.verdict([4] * 20, [80] * 20, [79, 81] * 10) == "too noisy"


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (1, 7)])
def test_singular_values_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    x_MN = torch.randn(shape) * 1e-4
    found = fullrank.singular_values(Dense(x_MN))
    torch.testing.assert_close(found, torch.linalg.svdvals(x_MN.double()), rtol=1e-6, atol=1e-12)
    low = LowRank(torch.randn(3, shape[1]), torch.randn(shape[0], 3), -0.5)
    expected = torch.linalg.svdvals(low.dense().double())[: min(3, *shape)]
    torch.testing.assert_close(fullrank.singular_values(low), expected, rtol=1e-4, atol=1e-6)


def growing(slope: Callable[[int], float]) -> Make:
    """Full fine-tuning with σ_i = slope(steps) ** i; LoRA with a single direction."""

    def make(adapter: Any, seed: int, changes: Mapping[str, Any]) -> Any:
        if adapter != "full":
            return trial({path: LowRank(torch.randn(1, N), torch.randn(M, 1)) for path in PATHS})
        sigma_M = slope(changes["steps"]) ** torch.arange(M)
        return trial({p: Dense((basis(M, M, n) * sigma_M) @ basis(N, M, n).T) for n, p in enumerate(PATHS)})

    return make


def test_fullrank_on_spectra_that_flatten_or_steepen() -> None:
    outcome = study(fullrank, growing(lambda steps: 1 - 0.2 / steps))
    assert outcome.verdict == "held" and outcome.figures["grows"] == len(PATHS)
    assert list(outcome.figures["medians"]) == ["LoRA rank 16", "full, 2 steps", "full, 4 steps", "full, 8 steps"]
    assert study(fullrank, growing(lambda steps: 1 - 0.003 * steps)).verdict == "did not hold"


# forget

CURVE = [Point(1e-4, 4.0, 0.0, 0.001), Point(1e-3, 2.0, 0.2, 0.1), Point(1e-2, 3.0, 0.8, 10.0)]


def test_a_sweep_reaches_a_loss_first_on_its_way_down() -> None:
    assert forget.crossing([4, 2, 3], 3) == (0, 0.5)
    assert forget.crossing([4, 2, 3], 2) == (0, 1.0)
    assert forget.crossing([4, 4, 3], 4) == (0, 0.0)
    assert forget.crossing([4, 2, 3], 4.1) is None and forget.crossing([2], 2) is None
    found = forget.at_loss(CURVE, 3.0)
    assert found is not None
    assert found == pytest.approx((10**-3.5, 3.0, 0.1, 0.01))


@given(st.lists(st.floats(0.5, 9), min_size=2, max_size=6, unique=True))
def test_a_sweep_goes_through_its_points(losses: list[float]) -> None:
    points = [Point(10.0 ** (n - 4), loss, 0.1 * n, 0.01 * (n + 1)) for n, loss in enumerate(losses)]
    first, least = points[0], min(points, key=lambda point: point.loss)
    assert forget.at_loss(points, first.loss) == pytest.approx(first)
    assert forget.at_loss(points, least.loss) == pytest.approx(least)
    assert forget.at_loss(points, max(losses) + 0.1) is None


def test_two_sweeps_meet_at_the_worse_of_their_bests() -> None:
    worse = [Point(1e-5, 5.0, 0.0, 0.01), Point(1e-4, 3.0, 0.5, 1.0)]
    found = forget.at_best(CURVE, worse)
    assert found is not None
    assert found[0].loss == found[1].loss == 3.0 and found[1] == pytest.approx(worse[1])
    assert found[0].kl == pytest.approx(0.01)
    assert forget.at_best(CURVE, [Point(1e-5, 6.0, 0, 1), Point(1e-4, 5.0, 0, 1)]) is None


def gap(kl: float, rise: float) -> tuple[Point, Point]:
    """LoRA against a full fine-tuning with a KL of 1 and a rise of 0.5."""
    return Point(1e-3, 1, 0.5 + rise, kl), Point(1e-4, 1, 0.5, 1)


@pytest.mark.parametrize(
    ("matched", "said"),
    [
        ([gap(0.5, -0.1), gap(0.4, -0.2)], "held"),
        ([gap(0.5, -0.1), gap(0.8, -0.2)], "too noisy"),  # exp(−2√2 · 0.1) = 0.75
        ([gap(0.5, -0.1), gap(0.5, 0.01)], "too noisy"),  # the rise is higher, by less than seeds make
        ([gap(0.5, -0.1), gap(2.0, -0.1)], "did not hold"),
        ([gap(0.5, -0.1), gap(0.5, 0.1)], "did not hold"),
        ([gap(0.5, -0.1), None], "too noisy"),
        ([None, None], "too noisy"),
    ],
)
def test_forget_wants_less_by_more_than_seeds_make(matched: list[Any], said: str) -> None:
    assert forget.verdict(matched, Noise(rise=0.01, log_kl=0.1)) == said


def forgetful(times: float) -> Make:
    """The loss falls with the rate; LoRA forgets `times` what full fine-tuning does at a loss; seeds make 1 %."""

    def make(adapter: Any, seed: int, changes: Mapping[str, Any]) -> Any:
        rate = changes.get("lr", 3e-3) * (10 if adapter == "full" else 1)
        kl = 100 * rate * (1 if adapter == "full" else times) * 1.01**seed
        return trial(loss=1 / (100 * rate), rise=kl / 10, kl=kl)

    return make


@pytest.mark.parametrize(("times", "said"), [(0.5, "held"), (2.0, "did not hold"), (1.0, "too noisy")])
def test_forget_on_made_up_sweeps(times: float, said: str) -> None:
    outcome = study(forget, forgetful(times))
    assert outcome.verdict == said
    matched = outcome.figures["matched"]["rank 16"]
    assert matched["lora"]["kl"] / matched["full"]["kl"] == pytest.approx(times)


# intruder


@pytest.mark.parametrize(
    ("x", "y", "rho"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 400], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 2, 4, 3], 0.8),
        ([1, 2, 3, 4], [0, 0, 1, 2], 0.9 / math.sqrt(0.9)),  # a tie: ranks 1.5, 1.5, 3, 4
        ([1, 2, 3, 4], [0, 0, 0, 0], 0.0),
    ],
)
def test_spearman(x: list[float], y: list[float], rho: float) -> None:
    assert intruder.spearman(x, y) == pytest.approx(rho)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=8))
def test_spearman_sees_only_the_order(pairs: list[tuple[int, int]]) -> None:
    x, y = zip(*pairs, strict=True)
    rho = intruder.spearman(x, y)
    assert -1 - 1e-9 <= rho <= 1 + 1e-9
    assert intruder.spearman(y, x) == pytest.approx(rho)
    assert intruder.spearman([math.exp(value) for value in x], y) == pytest.approx(rho)
    assert intruder.spearman([-value for value in x], y) == pytest.approx(-rho, abs=1e-12)


def test_epsilon_is_the_first_with_enough_intruders() -> None:
    assert intruder.threshold({0.5: 0, 0.7: 5, 0.9: 80}) == 0.7
    assert intruder.threshold({0.5: 5, 0.7: 9}) == 0.5
    assert intruder.threshold({0.5: 0, 0.7: 4.9}) is None


@pytest.mark.parametrize(
    ("epsilon", "rhos", "matched", "said"),
    [
        (0.5, [0.9, 1.0], [(20, 0), (30, 2)], "held"),
        (0.5, [0.7, 1.0], [(20, 0), (30, 2)], "did not hold"),
        (0.5, [0.9, 1.0], [(20, 0), (30, 30)], "did not hold"),
        (0.5, [0.9, 1.0], [(20, 0), (30, 25)], "too noisy"),
        (None, [0.9, 1.0], [(4, 0), (4, 0)], "too noisy"),
        (0.5, [0.9, 1.0], [(20, 0), None], "too noisy"),
    ],
)
def test_intruder_wants_a_rise_and_more_than_full(
    epsilon: float | None, rhos: list[float], matched: list[Any], said: str
) -> None:
    assert intruder.verdict(epsilon, rhos, matched) == said


def test_counts_are_compared_at_one_task_loss() -> None:
    lora = [Spot(1e-3, 4.0, 0, {0.5: 0}), Spot(1e-2, 2.0, 0, {0.5: 10})]
    full = [Spot(1e-4, 5.0, 0, {0.5: 1}), Spot(1e-3, 3.0, 0, {0.5: 2})]
    assert intruder.at_best(lora, full, 0.5) == pytest.approx((5, 2))
    assert intruder.at_best(lora, [Spot(1e-4, 6.0, 0, {0.5: 1}), Spot(1e-3, 5.0, 0, {0.5: 2})], 0.5) is None


def strong(size: Callable[[float], float]) -> Make:
    """LoRA adds a new direction, stronger than W's own, to `size(rate)` modules; full fine-tuning scales W."""

    def make(adapter: Any, seed: int, changes: Mapping[str, Any]) -> Any:
        rate = changes["lr"]
        if adapter == "full":
            return trial({path: Dense(rate * torch.eye(M)[:, :12]) for path in PATHS}, loss=0.01 / rate, kl=rate)
        u_MR, v_NR = basis(M, 1, 5), basis(12, 1, 6)
        factors = {
            path: LowRank(v_NR.T, u_MR, 9.0 if number < size(rate) else 1e-3) for number, path in enumerate(PATHS)
        }
        return trial(factors, loss=0.1 / rate, kl=rate)

    return make


def test_intruder_on_made_up_sweeps() -> None:
    weights = {path: DenseWeight(torch.eye(M)[:, :12] * torch.linspace(4, 1, 12)) for path in PATHS}
    outcome = study(intruder, strong(lambda rate: 1200 * rate), weights)
    assert outcome.verdict == "held", outcome.because
    assert outcome.figures["epsilon"] == 0.5
    assert [spot["counts"]["0.5"] for spot in outcome.figures["sweeps"]["rank 1"]] == [1, 2, 4, 12]
    assert study(intruder, strong(lambda rate: 0.012 / rate), weights).verdict == "did not hold"
    assert study(intruder, strong(lambda rate: 0), weights).verdict == "too noisy"
