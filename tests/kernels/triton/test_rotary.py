"""The GPU kernels of rotary position embedding."""

import pytest
import torch
from torch import Tensor

from deltaw.kernels import rotary
from deltaw.kernels import triton as gpu
from tests.kernels.triton.budget import DEVICE, DTYPES, assert_within_budget, randn, with_gradients


def angles(tokens: int, entries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.rand(tokens, entries // 2).repeat(1, 2) * 6
    return half.cos().to(dtype).to(DEVICE), half.sin().to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size", "entries"), [(3, 8, 8), (4, 10, 4), (1, 6, 6), (9, 64, 64)])
def test_rotary(heads: int, size: int, entries: int, dtype: torch.dtype) -> None:
    x, d, (cos, sin) = (
        randn(13, heads, size, dtype=dtype),
        randn(13, heads, size, dtype=dtype),
        angles(13, entries, dtype),
    )
    y, dx = gpu.rotary_turn(x, cos, sin, 1), gpu.rotary_turn(d, cos, sin, -1)
    assert y.dtype == dx.dtype == dtype
    assert_within_budget([y, dx], with_gradients(rotary.rotary_plain, 1), x, cos, sin, d)


def test_rotary_of_a_view() -> None:
    """Queries as a part of q, k, v side by side, and heads before tokens."""
    cos, sin = angles(5, 8, torch.float32)
    for x in (randn(5, 6, 8)[:, 2:4], randn(3, 5, 8).transpose(0, 1), randn(5, 8, 3).transpose(1, 2)):
        assert torch.equal(gpu.rotary_turn(x, cos, sin, 1), gpu.rotary_turn(x.contiguous(), cos, sin, 1))
