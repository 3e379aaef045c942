"""The gated MLP's GPU kernels."""

import pytest
import torch
import triton
import triton.language as tl

from deltaw.kernels import triton as gpu
from deltaw.kernels.lora import ACTIVATIONS
from deltaw.kernels.triton.tanh import tanh
from tests.kernels.triton.budget import DEVICE, DTYPES, assert_within_budget, randn, with_gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(activation: str, dtype: torch.dtype) -> None:
    g, u, d = (randn(37, 61, dtype=dtype) * 3 for _ in range(3))
    plain = with_gradients(lambda g, u: ACTIVATIONS[activation].forward(g) * u, 2)
    inner, dg, du = gpu.gated_backward(d, g, u, activation)
    assert_within_budget([inner, dg, du], plain, g, u, d)
    # Not compared with each other: a GPU's compiler may contract the same formula otherwise in two kernels.
    assert_within_budget([gpu.gated_forward(g, u, activation), dg, du], plain, g, u, d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 61, 1024, 1040, 1600])
def test_gated_reads_and_writes_columns_of_wider_matrices(size: int, dtype: torch.dtype) -> None:
    """What stands beside them stays, and the numbers are those of matrices of their own."""
    both, wide, room = (
        randn(5, 2 * size, dtype=dtype),
        randn(5, size + 3, dtype=dtype),
        randn(5, 2 * size + 16, dtype=dtype),
    )
    g, u, d, inner = both[:, :size], both[:, size:], wide[:, 2:-1], torch.empty_like(wide)[:, :size]
    parts = (inner, room[:, :size], room[:, size : 2 * size])
    apart = gpu.gated_backward(d.contiguous(), g.contiguous(), u.contiguous(), "silu")
    beside = room[:, 2 * size :].clone()
    assert gpu.gated_backward(d, g, u, "silu", out=parts) == parts
    assert all(map(torch.equal, parts, apart)) and torch.equal(room[:, 2 * size :], beside)
    beside = wide[:, size:].clone()
    assert gpu.gated_forward(g, u, "silu", out=wide[:, :size]).data_ptr() == wide.data_ptr()
    assert torch.equal(wide[:, :size], gpu.gated_forward(g.contiguous(), u.contiguous(), "silu"))
    assert torch.equal(wide[:, size:], beside)


def test_gated_in_the_place_of_its_inputs() -> None:
    d, both = randn(7, 300), randn(7, 600)
    g, u = both[:, :300], both[:, 300:]
    apart = gpu.gated_backward(d, g, u, "gelu")
    assert all(map(torch.equal, gpu.gated_backward(d, g, u, "gelu", out=(d, g, u)), apart))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_gated_of_nothing(shape: tuple[int, int]) -> None:
    x = randn(*shape)
    assert gpu.gated_forward(x, x, "silu").shape == shape
    assert [part.shape for part in gpu.gated_backward(x, x, x, "silu")] == [shape] * 3


def test_gated_refuses_what_it_would_have_to_copy() -> None:
    x, across = randn(4, 4), randn(4, 4).T
    for g, u, out in ((across, x, None), (x, across, None), (x, x, across), (x, x[:3], None), (x, x, x[:, :3])):
        with pytest.raises(ValueError):
            gpu.gated_forward(g, u, "silu", out=out)
    with pytest.raises(ValueError):
        gpu.gated_backward(x, x, x, "silu", out=(x, x, across))


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's exp; a GPU gives infinity without a word
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_far_out(activation: str) -> None:
    """Where exp and erf run to their ends: no NaN, and the slope is 0 or 1."""
    g = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]], device=DEVICE)
    one = torch.ones_like(g)
    inner, dg, _ = gpu.gated_backward(one, g, one, activation)
    torch.testing.assert_close(inner, g.clamp(min=0))
    torch.testing.assert_close(dg, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=DEVICE))


@triton.jit
def _tanh_of(x_at, t_at, slope_at, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    t, slope = tanh(tl.load(x_at + i))
    tl.store(t_at + i, t)
    tl.store(slope_at + i, slope)


def test_tanh_and_its_slope_keep_their_digits_from_tiny_to_saturated() -> None:
    """tanh to 4 units in the last place, near 0, too; 1 − tanh², which vanishes far out, to 3e-6 of itself."""
    x = torch.cat([torch.logspace(-12, 1.2, 2048), -torch.logspace(-12, 1.2, 2048)]).to(DEVICE)
    t, slope = torch.empty_like(x), torch.empty_like(x)
    _tanh_of[(1,)](x, t, slope, BLOCK=4096)
    truth = x.double().tanh()
    bend = x.double().cosh() ** -2
    eps = torch.finfo(torch.float32).eps
    assert ((t - truth).abs() <= 4 * eps * truth.abs()).all()
    assert ((slope - bend).abs() <= 3e-6 * bend).all()
