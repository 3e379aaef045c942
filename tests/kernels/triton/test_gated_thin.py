"""The gated MLP's GPU kernels that take thin products on the way."""

import pytest
import torch

from deltaw.kernels import triton as gpu
from tests.kernels.triton.budget import DEVICE, DTYPES, randn

ON_CHIP = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter takes a bfloat16's bits for a number in dot")
KINDS = [pytest.param(one, marks=ON_CHIP if one == torch.bfloat16 else ()) for one in DTYPES]
SIZES = [(37, 61, 16), (3, 130, 40), (1, 128, 32), (0, 5, 16)]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("rows", "size", "ranks"), SIZES)
def test_forward(rows: int, size: int, ranks: int, block: int, dtype: torch.dtype) -> None:
    both, a = randn(rows, 2 * size, dtype=dtype), randn(ranks, size + 8, dtype=dtype)[:, :size].T
    g, u, out = both[:, :size], both[:, size:], randn(rows, size + ranks, dtype=dtype)
    gpu.gated_ranked(g, u, "silu", a, out, block)
    v = gpu.gated_forward(g, u, "silu")
    _assert_close(out[:, :size], v)
    _assert_close(out[:, size:], out[:, :size].double() @ a.double())


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("rows", "size", "ranks"), SIZES)
def test_backward(rows: int, size: int, ranks: int, dtype: torch.dtype) -> None:
    both, d, s = randn(rows, 2 * size, dtype=dtype), randn(rows, size, dtype=dtype), randn(2 * size, ranks, dtype=dtype)
    g, u, v, out = both[:, :size], both[:, size:], torch.empty_like(d), randn(rows, 2 * size + ranks, dtype=dtype)
    gpu.gated_ranked_back(d, g, u, "gelu_tanh", s, v, out)
    plain = gpu.gated_backward(d, g, u, "gelu_tanh")
    for mine, wanted in zip((v, out[:, :size], out[:, size : 2 * size]), plain, strict=True):
        _assert_close(mine, wanted)
    _assert_close(out[:, 2 * size :], out[:, : 2 * size].double() @ s.double())


def _assert_close(x: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (x.double() - wanted.double()).norm() <= 4 * torch.finfo(x.dtype).eps * wanted.double().norm()
