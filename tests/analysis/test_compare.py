"""Comparing two adapters: planted pairs whose likeness is known, and twins over the dense matrices."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.adapter.file import Adapter, BaseId
from deltaw.analysis.compare import Comparison, compare, compare_updates
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.kinds import Dense, DoRA
from deltaw.updates import Update

sizes = st.integers(1, 12)


def update(m: int, n: int, r: int, scale: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((r, n), (m, r)))
    return LowRank(a, b, scale)


def basis(d: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def adapter(factors: dict[str, Update], base: BaseId | None = None) -> Adapter:
    return Adapter(AdapterSpec(rank=3, alpha=3.0), factors, base or BaseId())


def several(seed: int, rank: int = 3) -> dict[str, Update]:
    shapes = {"q_proj": (20, 30), "up_proj": (40, 20)}
    paths = {f"layers.{i}.{kind}": shape for i in (10, 9) for kind, shape in shapes.items()}
    return {path: update(*shape, rank, 0.5, seed + k, torch.float32) for k, (path, shape) in enumerate(paths.items())}


def strict(comparison: Comparison) -> dict:
    return json.loads(json.dumps(comparison.to_json(), allow_nan=False))


@settings(deadline=None, max_examples=60)
@given(m=sizes, n=sizes, r=sizes, q=sizes, s=st.floats(-2, 2), seed=st.integers(0, 99))
def test_inner_product_is_the_dense_one(m: int, n: int, r: int, q: int, s: float, seed: int) -> None:
    one, other = update(m, n, r, s, seed), update(m, n, q, 1.5, seed + 1)
    expected = pytest.approx(float((one.dense() * other.dense()).sum()), rel=1e-9, abs=1e-9)
    for a in (one, Dense(one.dense())):
        for b in (other, Dense(other.dense())):
            assert a.inner(b) == expected and b.inner(a) == expected


def test_inner_products_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        update(3, 4, 1).inner(update(4, 3, 1))


@settings(deadline=None, max_examples=40)
@given(m=st.integers(2, 12), n=st.integers(2, 12), r=st.integers(1, 5), q=st.integers(1, 5), seed=st.integers(0, 99))
def test_equals_the_dense_twin(m: int, n: int, r: int, q: int, seed: int) -> None:
    one, other = update(m, n, r, -0.7, seed), update(m, n, q, 1.5, seed + 1)
    got, (x, y) = compare_updates(one, other), (one.dense(), other.dense())
    i, j = min(m, n, r), min(m, n, q)
    assert (
        got.shape == (m, n)
        and got.ranks == (r, q)
        and got.frobenius == pytest.approx((float(x.norm()), float(y.norm())))
    )
    assert got.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-12)
    assert got.distance == pytest.approx(float((x - y).norm() / x.norm()))
    bases = [torch.linalg.svd(matrix, full_matrices=False) for matrix in (x, y)]
    sides = ((got.left, bases[0][0], bases[1][0], m), (got.right, bases[0][2].T, bases[1][2].T, n))
    for side, u, v, d in sides:
        assert side.phi_IJ.shape == side.excess_IJ.shape == (i, j)
        for a in range(1, i + 1):
            for b in range(1, j + 1):
                phi = float((u[:, :a].T @ v[:, :b]).square().sum()) / min(a, b)
                assert float(side.phi_IJ[a - 1, b - 1]) == pytest.approx(phi, abs=1e-6)
                assert float(side.excess_IJ[a - 1, b - 1]) == pytest.approx(phi - max(a, b) / d, abs=1e-6)
        assert side.cosines == pytest.approx(torch.linalg.svdvals(u[:, :i].T @ v[:, :j]).tolist(), abs=1e-6)
        assert list(side.pairs) == [name for name, least in (("1", 1), ("4", 4), ("last", 1)) if min(i, j) >= least]


def test_an_adapter_and_itself_and_its_opposite() -> None:
    one = adapter(several(0))
    opposite = adapter({path: -change for path, change in one.factors.items() if isinstance(change, LowRank)})
    for other, cosine, distance in ((one, 1.0, 0.0), (opposite, -1.0, 2.0)):
        got = compare(one, other)
        assert (got.cosine, got.distance) == (pytest.approx(cosine), pytest.approx(distance, abs=1e-12))
        for module in got.modules.values():
            assert (module.cosine, module.distance) == (pytest.approx(cosine), pytest.approx(distance, abs=1e-12))
            for side in (module.right, module.left):
                assert side.phi_IJ.diagonal().tolist() == pytest.approx([1.0] * 3)
                assert side.cosines == pytest.approx([1.0] * 3) and float(side.phi_IJ.max()) <= 1
        assert [got.medians[name] for name in ("right_phi_last", "left_phi_1")] == pytest.approx([1.0, 1.0])
        assert got.medians["right_excess_1"] == pytest.approx(1 - (1 / 30 + 1 / 20) / 2)


def test_random_adapters_have_the_baseline() -> None:
    one, other = (adapter({f"{i}.k": update(30, 50, 4, seed=seed + i) for i in range(60)}) for seed in (0, 1000))
    got = compare(one, other)
    kind = got.kinds["k"]
    for side in (kind["right"], kind["left"]):
        assert float(side.excess_IJ.abs().max()) < 0.025 < float(side.phi_IJ[3, 3]) - 0.04
    assert abs(got.cosine or 1) < 0.02 and got.distance == pytest.approx(2**0.5, rel=0.05)


def test_an_update_and_its_best_approximation() -> None:
    sigma = torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    full = LowRank(basis(15, 4, 1).T, basis(12, 4, 2) * sigma)
    got = compare_updates(full, full.truncate(1))
    assert got.ranks == (4, 1) and got.cosine == pytest.approx(4 / 5) and got.distance == pytest.approx(3 / 5)
    assert got.right.phi_IJ.shape == (4, 1) and got.right.phi_IJ.flatten().tolist() == pytest.approx([1.0] * 4)
    assert got.right.pairs["last"]["excess"] == pytest.approx(1 - 1 / 15)
    assert got.left.pairs["last"]["excess"] == pytest.approx(1 - 1 / 12)


def test_one_subspace_on_the_right_none_on_the_left() -> None:
    a, b = basis(15, 3, 1), basis(12, 6, 2)
    got = compare_updates(LowRank(a.T, b[:, :3]), LowRank(a.flip(1).T, b[:, 3:] * 2))
    assert float(got.right.phi_IJ[2, 2]) == pytest.approx(1) and got.right.cosines == pytest.approx([1.0] * 3)
    assert float(got.left.phi_IJ.abs().max()) == pytest.approx(0, abs=1e-12) and got.cosine == pytest.approx(
        0, abs=1e-12
    )
    assert got.distance == pytest.approx(5**0.5)


def test_how_the_factors_are_written_does_not_matter() -> None:
    one, other, q = update(9, 14, 4), update(9, 14, 4, seed=3), basis(4, 4, 5)
    turned = LowRank(q @ one.a_RN, one.b_MR @ q.T, one.scale)
    for got in (compare_updates(turned, other), compare_updates(Dense(one.dense()), other)):
        expected = compare_updates(one, other)
        torch.testing.assert_close(got.right.phi_IJ, expected.right.phi_IJ)
        torch.testing.assert_close(got.left.excess_IJ, expected.left.excess_IJ)
        assert (got.inner, got.distance) == (pytest.approx(expected.inner), pytest.approx(expected.distance))


def test_a_small_distance_is_found_to_full_precision() -> None:
    one, step = update(9, 14, 2), update(9, 14, 1, 1e-9, seed=3)
    got = compare_updates(one, one + step)
    assert got.distance == pytest.approx(float(step.dense().norm() / one.dense().norm()), rel=1e-5)


def test_at_most_64_directions_are_compared() -> None:
    got = compare_updates(update(90, 80, 70), update(90, 80, 66, seed=3))
    assert got.right.phi_IJ.shape == (64, 64) and len(got.left.cosines) == 64


def test_an_update_of_nought() -> None:
    zero = LowRank(torch.randn(3, 30), torch.zeros(20, 3), 1.0)
    one, other = adapter(several(0)), adapter({**several(9), "layers.9.q_proj": zero})
    for first, second in ((one, other), (other, one), (other, other)):
        got = compare(first, second)
        module = got.modules["layers.9.q_proj"]
        assert module.cosine is None and module.right.pairs == {} and module.left.cosines == []
        assert (module.distance is None) == (first is other)
        assert set(got.kinds) == {"q_proj", "up_proj"} and got.medians["cosine"] is not None
        torch.testing.assert_close(got.kinds["q_proj"]["left"].phi_IJ, got.modules["layers.10.q_proj"].left.phi_IJ)
        assert not any(strict(got)["modules"]["layers.9.q_proj"]["right"]["phi"])
    nothing = compare(adapter({"a": zero}), adapter({"a": zero}))
    assert (nothing.cosine, nothing.distance, nothing.kinds) == (None, None, {})
    assert nothing.medians == {"cosine": None, "distance": None} and strict(nothing)


def test_the_whole_model_is_one_long_vector() -> None:
    one, other = several(0), several(50, rank=2)
    got = compare(adapter(one), adapter(other))
    x, y = (torch.cat([f[path].dense().flatten() for path in got.modules]).double() for f in (one, other))  # type: ignore[union-attr]
    assert got.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-5)
    assert got.distance == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)


def test_kinds_are_means_over_the_directions_that_all_have() -> None:
    one = {"0.q": update(8, 9, 3), "1.q": update(8, 9, 2, seed=1), "0.up": update(9, 8, 1, seed=2)}
    other = {path: update(*change.shape, 3, seed=9) for path, change in one.items()}
    got = compare(adapter(one), adapter(other))
    assert list(got.kinds) == ["q", "up"]
    both = [got.modules[path].right for path in ("0.q", "1.q")]
    expected = (both[0].phi_IJ[:2] + both[1].phi_IJ) / 2
    torch.testing.assert_close(got.kinds["q"]["right"].phi_IJ, expected)
    assert len(got.kinds["q"]["right"].cosines) == 2


def test_modules_in_order_and_those_of_one_alone() -> None:
    one, other = several(0), several(7)
    del one["layers.9.q_proj"], other["layers.10.up_proj"]
    done: list[int] = []
    got = compare(adapter(one), adapter(other), progress=done.append)
    assert list(got.modules) == ["layers.9.up_proj", "layers.10.q_proj"] and done == [1, 2]
    assert got.only == (["layers.10.up_proj"], ["layers.9.q_proj"])
    there = strict(got)
    assert there["only"] == {"first": ["layers.10.up_proj"], "second": ["layers.9.q_proj"]}
    assert there["kinds"].keys() == {"q_proj", "up_proj"} and list(there["modules"]) == list(got.modules)
    module = there["modules"]["layers.10.q_proj"]
    assert module["right"]["pairs"]["last"]["phi"] == pytest.approx(module["right"]["phi"][2][2], abs=1e-5)
    assert module["shape"] == [20, 30] and module["ranks"] == [3, 3]


def test_what_can_not_be_compared_is_refused() -> None:
    one = several(0)
    bases = [BaseId("one/base", None, "sha256:1"), BaseId("other/base", None, "sha256:2")]
    with pytest.raises(InputError, match=r"different bases: one/base \(sha256:1\) and other/base"):
        compare(adapter(one, bases[0]), adapter(one, bases[1]))
    assert compare(adapter(one, bases[0]), adapter(one)).cosine == pytest.approx(1)  # an unknown base may be any
    with pytest.raises(
        InputError, match=r"no module in common: one adapts layers\.9\.q_proj and 3 more, the other other"
    ):
        compare(adapter(one), adapter({"other": update(3, 4, 1)}))
    wide = {path: update(change.shape[0], 31, 3) for path, change in one.items()}
    with pytest.raises(InputError, match=r"4 of 4 modules have different shapes:\n.*layers\.9\.q_proj: \(20, 30\) and"):
        compare(adapter(one), adapter(wide))
    dora = {"layers.9.q_proj": DoRA(update(20, 30, 3), torch.ones(20))}
    with pytest.raises(InputError, match=r"layers\.9\.q_proj: DoRA"):
        compare(adapter(one), adapter(dora))
