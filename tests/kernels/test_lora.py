"""lora_linear: the hand-written backward against autograd, truth and arithmetic."""

import pytest
import torch
from torch import Tensor

from deltaw.kernels.lora import lora_linear, lora_linear_plain

T, N, M, R = 7, 12, 9, 3


def inputs(dtype: torch.dtype, bias: bool, wide: bool = False) -> list[Tensor | None]:
    x, w, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((T, N), (M, N), (R, N), (M, R)))
    made: list[Tensor | None] = [x.to(dtype), w.to(dtype), torch.randn(M).to(dtype) if bias else None]
    factors = torch.float32 if wide else dtype
    made += [a.to(factors), b.to(factors)]
    for i in (0, 3, 4):
        made[i].requires_grad_()
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_in_float64(bias: bool) -> None:
    x, w, c, a, b = inputs(torch.float64, bias)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, w, c, a, b, 0.7), (x, a, b))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_the_plain_twins(dtype: torch.dtype, bias: bool) -> None:
    """|fast − truth| ≤ |plain − truth| + two roundings (two sums meet), for output and gradients."""
    made = inputs(dtype, bias, wide=True)
    grad = torch.randn(T, M).to(dtype)

    def run(call, values):
        leaves = [None if v is None else v.detach().requires_grad_(i in (0, 3, 4)) for i, v in enumerate(values)]
        y = call(*leaves, 0.7)
        return [y, *torch.autograd.grad(y, [leaves[i] for i in (0, 3, 4)], grad.to(y.dtype))]

    truth = run(lora_linear_plain, [None if v is None else v.double() for v in made])
    fast, plain = run(lora_linear, made), run(lora_linear_plain, made)
    for f, p, t in zip(fast, plain, truth, strict=True):
        rounding = 2 * torch.finfo(dtype).eps * t.abs().max()
        assert (f - t).abs().max() <= (p - t).abs().max() + rounding


def test_factors_keep_their_dtype_and_the_base_gets_no_gradient() -> None:
    x, w, c, a, b = inputs(torch.bfloat16, bias=True, wide=True)
    y = lora_linear(x, w, c, a, b, 1.0)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert a.grad.dtype == b.grad.dtype == torch.float32
    assert w.grad is None and c.grad is None


def test_input_without_gradient_costs_none() -> None:
    x, w, c, a, b = inputs(torch.float32, bias=False)
    y = lora_linear(x.detach(), w, c, a, b, 1.0)
    (y**2).sum().backward()
    assert a.grad is not None and b.grad is not None


def test_leading_dimensions_are_kept() -> None:
    x, w, c, a, b = inputs(torch.float64, bias=True)
    flat = lora_linear(x, w, c, a, b, 0.5)
    deep = lora_linear(x.view(1, T, N), w, c, a, b, 0.5)
    assert torch.equal(flat, deep[0])


def test_zero_b_gives_the_base_to_the_bit() -> None:
    x, w, c, a, b = inputs(torch.bfloat16, bias=True, wide=True)
    y = lora_linear(x, w, c, a, torch.zeros_like(b), 2.0)
    assert torch.equal(y, torch.nn.functional.linear(x, w, c))
