"""LowRank: the algebra of updates, against the dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.kernels.weight import DenseWeight
from deltaw.kinds import Dense, DoRA
from deltaw.linalg.row_norms import norms_of_sum, squared_norms


def update(m: int = 7, n: int = 5, r: int = 3, scale: float = 0.7, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((r, n), (m, r)))
    return LowRank(a, b, scale)


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 9), n=st.integers(1, 9), r=st.integers(1, 9), s=st.floats(-3, 3), seed=st.integers(0, 9))
def test_algebra_is_the_dense_algebra(m: int, n: int, r: int, s: float, seed: int) -> None:
    x, y = update(m, n, r, s, seed), update(m, n, 2, 1.5, seed + 1)
    rows = torch.randn(4, n, dtype=torch.float64)
    torch.testing.assert_close((x + y).dense(), x.dense() + y.dense())
    torch.testing.assert_close((x - y).dense(), x.dense() - y.dense())
    torch.testing.assert_close((-x).dense(), -x.dense())
    torch.testing.assert_close(x.apply(rows), rows @ x.dense().T)
    u, sigma, vt = x.svd()
    torch.testing.assert_close(u @ torch.diag(sigma) @ vt, x.dense())
    assert (x + y).rank == r + 2


def test_truncation_is_optimal() -> None:
    """Eckart-Young: the error is the next singular value in 2-norm, the root of the rest's squares in Frobenius."""
    full = update(r=5)
    sigma = torch.linalg.svdvals(full.dense())
    for rank in range(1, 5):
        error = full.dense() - full.truncate(rank).dense()
        torch.testing.assert_close(torch.linalg.matrix_norm(error, 2), sigma[rank])
        torch.testing.assert_close(error.norm(), sigma[rank:].norm())


def test_energy_keeps_the_smallest_rank_that_suffices() -> None:
    full = update(r=5)
    energy = torch.linalg.svdvals(full.dense())[:5] ** 2
    share = energy.cumsum(0) / energy.sum()
    assert full.truncate(energy=float(share[1]) - 1e-6).rank == 2
    assert full.truncate(energy=float(share[1]) + 1e-6).rank == 3
    assert full.truncate(energy=1.0).rank == 5


def test_figures_of_a_4096_layer_at_rank_8() -> None:
    """0.39 % of the numbers: 65,536 instead of 16,777,216."""
    layer = LowRank(torch.empty(8, 4096, device="meta"), torch.empty(4096, 8, device="meta"))
    assert layer.parameters == 65_536
    assert round(100 * layer.parameters / 4096**2, 2) == 0.39


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"rank": 9}, {"energy": 0.0}, {"energy": 1.1}, {}, {"rank": 1, "energy": 0.5}]
)
def test_impossible_truncations_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        update().truncate(**wrong)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        LowRank(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="different shapes"):
        update() + update(m=6)


def norms(w: torch.Tensor, x: LowRank) -> torch.Tensor:
    return norms_of_sum(squared_norms(w), w @ x.a_RN.T, x.a_RN, x.b_MR, x.scale)


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 9), n=st.integers(1, 9), r=st.integers(1, 9), s=st.floats(-3, 3), seed=st.integers(0, 9))
def test_row_norms_are_those_of_the_sum(m: int, n: int, r: int, s: float, seed: int) -> None:
    x, w = update(m, n, r, s, seed), torch.randn(m, n, dtype=torch.float64)
    got = norms(w, x)
    torch.testing.assert_close(got, (w + x.dense()).norm(dim=1), rtol=1e-9, atol=1e-7)


def test_row_norms_lose_digits_only_where_a_row_is_nearly_taken_away() -> None:
    """What the module's docstring says of float32: ‖v‖ = ‖w‖ / 1000 still has its first digit."""
    a, w = torch.eye(4), torch.randn(64, 4)
    for left, share in ((1.0, 1e-6), (0.1, 1e-4), (1e-3, 0.3)):
        x = LowRank(a, (left - 1) * w)
        truth = (w.double() + x.b_MR.double()).norm(dim=1)
        error = (norms(w, x).double() / truth - 1).abs().max()
        assert error <= share, left
    assert error > 1e-4  # the warning is not for nothing


def test_dora_is_rows_of_length_m() -> None:
    w, low = torch.randn(7, 5, dtype=torch.float64), update()
    lengths = torch.rand(7, dtype=torch.float64) + 0.1
    dora = DoRA(low, lengths)
    sum_MN = w + dora.relative_to(DenseWeight(w)).dense()
    torch.testing.assert_close(sum_MN.norm(dim=1), lengths)
    cosines = torch.cosine_similarity(sum_MN, w + low.dense())
    torch.testing.assert_close(cosines, torch.ones_like(cosines))
    assert (dora.rank, dora.shape, dora.scale, dora.parameters) == (3, (7, 5), 0.7, low.parameters + 7)
    assert torch.equal(dora.cpu().relative_to(DenseWeight(w)).dense(), dora.relative_to(DenseWeight(w)).dense())
    with pytest.raises(ValueError, match="on a weight of"):
        dora.relative_to(DenseWeight(w.T))
    with pytest.raises(ValueError, match="rows"):
        DoRA(low, lengths[1:])


def test_fresh_dora_is_exactly_nothing() -> None:
    w = torch.randn(7, 5)
    low = LowRank(torch.randn(3, 5), torch.zeros(7, 3))
    assert not DoRA(low, squared_norms(w).sqrt()).relative_to(DenseWeight(w)).dense().any()


def test_any_update_has_a_plain_one() -> None:
    w, low = torch.randn(7, 5, dtype=torch.float64), update()
    dense, dora = Dense(low.dense()), DoRA(low, torch.ones(7, dtype=torch.float64))
    assert low.relative_to(DenseWeight(w)) is low and dense.relative_to(DenseWeight(w)) is dense
    assert low.plain() is low and dense.plain() is dense
    with pytest.raises(InputError):
        dora.plain()
