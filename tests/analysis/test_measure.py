"""Measures of an update: against a twin that forms every matrix, and on planted updates whose numbers are known."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.adapter.file import Adapter
from deltaw.analysis import measure as module
from deltaw.analysis.measure import Measures, in_order, measure, measure_adapter
from deltaw.analysis.summary import quantities, summarise
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.kernels.weight import DenseWeight, Weight
from deltaw.kinds import Dense, DoRA
from deltaw.linalg.subspace import random_overlap

SHAPES = [(12, 20), (20, 12), (9, 9), (1, 7), (7, 1), (1, 1)]


def matrix(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def update(m: int, n: int, r: int, scale: float = 0.1, seed: int = 1, dtype: torch.dtype = torch.float64) -> LowRank:
    return LowRank(matrix(r, n, seed, dtype), matrix(m, r, seed + 1, dtype), scale)


def outer(size: float, u_M: Tensor, v_N: Tensor) -> LowRank:
    return LowRank(v_N[None], u_M[:, None], size)


def with_spectrum(sigma: list[float], m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, U, V of the singular values given."""
    u, v = (torch.linalg.qr(matrix(d, len(sigma), d)).Q for d in (m, n))
    return (u * torch.tensor(sigma, dtype=u.dtype)) @ v.T, u, v


def same(one: Any, other: Any, rel: float = 1e-6, absolute: float = 1e-9) -> None:
    """Equal as JSON, numbers nearly."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key], rel, absolute)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            same(*pair, rel, absolute)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=rel, abs=absolute)
    else:
        assert one == other


def twin(delta: Tensor, w: Tensor) -> dict[str, Any]:
    """The docstring's formulas over dense matrices and full decompositions, for a ΔW of full or exact lower rank."""
    m, n = w.shape
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    s = s[s > 1e-12 * s[0]]
    p_K = s / s.sum()
    base_u, base_s, base_vt = torch.linalg.svd(w, full_matrices=False)
    tuned = w + delta
    tuned_u = torch.linalg.svd(tuned, full_matrices=False)[0][:, :10]
    p = min(64, max(1, min(m, n) // 10))
    energy = (s**2).cumsum(0) / (s**2).sum()
    k90 = int((energy < 0.9).sum()) + 1

    def amplification(k: int) -> dict[str, Any]:
        part = u[:, :k].T @ delta @ vt[:k].T
        on = u[:, :k].T @ w @ vt[:k].T
        factor = float(part.norm() / on.norm())
        norms = [float(x) for x in (part.norm(), on.norm(), base_s[:k].norm())]
        return dict(zip(("directions", "update", "on_update", "on_base", "factor"), [k, *norms, factor], strict=True))

    before, after = w.bfloat16(), tuned.bfloat16()
    cosines = (tuned_u.T @ base_u).abs().amax(1)
    return {
        "frobenius": float(delta.norm()),
        "two": float(s[0]),
        "numerical_rank": len(s),
        "effective_rank": float(torch.special.entr(p_K).sum().exp()),
        "stable_rank": float(delta.norm() ** 2 / s[0] ** 2),
        "energy_rank": k90,
        "base": {
            "frobenius": float(w.norm()),
            "relative": float(delta.norm() / w.norm()),
            "amplification": amplification(len(s)),
            "amplification_top": amplification(k90),
            "top_directions": p,
            "reads": float((delta @ base_vt[:p].T).norm() ** 2 / delta.norm() ** 2),
            "reads_random": p / n,
            "writes": float((base_u[:, :p].T @ delta).norm() ** 2 / delta.norm() ** 2),
            "writes_random": p / m,
            "intruders": int((cosines < 0.5).sum()),
            "outside": int(((cosines < 0.5) & ((base_u[:, :20].T @ tuned_u).square().sum(0) < 0.5)).sum()),
            "intruders_of": min(10, m, n),
            "intruders_exact": True,
            "cosines": cosines.tolist(),
            "magnitude_change": float(((tuned.norm(dim=1) - w.norm(dim=1)).abs() / w.norm(dim=1)).mean()),
            "direction_change": float((1 - torch.cosine_similarity(tuned, w, dim=1)).mean()),
            "merge_changed": float((before != after).double().mean()),
            "merge_kept": float(((after.double() - before.double()) * delta).sum() / delta.norm() ** 2),
            "merge_error": float((after.double() - before.double() - delta).norm() / delta.norm()),
        },
    }


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    r=st.integers(1, 12),
    s=st.sampled_from([-0.5, 0.01, 3.0]),
    seed=st.integers(0, 99),
)
def test_equals_the_dense_twin(m: int, n: int, r: int, s: float, seed: int) -> None:
    change, w = update(m, n, r, s, seed), matrix(m, n, seed + 7)
    got = measure(change, w).to_json()
    for name in ("amplification", "amplification_top"):
        chance, share = (got["base"][name].pop(key) for key in ("on_random", "percentile"))
        assert 0 <= share <= 1 and 0 < chance <= got["base"][name]["on_base"] * (1 + 1e-6)
    expected = twin(change.dense(), w)
    same({name: got[name] for name in expected}, expected)
    assert got["spectrum"] == pytest.approx(torch.linalg.svdvals(change.dense())[: min(m, n, r)].tolist(), abs=1e-9)
    assert (got["shape"], got["rank"], got["parameters"]) == ((m, n), r, r * (m + n))
    assert got["used"] == got["effective_rank"] / r


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_along_w_s_own_first_direction(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = matrix(*shape, dtype=dtype)
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    got = measure(outer(5.0, u[:, 0], vt[0]), w)
    assert got.numerical_rank == got.energy_rank == 1 and got.two == pytest.approx(5)
    assert got.base is not None
    for amplified in (got.base.amplification, got.base.amplification_top):
        assert amplified.factor == pytest.approx(5 / float(s[0]), rel=1e-5)
        assert amplified.on_update == pytest.approx(amplified.on_base, rel=1e-5)
    assert (got.base.reads, got.base.writes) == (pytest.approx(1, abs=1e-5), pytest.approx(1, abs=1e-5))
    assert (
        max(got.base.cosines) <= 1
        and got.base.intruders == 0
        and got.base.cosines == pytest.approx([1.0] * min(10, *shape), abs=1e-4)
    )


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (48, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exact", [module.EXACT, 16])
def test_one_large_new_direction_is_one_intruder(shape, dtype, exact: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "EXACT", exact)
    w, u, v = with_spectrum([2 * 0.9**i for i in range(48)], *shape)
    new_u, new_v = (x.sum(1) / 48**0.5 for x in (u, v))  # a cosine of 0.14 with each of them
    for size, count in ((100.0, 1), (0.01, 0)):
        got = measure(outer(size, new_u.to(dtype), new_v.to(dtype)), w.to(dtype)).base
        assert got is not None and (got.intruders, got.outside, got.intruders_of) == (count, count, 10)
        assert got.intruders_exact == (exact > 48)
    assert measure(outer(100.0, new_u.to(dtype), v[:, 3].to(dtype)), w.to(dtype)).base.intruders == 1  # type: ignore[union-attr]


def test_a_rotation_among_w_s_own_first_directions_is_an_intruder_that_is_not_outside() -> None:
    w, u, v = with_spectrum([1 - 0.001 * i for i in range(12)] + [0.1] * 36, 64, 48)
    u_M, v_N = (x[:, :12].sum(1) / 12**0.5 for x in (u, v))  # a cosine of 0.29 with each of the first
    got = measure(outer(0.5, u_M, v_N), w).base
    assert got is not None and got.intruders > got.outside == 0


def test_w_s_faintest_direction_is_no_intruder_when_amplified() -> None:
    """σ = 1e-5 σ₁ drowns in a float32 Gram matrix, whose own entries are rounded at 1e-7 σ₁²."""
    w, u, v = with_spectrum([10 ** (-5 * i / 29) for i in range(30)], 40, 30)
    for rows, u_M, v_N in ((w, u[:, -1], v[:, -1]), (w.T, v[:, -1], u[:, -1])):
        got = measure(outer(3.0, u_M.float(), v_N.float()), rows.float().contiguous()).base
        assert got is not None and got.intruders == 0 and min(got.cosines) > 0.99


def test_directions_that_w_lacks_are_intruders_and_its_own_null_space_is_not_counted() -> None:
    w, u, v = with_spectrum([3.0, 2.0, 1.0, 0.5], 12, 9)
    u, v = torch.linalg.qr(u, mode="complete").Q, torch.linalg.qr(v, mode="complete").Q
    inside = measure(outer(1.0, u[:, 0], v[:, 0]), w).base
    outside = measure(outer(1.5, u[:, 6], v[:, 6]), w).base
    assert inside is not None and (inside.intruders, inside.intruders_of) == (0, 4)
    assert outside is not None and (outside.intruders, outside.intruders_of) == (1, 5)
    assert outside.amplification.factor is None or outside.amplification.factor > 1e10
    nothing = measure(outer(1.0, u[:, 0], v[:, 0]), torch.zeros_like(w))
    assert nothing.base is not None and nothing.base.intruders == nothing.base.intruders_of == 1
    assert nothing.base.amplification.factor is None and nothing.base.relative == 0
    json.dumps(nothing.to_json(), allow_nan=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_how_the_factors_are_written_does_not_matter(shape: tuple[int, int]) -> None:
    change, w = update(*shape, 4), matrix(*shape)
    q = torch.linalg.qr(matrix(4, 4, 5)).Q
    expected = measure(change, w).to_json()
    same(measure(LowRank(q @ change.a_RN, change.b_MR @ q.T, change.scale), w).to_json(), expected)
    same(measure(LowRank(-0.1 * change.a_RN, change.b_MR, -10 * change.scale), w).to_json(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_and_its_factors_measure_the_same(shape: tuple[int, int]) -> None:
    change, w = update(*shape, 3), matrix(*shape)
    low, dense = measure(change, w).to_json(), measure(Dense(change.dense()), w).to_json()
    assert (dense.pop("rank"), dense.pop("parameters")) == (min(shape), shape[0] * shape[1])
    padded = low["spectrum"] + [0.0] * (len(dense["spectrum"]) - len(low["spectrum"]))
    used, low["spectrum"] = dense.pop("used"), padded
    assert used == pytest.approx(low["effective_rank"] / min(shape))
    same(dense, {name: value for name, value in low.items() if name not in ("rank", "parameters", "used")})


def test_scales_cancel_where_they_should() -> None:
    change, w = update(12, 20, 3), matrix(12, 20)
    one, ten = (measure(LowRank(change.a_RN, change.b_MR, c * change.scale), c * w) for c in (1.0, 1024.0))
    changed = {"frobenius", "two"}
    same(
        {k: v for k, v in quantities(ten).items() if k not in changed},
        {k: v for k, v in quantities(one).items() if k not in changed},
    )
    assert ten.frobenius == pytest.approx(1024 * one.frobenius) and ten.two == pytest.approx(1024 * one.two)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_update_is_zeros(shape: tuple[int, int], dtype: torch.dtype) -> None:
    zero = LowRank(matrix(2, shape[1], dtype=dtype), torch.zeros(shape[0], 2, dtype=dtype), 2.0)
    for change in (zero, Dense(torch.zeros(shape, dtype=dtype))):
        got = measure(change, matrix(*shape, dtype=dtype))
        assert got.base is not None and got.base.intruders == 0 and not any(got.spectrum)
        assert not any(quantities(got).values()) and got.base.amplification.factor == 0
        json.dumps(got.to_json(), allow_nan=False)


def test_random_directions_have_the_baseline_on_average() -> None:
    """Half of the random updates lie above chance, percentiles are spread evenly; p/N and p/M are means of what is read
    and written."""
    w = matrix(40, 60) * torch.linspace(0.1, 3, 60, dtype=torch.float64)
    drawn = [measure(update(40, 60, 3, seed=10 + 2 * seed), w, seed).base for seed in range(150)]
    there = [base for base in drawn if base]
    on = torch.tensor([base.amplification.on_update for base in there]).median()
    chance = torch.tensor([base.amplification.on_random for base in there]).mean()
    assert float(on) == pytest.approx(float(chance), rel=0.06)
    shares = torch.tensor([base.amplification.percentile for base in there])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.08)
    assert float(shares.std()) == pytest.approx(12**-0.5, abs=0.05)
    assert sum(base.reads for base in there) / 150 == pytest.approx(4 / 60, rel=0.1)
    assert sum(base.writes for base in there) / 150 == pytest.approx(4 / 40, rel=0.1)


def test_rows_by_hand() -> None:
    w = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    delta = torch.tensor([[3.0, 0.0], [2.0, -2.0], [1.0, 1.0], [0.0, 0.0]])  # doubled, turned by 90°, new, left alone
    base = measure(Dense(delta), w).base
    assert base is not None
    assert (base.magnitude_change, base.direction_change) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    small = measure(Dense(torch.tensor([[0.0, 1e-4]])), torch.tensor([[1.0, 0.0]])).base
    assert small is not None  # float32 has no number between 1 and 1 − 6e-8
    assert small.direction_change == pytest.approx(5e-9, rel=1e-3)
    assert small.magnitude_change == pytest.approx(5e-9, rel=1e-3)


def test_what_a_merge_keeps_by_hand() -> None:
    ones = torch.ones(4, 8)
    for size, changed, kept in ((1.0, 1.0, 1.0), (1e-4, 0.0, 0.0)):  # bfloat16 has 8 bits: 1.0001 is 1
        base = measure(outer(size, torch.ones(4), torch.ones(8)), ones).base
        assert base is not None and (base.merge_changed, base.merge_kept) == (changed, pytest.approx(kept))
        assert base.merge_error == pytest.approx(1 - kept)


@pytest.mark.parametrize(("share", "kept", "error"), [(0.01, 1.0, 0.17), (0.003, 0.93, 0.48), (1e-4, 0.07, 0.98)])
def test_rounding_is_noise_before_it_is_loss(share: float, kept: float, error: float) -> None:
    """A light update on a bfloat16 weight: much noise, and nearly all of it still there along ΔW."""
    w = (0.02 * matrix(256, 256)).bfloat16().float()
    change = LowRank(matrix(8, 256, 1).float(), matrix(256, 8, 2).float())
    got = measure(LowRank(change.a_RN, change.b_MR, share * float(w.norm() / change.dense().norm())), w)
    assert got.base is not None and got.base.merge_kept == pytest.approx(kept, abs=0.05)
    assert got.base.merge_error == pytest.approx(error, rel=0.3)
    assert summarise({"a": got})["merge_kept"] == pytest.approx(got.base.merge_kept)


def test_directions_of_w_are_far_from_chance_and_its_faint_ones_below() -> None:
    w, u, v = with_spectrum([2 * 0.9**i for i in range(48)], 64, 48)
    strong, faint = (measure(LowRank(v[:, part].T, u[:, part]), w).base for part in (slice(0, 4), slice(44, 48)))
    assert strong is not None and faint is not None
    assert strong.amplification.percentile == 1.0 and faint.amplification.percentile < 0.2
    assert strong.amplification.factor < strong.amplification.chance / 5
    assert faint.amplification.factor > faint.amplification.chance


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_chance_is_what_random_directions_of_w_itself_have(shape: tuple[int, int], k: int) -> None:
    """Through Σ alone or through all of W: the same quartiles. At k = 1 the median is well below the mean square."""
    w, _, _ = with_spectrum([0.9**i for i in range(40)], *shape)
    through = random_overlap(torch.linalg.svdvals(w), shape, float(w.norm()), k, 4000, 0)[:, -1]
    u, v = (torch.linalg.qr(torch.randn(4000, side, k, dtype=w.dtype)).Q for side in shape)
    direct = (u.mT @ w @ v).flatten(1).norm(dim=1)
    for share in (0.25, 0.5, 0.75):
        assert float(through.quantile(share)) == pytest.approx(float(direct.quantile(share)), rel=0.08)
    expected = k * float(w.norm()) / math.prod(shape) ** 0.5
    assert float(through.square().mean().sqrt()) == pytest.approx(expected, rel=0.06)
    if k == 1:
        assert 0.6 < float(through.median()) / expected < 0.72


def test_beyond_the_exact_size_the_sketch_agrees(monkeypatch) -> None:
    w, _, _ = with_spectrum([0.93**i for i in range(90)], 120, 90)
    change = update(120, 90, 4, 0.003)
    exact = measure(change, w).base
    monkeypatch.setattr(module, "EXACT", 32)
    monkeypatch.setattr(module, "SKETCH", 40)
    sketched = measure(change, w).base
    assert exact is not None and sketched is not None and exact.intruders_exact and not sketched.intruders_exact
    assert sketched.cosines == pytest.approx(exact.cosines, abs=1e-3)
    for name in ("reads", "writes", "relative", "merge_error"):
        assert getattr(sketched, name) == pytest.approx(getattr(exact, name), rel=1e-3)
    assert sketched.amplification.on_base == pytest.approx(exact.amplification.on_base, rel=1e-6)


def test_a_long_spectrum_is_cut() -> None:
    got = measure(Dense(matrix(300, 280)))
    assert len(got.spectrum) == 256 and got.numerical_rank == 280 and got.base is None


def test_dora_is_measured_as_what_it_does_to_w() -> None:
    w, low = matrix(6, 9), update(6, 9, 2)
    dora = DoRA(low, 2 * w.norm(dim=1))
    got, expected = measure(dora, w), measure(dora.relative_to(DenseWeight(w)), w)
    assert got.parameters == 2 * (6 + 9) + 6 and got.rank == 6
    same({**got.to_json(), "parameters": 0}, {**expected.to_json(), "parameters": 0})
    with pytest.raises(InputError, match="DoRA"):
        measure(dora)
    with pytest.raises(InputError, match="DoRA"):
        measure_adapter(Adapter(AdapterSpec(rank=2, alpha=2.0), {"q_proj": dora}), None)


class Weights(Mapping[str, Weight]):
    """Read when asked for; `read` tells which."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        self.shapes, self.read = shapes, set[str]()

    def __getitem__(self, path: str) -> Weight:
        self.read.add(path)
        return DenseWeight(matrix(*self.shapes[path], seed=len(path), dtype=torch.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


PATHS = {
    f"layers.{i}.{name}": shape for i in (10, 2, 0) for name, shape in (("up_proj", (30, 20)), ("q_proj", (20, 20)))
}


def adapter(paths: dict[str, tuple[int, int]] = PATHS) -> Adapter:
    factors = {path: update(*shape, 4, 0.25, seed, torch.float32) for seed, (path, shape) in enumerate(paths.items())}
    return Adapter(AdapterSpec(rank=4, alpha=1.0), factors)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_an_adapter_layer_by_layer(two_threads) -> None:
    weights, done, tuned = Weights({**PATHS, "lm_head": (99, 20)}), list[int](), adapter()
    got = measure_adapter(tuned, weights, progress=done.append)
    assert list(got) == in_order(PATHS) == [f"layers.{i}.{name}" for i in (0, 2, 10) for name in ("q_proj", "up_proj")]
    assert done == [1, 2, 3, 4, 5, 6] and weights.read == set(PATHS) and torch.get_num_threads() == 2
    torch.set_num_threads(1)  # as each module had: the numbers don't depend on the count
    for path, measured in got.items():
        assert measured == measure(tuned.factors[path], weights[path].dense(), crc32(path.encode()))
    assert {m.base for m in measure_adapter(tuned, None).values()} == {None}


def test_a_base_of_other_shapes_is_refused(two_threads) -> None:
    with pytest.raises(
        InputError, match=r"layers\.0\.q_proj: the update has shape \(20, 20\), the base's weight \(20, 21\)"
    ):
        measure_adapter(adapter(), Weights({**PATHS, "layers.0.q_proj": (20, 21)}))
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="shape"):
        measure(update(3, 4, 1), matrix(4, 3))


def test_the_model_s_totals_are_those_of_one_block_diagonal_matrix() -> None:
    tuned, weights = adapter(), Weights(PATHS)
    got = measure_adapter(tuned, weights)
    summary = summarise(got)
    delta = torch.block_diag(*(tuned.factors[path].dense() for path in got))
    w = torch.block_diag(*(weights[path].dense() for path in got))
    whole = measure(Dense(delta), w)
    assert summary["modules"] == 6 and summary["parameters"] == tuned.parameters and summary["zero"] == []
    assert summary["frobenius"] == pytest.approx(whole.frobenius, rel=1e-5)
    assert whole.base is not None
    for name in ("relative", "merge_error"):
        assert summary[name] == pytest.approx(getattr(whole.base, name), rel=1e-5)
    entries = sum(m * n for m, n in PATHS.values())
    assert summary["merge_changed"] == pytest.approx(whole.base.merge_changed * w.numel() / entries)
    assert (summary["intruders_of"], summary["intruders_exact"]) == (60, True)
    assert summary["intruders"] == sum(m.base.intruders for m in got.values() if m.base)
    ranks = {path: m.effective_rank for path, m in got.items()}
    assert summary["largest"]["effective_rank"] == {
        "module": max(ranks, key=ranks.__getitem__),
        "value": max(ranks.values()),
    }
    assert summary["smallest"]["effective_rank"]["value"] == min(ranks.values())
    assert summary["median"]["effective_rank"] == pytest.approx(sum(sorted(ranks.values())[2:4]) / 2)
    assert summary.keys() >= {"median", "largest", "smallest"} and set(summary["median"]) == set(
        quantities(got["layers.0.q_proj"])
    )
    json.dumps(summary, allow_nan=False)


def test_summaries_without_a_base_and_with_a_module_that_learnt_nothing() -> None:
    still = LowRank(matrix(2, 5, dtype=torch.float32), torch.zeros(4, 2), 1.0)
    summary = summarise({"a": measure(still), "b": measure(update(4, 5, 2))})
    assert summary["zero"] == ["a"] and "relative" not in summary and "amplification" not in summary["median"]
    assert summary["smallest"]["frobenius"] == {"module": "a", "value": 0.0}
    with pytest.raises(ValueError, match="no modules"):
        summarise({})


def test_it_goes_into_json_and_back() -> None:
    got: Measures = measure(update(6, 8, 2), matrix(6, 8))
    there = json.loads(json.dumps(got.to_json(), allow_nan=False))
    same(there, {**got.to_json(), "shape": [6, 8]})
