"""rms_norm, with an addition before it, and rotary: hand-written backwards against autograd and truth."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deltaw.kernels.norm import add_rms_norm, rms_norm, rms_norm_plain
from deltaw.kernels.rotary import rotary, rotary_plain, turn_, turn_back

T, D, H, E = 7, 24, 3, 8


def run(call: Callable[..., Tensor], x: Tensor, grad: Tensor, *rest: object) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = call(leaf, *rest)
    return [y.detach(), *torch.autograd.grad(y, leaf, grad.to(y.dtype))]


def within_budget(fast: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """|fast − truth| ≤ |plain − truth| + two roundings (the sums' and the result's)."""
    for f, p, t in zip(fast, plain, truth, strict=True):
        rounding = 2 * torch.finfo(f.dtype).eps * t.abs().max()
        assert (f - t).abs().max() <= (p - t).abs().max() + rounding


def angles(turned: int) -> tuple[Tensor, Tensor]:
    half = torch.rand(T, turned // 2, dtype=torch.float64) * 6
    both = torch.cat([half, half], 1)
    return both.cos(), both.sin()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_gradcheck(offset: float) -> None:
    x, w = torch.randn(T, D, dtype=torch.float64).requires_grad_(), torch.randn(D, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, w, 1e-3, offset), (x,))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_error_is_within_the_plain_twins(dtype: torch.dtype, offset: float, scale: float) -> None:
    x, w, grad = (scale * torch.randn(T, D)).to(dtype), torch.randn(D).to(dtype), torch.randn(T, D).to(dtype)
    truth = run(rms_norm_plain, x.double(), grad, w.double(), 1e-6, offset)
    within_budget(run(rms_norm, x, grad, w, 1e-6, offset), run(rms_norm_plain, x, grad, w, 1e-6, offset), truth)


def test_a_row_of_zeros_is_no_nan() -> None:
    for got in run(rms_norm, torch.zeros(2, D), torch.ones(2, D), torch.ones(D), 1e-6):
        assert got.isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_norm_gradcheck(offset: float) -> None:
    """Of both results together and of each alone."""
    x, delta, w = (torch.randn(T, D, dtype=torch.float64) for _ in range(3))
    leaves = (x.requires_grad_(), delta.requires_grad_())
    for part in (slice(None), slice(1), slice(1, None)):
        assert torch.autograd.gradcheck(lambda x, d, part=part: add_rms_norm(x, d, w, 1e-3, offset)[part], leaves)
        assert torch.autograd.gradcheck(lambda x, part=part: add_rms_norm(x, None, w, 1e-3, offset)[part], leaves[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_norm_is_the_sum_and_its_norm(dtype: torch.dtype) -> None:
    x, delta, w = torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype), torch.randn(D).to(dtype)
    for grad in (torch.no_grad(), torch.enable_grad()):
        with grad:
            total, y = add_rms_norm(x.clone().requires_grad_(), delta, w, 1e-6, 1.0)
            assert torch.equal(total, x + delta) and torch.equal(y, rms_norm(x + delta, w, 1e-6, 1.0))


@pytest.mark.parametrize("turned", [E, E // 2])
def test_rotary_gradcheck(turned: int) -> None:
    x, (cos, sin) = torch.randn(T, H, E, dtype=torch.float64).requires_grad_(), angles(turned)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), (x,))


@pytest.mark.parametrize("turned", [E, E // 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_error_is_within_the_plain_twins(dtype: torch.dtype, turned: int) -> None:
    x, grad, (cos, sin) = torch.randn(T, H, E).to(dtype), torch.randn(T, H, E).to(dtype), angles(turned)
    cos, sin = cos.to(dtype), sin.to(dtype)
    truth = run(rotary_plain, x.double(), grad, cos.double(), sin.double())
    within_budget(run(rotary, x, grad, cos, sin), run(rotary_plain, x, grad, cos, sin), truth)


def test_turning_in_place_and_back_are_rotary_and_its_gradient() -> None:
    """Of queries, keys and values in one matrix, and something behind them that stays."""
    cos, sin = angles(E // 2)
    qkv, d = torch.randn(T, (H + 2) * E, dtype=torch.float64), torch.randn(T, H + 2, E, dtype=torch.float64)
    leaf, out = qkv.clone().requires_grad_(), torch.randn(T, (H + 2) * E + 3, dtype=torch.float64)
    heads = leaf.unflatten(1, (-1, E))
    y = torch.cat([rotary_plain(heads[:, : H + 1], cos, sin), heads[:, H + 1 :]], 1)
    turn_(qkv.unflatten(1, (-1, E))[:, : H + 1], cos, sin)
    torch.testing.assert_close(qkv, y.detach().flatten(1))
    beside = out[:, -3:].clone()
    assert turn_back(*d.split([H, 1, 1], 1), cos, sin, out) is out
    torch.testing.assert_close(out[:, :-3], torch.autograd.grad(y, leaf, d)[0])
    assert torch.equal(out[:, -3:], beside)


def test_rotation_keeps_lengths() -> None:
    x, (cos, sin) = torch.randn(T, H, E, dtype=torch.float64), angles(E)
    assert torch.allclose(rotary(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("shape", [(5, 8), (1, 5, 8), (2, 3, 8)])
def test_what_is_returned_may_be_written_to(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64).requires_grad_()
    w, angles = torch.randn(8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64).repeat(1, 2)
    heads = torch.randn(5, 2, 8, dtype=torch.float64).requires_grad_()
    grads = []
    for norm, turn in ((rms_norm, rotary), (rms_norm_plain, rotary_plain)):
        y, z = norm(x, w, 1e-6), turn(heads, angles.cos(), angles.sin())
        y += 1
        y.mul_(2)
        z[0].mul_(3)
        z.view(5, -1).add_(1)
        grads.append(torch.autograd.grad(y.square().sum() + z.square().sum(), (x, heads)))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
