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
    assert_within_budget([y, dx], with_gradients(lambda x, w: norm.rms_norm_plain(x, w, 1e-5, offset), 1), x, w, d)


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
