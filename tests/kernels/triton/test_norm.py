"""RMSNorm's GPU kernels."""

import pytest
import torch

from deltaw.kernels import norm
from deltaw.kernels import triton as gpu
from deltaw.kernels.device import WIDEST
from tests.kernels.triton.budget import DEVICE, DTYPES, assert_within_budget, randn, with_gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 64, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(size: int, offset: float, dtype: torch.dtype) -> None:
    x, w, d = randn(3, 29, size, dtype=dtype), randn(size, dtype=dtype), randn(3, 29, size, dtype=dtype)
    y, r = gpu.rms_norm_forward(x, w, 1e-5, offset)
    dx = gpu.rms_norm_backward(d, x, w, r, offset)
    assert (y.dtype, r.dtype, dx.dtype, r.shape) == (dtype, torch.float32, dtype, (3, 29, 1))
    # dx is a difference, all but nothing where a row is one feature: its roundings are those of what it is made of.
    term = (r * d.float() * (offset + w.float())).abs().max()
    plain = with_gradients(lambda x, w: norm.rms_norm_plain(x, w, 1e-5, offset), 1)
    assert_within_budget([y, dx], plain, x, w, d, terms=[y.abs().max(), term])


def test_rms_norm_takes_the_widest_row_and_refuses_a_wider_one() -> None:
    x = randn(2, WIDEST)
    w = torch.ones(WIDEST, device=DEVICE)
    y, _ = gpu.rms_norm_forward(x, w, 1e-5)
    torch.testing.assert_close(y, norm.rms_norm_plain(x, w, 1e-5))
    with pytest.raises(ValueError, match="at most 16384"):
        gpu.rms_norm_forward(randn(1, WIDEST + 1), randn(WIDEST + 1), 1e-5)


def test_rms_norm_of_views() -> None:
    """A part of wider rows, and a gradient that is one number many times over."""
    x, w = randn(6, 40)[:, 8:24], randn(16)
    assert torch.equal(gpu.rms_norm_forward(x, w, 1e-5)[0], gpu.rms_norm_forward(x.contiguous(), w, 1e-5)[0])
    _, r = gpu.rms_norm_forward(x, w, 1e-5)
    one = torch.ones(1, device=DEVICE).expand(6, 16)
    assert torch.equal(gpu.rms_norm_backward(one, x, w, r), gpu.rms_norm_backward(one.contiguous(), x, w, r))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 64, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_rms_norm(size: int, offset: float, dtype: torch.dtype) -> None:
    """The sum is rounded once, y is the norm of what it was rounded to, and so is the gradients' sum rounded once."""
    x, delta, d, dsum = (randn(3, 29, size, dtype=dtype) for _ in range(4))
    w = randn(size, dtype=dtype)
    total, y, r = gpu.add_rms_norm_forward(x, delta, w, 1e-5, offset)
    dx = gpu.add_rms_norm_backward(d, dsum, total, w, r, offset)
    assert {part.dtype for part in (total, y, dx)} == {dtype} and (r.dtype, r.shape) == (torch.float32, (3, 29, 1))
    assert_within_budget([total], lambda x, delta: [x + delta], x, delta)
    assert_within_budget([y], lambda total, w: [norm.rms_norm_plain(total, w, 1e-5, offset)], total, w)

    alone = gpu.rms_norm_backward(d.float(), total.float(), w.float(), r, offset)
    once = (torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps) * (alone.abs() + dsum.float().abs())
    assert ((dx.float() - (alone + dsum.float())).abs() <= once).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 64])
def test_norms_read_and_write_rows_with_room_behind_them(size: int, dtype: torch.dtype) -> None:
    """What stands there stays, and the numbers are those of rows of their own."""
    x, delta, d, dsum, room = (randn(2, 7, size + 16, dtype=dtype) for _ in range(5))
    parts = [part[..., :size] for part in (x, delta, d, dsum)]
    alone, out, w = [part.contiguous() for part in parts], room[..., :size], randn(size, dtype=dtype)
    before = room.clone()
    for add, count in ((False, 1), (True, 2)):
        forward = gpu.add_rms_norm_forward if add else gpu.rms_norm_forward
        backward = gpu.add_rms_norm_backward if add else gpu.rms_norm_backward
        mine, own = forward(*parts[:count], w, 1e-5, 1.0, out=out), forward(*alone[:count], w, 1e-5, 1.0)
        assert mine[-2] is out
        torch.testing.assert_close(mine, own)
        grads = (parts[2:][:count], alone[2:][:count])
        dx = backward(*grads[0], parts[0], w, mine[-1], 1.0, out=out)
        assert dx is out
        torch.testing.assert_close(dx, backward(*grads[1], alone[0], w, mine[-1], 1.0))
    assert torch.equal(room[..., size:], before[..., size:])
    with pytest.raises(ValueError):
        gpu.rms_norm_forward(
            alone[0], w, 1e-5, out=torch.empty(size, 2, 7, dtype=dtype, device=DEVICE).permute(1, 2, 0)
        )


def test_norms_of_no_rows() -> None:
    x, w = randn(0, 8), randn(8)
    total, y, r = gpu.add_rms_norm_forward(x, x, w, 1e-5)
    assert gpu.add_rms_norm_backward(x, x, total, w, r).shape == y.shape == (0, 8)
    assert gpu.rms_norm_backward(x, x, w, gpu.rms_norm_forward(x, w, 1e-5)[1]).shape == (0, 8)
