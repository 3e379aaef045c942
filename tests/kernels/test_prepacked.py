"""Products with prepacked matrices: as near the truth as plain ones, of the matrix as it is now, and only where they
are asked for."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltaw.kernels import copies, prepacked
from deltaw.kernels.copies import making
from deltaw.kernels.weight import DenseWeight

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if prepacked._can(torch.device("cpu"), dtype)]
pytestmark = pytest.mark.skipif(not DTYPES, reason="this PyTorch has no prepacked products")


def frozen(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=dtype), requires_grad=False)


def copies_made() -> int:
    return sum(copy is not None for copy in prepacked._copies.values())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    m=st.integers(1, 70),
    n=st.integers(1, 200),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    spread=st.booleans(),
)
def test_products_are_as_near_as_plain_ones(
    rows: int, m: int, n: int, bias: bool, dtype: torch.dtype, spread: bool
) -> None:
    """|fast − truth| ≤ |plain − truth| + the roundings of a sum: by output, in units of what its terms come to.
    `spread`: rows of x that don't stand one behind the other."""
    w_MN, bias_M = frozen(m, n, dtype=dtype), torch.randn(m, dtype=dtype) if bias else None
    x_TN = torch.randn(rows, 2 * n, dtype=dtype)[:, :n] if spread else torch.randn(rows, n, dtype=dtype)
    wide_bias = torch.zeros(m).double() if bias_M is None else bias_M.double()
    truth = x_TN.double() @ w_MN.double().T + wide_bias
    terms = x_TN.double().abs() @ w_MN.double().abs().T + wide_bias.abs()
    plain = (DenseWeight(w_MN).matmul(x_TN, bias_M).double() - truth).abs()
    with torch.inference_mode(), making():
        made, weight = copies_made(), DenseWeight(w_MN)
        for product in (weight.matmul, weight.few):
            got = product(x_TN, bias_M)
            assert got.dtype == dtype and got.is_contiguous()  # it is added to in place, by views
            fast = (got.double() - truth).abs()
            rounded = torch.finfo(dtype).eps * truth.abs() + 8 * torch.finfo(torch.float32).eps * terms
            assert (fast <= plain + rounded).all()
        assert copies_made() == made + 1  # a product fell back on the plain one otherwise


def test_a_matrix_that_was_written_to_or_moved_is_packed_anew() -> None:
    w_MN, x_TN = frozen(5, 7), torch.randn(3, 7)
    weight = DenseWeight(w_MN)
    with torch.inference_mode(), making():
        torch.testing.assert_close(weight.matmul(x_TN), x_TN @ w_MN.T)
    with torch.no_grad():
        w_MN.mul_(2)
    for within in (True, False):  # without a new one the plain product is made
        with torch.inference_mode(), making(within):
            torch.testing.assert_close(weight.matmul(x_TN), x_TN @ w_MN.T)
            torch.testing.assert_close(DenseWeight(w_MN).matmul(x_TN), x_TN @ w_MN.T)
        w_MN.data = torch.randn(5, 7)
    w_MN.data = w_MN.data.double()
    with torch.inference_mode(), making():
        torch.testing.assert_close(weight.matmul(x_TN.double()), x_TN.double() @ w_MN.T)


def test_copies_are_made_only_where_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TN, made = torch.randn(2, 7), copies_made()
    with making():
        DenseWeight(frozen(5, 7)).matmul(x_TN)  # gradients may be asked for
    with torch.inference_mode():
        DenseWeight(frozen(5, 7)).matmul(x_TN)
    with torch.inference_mode(), making():
        DenseWeight(frozen(7, 5).t()).matmul(x_TN)  # a view, which is another one each time
        DenseWeight(nn.Parameter(torch.randn(5, 7))).matmul(x_TN)  # it trains
    assert copies_made() == made
    monkeypatch.setattr(copies, "_available", lambda: float(copies.SPARE))
    w_MN = frozen(5, 7)
    with torch.inference_mode(), making():
        DenseWeight(w_MN).matmul(x_TN)
    assert copies_made() == made
    monkeypatch.setattr(copies, "_available", lambda: 2.0 * copies.SPARE)
    w_MN = frozen(5, 7)
    with torch.inference_mode(), making():
        DenseWeight(w_MN).matmul(x_TN)
    assert copies_made() == made + 1
    del w_MN  # as long as the matrix
    gc.collect()
    assert copies_made() == made
