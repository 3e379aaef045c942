"""Rank, in the ways it is counted, and exact-width factors: on matrices whose rank is known by construction."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.linalg.exact import exact_factorisation, reduced_row_echelon
from deltaw.linalg.rank import (
    checked,
    column_rank,
    effective_rank,
    energy_rank,
    full_rank_factorisation,
    independent_columns,
    numerical_rank,
    row_rank,
    stable_rank,
)

sizes = st.integers(1, 24)
dtypes = st.sampled_from([torch.float32, torch.float64])
scales = st.sampled_from([1.0, 1e-30, 1e30])


def of_rank(m: int, n: int, r: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """An [m, n] matrix of rank r with singular values between 1 and 10, times `scale`."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q[:, :r] for d in (m, n))
    return ((u * (1 + 9 * torch.rand(r, generator=generator, dtype=torch.float64))) @ v.T * scale).to(dtype)


@settings(deadline=None, max_examples=80)
@given(m=sizes, n=sizes, data=st.data(), dtype=dtypes, seed=st.integers(0, 999), scale=scales)
def test_columns_rows_and_singular_values_agree(m, n, data, dtype, seed, scale) -> None:
    r = data.draw(st.integers(0, min(m, n)))
    x = of_rank(m, n, r, dtype, seed, scale)
    assert int(numerical_rank(x)) == column_rank(x) == row_rank(x) == r


@settings(deadline=None, max_examples=80)
@given(m=sizes, n=sizes, data=st.data(), dtype=dtypes, seed=st.integers(0, 999), scale=scales)
def test_full_rank_factors_lose_nothing(m, n, data, dtype, seed, scale) -> None:
    r = data.draw(st.integers(0, min(m, n)))
    x = of_rank(m, n, r, dtype, seed, scale)
    p, q = full_rank_factorisation(x)
    assert (p.shape, q.shape, p.dtype, q.dtype) == ((m, r), (n, r), dtype, dtype)
    if r:
        assert column_rank(p) == column_rank(q) == r
        assert torch.equal(p, x[:, independent_columns(x)])
    error = (p.double() / scale) @ q.double().T - x.double() / scale
    assert float(error.norm()) <= 100 * max(m, n) * torch.finfo(dtype).eps * float((x.double() / scale).norm())


def test_the_tolerance_is_strict_and_follows_the_dtype() -> None:
    assert int(numerical_rank(torch.zeros(3, 5))) == column_rank(torch.zeros(3, 5)) == 0
    x = torch.diag(torch.tensor([1.0, 1e-9]))
    assert (int(numerical_rank(x)), int(numerical_rank(x.double()))) == (1, 2)
    assert (column_rank(x), column_rank(x.double())) == (1, 2)


def test_the_note_s_matrix() -> None:
    x = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    p, q = full_rank_factorisation(x)
    assert (p.tolist(), q.tolist()) == ([[2.0], [4.0]], [[0.5], [1.0]])


def test_ranks_of_a_batch() -> None:
    x = torch.stack([of_rank(6, 4, r, torch.float64, r) for r in (0, 1, 3, 4)]).view(2, 2, 6, 4)
    assert numerical_rank(x).tolist() == [[0, 1], [3, 4]]


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.floats(0.01, 100), min_size=1, max_size=12), scale=st.sampled_from([1.0, 1e-38, 1e36]))
def test_soft_ranks_lie_between_one_and_the_count(values: list[float], scale: float) -> None:
    sigma = torch.tensor(sorted(values, reverse=True)) * scale
    for measure in (stable_rank, effective_rank):
        assert 1 - 1e-6 <= float(measure(sigma)) <= len(values) + 1e-6
    assert float(stable_rank(sigma)) <= float(effective_rank(sigma)) + 1e-6
    assert 1 <= int(energy_rank(sigma, 0.9)) <= int(energy_rank(sigma, 1.0)) <= len(values)


def test_soft_ranks_by_hand() -> None:
    equal, one, none = torch.ones(4), torch.tensor([3.0, 0, 0, 0]), torch.zeros(4)
    batch = torch.stack([equal, one, none])
    torch.testing.assert_close(stable_rank(batch), torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(effective_rank(batch), torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    assert energy_rank(batch, 0.5).tolist() == [2, 1, 0]
    two = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert float(stable_rank(two)) == 1.25
    assert float(effective_rank(two)) == pytest.approx(math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)))
    assert energy_rank(two, 0.8).tolist() == 1 and energy_rank(two, 0.81).tolist() == 2


@pytest.mark.parametrize(
    "x, said",
    [
        (torch.tensor([[1.0, math.nan]]), "1 entries that are NaN"),
        (torch.tensor([[math.inf]]), "infinite"),
        (torch.zeros(0, 3), "at least one entry"),
        (torch.zeros(3), "not a matrix"),
        (torch.ones(2, 2, dtype=torch.int64), "float32 or float64"),
    ],
)
def test_what_is_no_matrix_is_refused(x: Tensor, said: str) -> None:
    for call in (checked, numerical_rank, column_rank, full_rank_factorisation):
        with pytest.raises(ValueError, match=said):
            call(x)
    with pytest.raises(ValueError, match="share"):
        energy_rank(torch.ones(2), 0.0)


@settings(deadline=None, max_examples=60)
@given(m=st.integers(1, 6), n=st.integers(1, 6), r=st.integers(0, 6), data=st.data())
def test_integers_factor_exactly(m: int, n: int, r: int, data: st.DataObject) -> None:
    entries = st.integers(-9, 9)
    left = [[data.draw(entries) for _ in range(r)] for _ in range(m)]
    right = [[data.draw(entries) for _ in range(n)] for _ in range(r)]
    x = [[sum(left[i][k] * right[k][j] for k in range(r)) for j in range(n)] for i in range(m)]
    p, qt = exact_factorisation(x)
    rank = len(qt)
    assert rank <= min(m, n, r)
    assert rank == int(numerical_rank(torch.tensor(x, dtype=torch.float64)))
    assert rank == len(exact_factorisation([list(column) for column in zip(*x, strict=True)])[1])
    assert [[sum((p[i][k] * qt[k][j] for k in range(rank)), Fraction()) for j in range(n)] for i in range(m)] == x


def test_echelon_form_by_hand() -> None:
    echelon, pivots = reduced_row_echelon([[1, 2, 1], [2, 4, 0], [3, 6, 1]])
    assert (echelon, pivots) == ([[1, 2, 0], [0, 0, 1]], [0, 2])
    assert exact_factorisation([[1, 2], [2, 4]]) == ([[1], [2]], [[1, 2]])
    for bad in ([], [[]], [[1, 2], [3]]):
        with pytest.raises(ValueError, match="not a matrix"):
            reduced_row_echelon(bad)
