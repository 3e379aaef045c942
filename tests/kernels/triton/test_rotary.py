"""The GPU kernels of rotary position embedding."""

import pytest
import torch
from torch import Tensor

from deltaw.kernels import rotary
from deltaw.kernels import triton as gpu
from tests.kernels.triton.budget import DEVICE, DTYPES, Values, assert_within_budget, randn, with_gradients


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


SIZES = [(3, 1, 8, 8), (4, 2, 10, 4), (1, 1, 6, 6), (9, 3, 64, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "shared", "size", "entries"), SIZES)
def test_rotary_in_place(heads: int, shared: int, size: int, entries: int, dtype: torch.dtype) -> None:
    """Queries and keys as the first heads of q, k, v and something else in one matrix, of which the others stay."""
    qkv, (cos, sin) = randn(13, (heads + 2 * shared) * size + 5, dtype=dtype), angles(13, entries, dtype)
    columns = (heads + shared) * size
    x, beside = qkv[:, :columns].unflatten(1, (-1, size)), qkv[:, columns:].clone()
    apart = gpu.rotary_turn(x.contiguous(), cos, sin, 1)
    assert gpu.rotary_turn(x, cos, sin, 1, out=x) is x
    assert torch.equal(x, apart) and torch.equal(qkv[:, columns:], beside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "shared", "size", "entries"), SIZES)
@pytest.mark.parametrize("room", [0, 16])
def test_rotary_back(heads: int, shared: int, size: int, entries: int, room: int, dtype: torch.dtype) -> None:
    """The gradient of a product that is split into q, k and v, of which q and k are turned."""
    cos, sin = angles(13, entries, dtype)
    dq, dk, dv = (randn(13, count, size, dtype=dtype) for count in (heads, shared, shared))
    out = randn(13, (heads + 2 * shared) * size + room, dtype=dtype)
    columns, beside = out.shape[1] - room, out[:, out.shape[1] - room :].clone()
    assert gpu.rotary_back(dq, dk, dv, cos, sin, out) is out
    assert torch.equal(out[:, columns:], beside)

    def plain(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Values:
        x = torch.zeros(13, heads + 2 * shared, size, dtype=dq.dtype, device=DEVICE, requires_grad=True)
        q, k, v = x.split([heads, shared, shared], 1)
        turned = [rotary.rotary_plain(q, cos, sin), rotary.rotary_plain(k, cos, sin), v]
        return [part.flatten(1) for part in torch.autograd.grad(turned, x, [dq, dk, dv])]

    assert_within_budget([out[:, :columns]], plain, dq, dk, dv, cos, sin)
    assert torch.equal(out[:, columns - shared * size : columns], dv.flatten(1))


def test_rotary_back_of_views() -> None:
    """Heads before tokens, as some attention kernels give gradients; and no room for all of them."""
    cos, sin = angles(5, 8, torch.float32)
    dq, dk, dv = (randn(count, 5, 8).transpose(0, 1) for count in (4, 2, 2))
    apart = gpu.rotary_back(dq.contiguous(), dk.contiguous(), dv.contiguous(), cos, sin, randn(5, 64))
    assert torch.equal(gpu.rotary_back(dq, dk, dv, cos, sin, randn(5, 64)), apart)
    for out in (randn(5, 63), randn(64, 5).T, randn(4, 64)):
        with pytest.raises(ValueError):
            gpu.rotary_back(dq, dk, dv, cos, sin, out)


def test_rotary_of_no_tokens() -> None:
    x, (cos, sin) = randn(0, 2, 8), angles(0, 8, torch.float32)
    assert gpu.rotary_turn(x, cos, sin, 1).shape == (0, 2, 8)
    assert gpu.rotary_back(x, x, x, cos, sin, randn(0, 48)).shape == (0, 48)
