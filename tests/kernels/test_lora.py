"""LoRA projections: the hand-written backwards against autograd, truth and arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.kernels.lora import (
    ACTIVATIONS,
    Factors,
    Projection,
    lora_gated_mlp,
    lora_gated_mlp_plain,
    lora_linear,
    lora_linear_plain,
    lora_linears,
    lora_linears_plain,
)
from deltaw.kernels.weight import DenseWeight

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


class Block:
    """Three projections (their ranks differ; some may have no update) and the ops on them, fast and plain."""

    def __init__(self, op: str, adapted: str, dtype: torch.dtype = torch.float64) -> None:
        shapes = {"linears": [(M, N), (4, N), (5, N)], "mlp": [(M, N), (M, N), (N, M)]}[op]
        self.op, self.dtype, self.scales = op, dtype, [0.7, 1.3, 0.5]
        self.weights = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
        self.bias = torch.randn(shapes[0][0], dtype=torch.float64).to(dtype)
        self.x = torch.randn(T, N, dtype=torch.float64).to(dtype)
        self.factors: list[Tensor | None] = []
        for i, (out, into) in enumerate(shapes):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            on = adapted[i] == "+"
            pair = (torch.randn(R + i, into), torch.randn(out, R + i)) if on else (None, None)
            self.factors += [None if f is None else f.to(wide) for f in pair]

    def double(self) -> "Block":
        twin = object.__new__(Block)
        twin.op, twin.dtype, twin.scales = self.op, torch.float64, self.scales
        twin.weights, twin.bias, twin.x = [w.double() for w in self.weights], self.bias.double(), self.x.double()
        twin.factors = [None if f is None else f.double() for f in self.factors]
        return twin

    def call(self, fast: bool, x: Tensor, factors: list[Tensor | None]) -> tuple[Tensor, ...]:
        biases = [self.bias, None, None]
        made = [
            Projection(DenseWeight(w), c, self.updates(i, factors))
            for i, (w, c) in enumerate(zip(self.weights, biases, strict=True))
        ]
        if self.op == "linears":
            return (lora_linears if fast else lora_linears_plain)(x, made)
        return ((lora_gated_mlp if fast else lora_gated_mlp_plain)(x, *made, "silu"),)

    def updates(self, i: int, factors: list[Tensor | None]) -> dict[int, Factors]:
        a, b = factors[2 * i : 2 * i + 2]
        return {} if a is None or b is None else {0: Factors(a, b, self.scales[i])}

    def run(self, fast: bool, seed: int = 0) -> list[Tensor]:
        leaves = [None if f is None else f.detach().requires_grad_() for f in self.factors]
        x = self.x.detach().requires_grad_()
        ys = self.call(fast, x, leaves)
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys]
        wanted = [x, *(leaf for leaf in leaves if leaf is not None)]
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, wanted, grads)]


BLOCKS = pytest.mark.parametrize("op", ["linears", "mlp"])
ADAPTED = pytest.mark.parametrize("adapted", ["+++", "+-+", "-+-", "--+", "---"])


@BLOCKS
@ADAPTED
def test_blocks_gradcheck(op: str, adapted: str) -> None:
    block = Block(op, adapted)
    here = [i for i, f in enumerate(block.factors) if f is not None]

    def call(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        factors: list[Tensor | None] = [None] * 6
        for i, factor in zip(here, given, strict=True):
            factors[i] = factor
        return block.call(True, x, factors)

    leaves = [block.x, *(block.factors[i] for i in here)]
    assert torch.autograd.gradcheck(call, [leaf.requires_grad_() for leaf in leaves])


@BLOCKS
@ADAPTED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_error_is_within_the_plain_twins(op: str, adapted: str, dtype: torch.dtype) -> None:
    block = Block(op, adapted, dtype)
    truth = block.double().run(fast=False)
    for f, p, t in zip(block.run(fast=True), block.run(fast=False), truth, strict=True):
        assert (f - t).abs().max() <= (p - t).abs().max() + 2 * torch.finfo(dtype).eps * t.abs().max()


@BLOCKS
@ADAPTED
def test_blocks_whose_input_needs_no_gradient(op: str, adapted: str) -> None:
    block = Block(op, adapted)
    leaves = [None if f is None else f.requires_grad_() for f in block.factors]
    wanted = [leaf for leaf in leaves if leaf is not None]
    ys = block.call(True, block.x, leaves)
    if not wanted:
        assert not any(y.requires_grad for y in ys)
        return
    # One output may depend on nothing that trains; autograd then leaves its gradient out.
    got = torch.autograd.grad(sum(y.square().sum() for y in ys), wanted)
    truth = torch.autograd.grad(sum(y.square().sum() for y in block.call(False, block.x, leaves)), wanted)
    assert all(torch.allclose(g, t) for g, t in zip(got, truth, strict=True))


def test_an_output_that_nobody_uses_is_no_gradient() -> None:
    block = Block("linears", "+++")
    leaves = [f.requires_grad_() for f in block.factors if f is not None]
    block.call(True, block.x, leaves)[1].sum().backward()
    assert not leaves[0].grad.any() and leaves[2].grad.any()


def test_writing_to_a_factor_before_the_backward_is_noticed() -> None:
    x, w, _, a, b = inputs(torch.float32, bias=False)
    y = lora_linear(x, w, None, a, b, 1.0)
    with torch.no_grad():
        a.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_have_their_own_derivative(name: str) -> None:
    act = ACTIVATIONS[name]
    g = torch.linspace(-5, 5, 41, dtype=torch.float64).requires_grad_()
    d = torch.randn(41, dtype=torch.float64)
    (truth,) = torch.autograd.grad(act.forward(g), g, d)
    assert torch.allclose(act.backward(d, g.detach()), truth)


# A model may write into what it was given: Falcon adds its attention's output to its MLP's


WRITES = {
    "add_": lambda y, c: y.add_(c),
    "mul_": lambda y, c: y.mul_(c),
    "a part": lambda y, c: y[..., 1:].mul_(c[..., 1:]),
    "a view": lambda y, c: y.view(-1, y.shape[-1]).add_(c.view(-1, c.shape[-1])),
    "a row": lambda y, c: y[0].copy_(c[0]),
    "+=": lambda y, c: y.__iadd__(c),
}


def projection(a: Tensor, b: Tensor) -> Projection:
    generator = torch.Generator().manual_seed(len(b))
    w = torch.randn(b.shape[0], a.shape[1], dtype=torch.float64, generator=generator)
    bias = torch.randn(b.shape[0], dtype=torch.float64, generator=generator)
    return Projection(DenseWeight(w), bias, {0: Factors(a, b, 0.7)})


OPERATIONS = {
    "one": (lora_linears, lora_linears_plain),
    "several": (lora_linears, lora_linears_plain),
    "mlp": (
        lambda x, ps: (lora_gated_mlp(x, *ps, "silu"),),
        lambda x, ps: (lora_gated_mlp_plain(x, *ps, "silu"),),
    ),
}


@settings(deadline=None)
@given(
    operation=st.sampled_from(sorted(OPERATIONS)),
    writes=st.lists(st.sampled_from(sorted(WRITES)), min_size=1, max_size=3),
    leading=st.sampled_from([(T,), (1, T), (2, 3), (2, 1, 3)]),
    seed=st.integers(0, 2**16),
)
def test_what_is_returned_may_be_written_to(operation: str, writes: list[str], leading: tuple, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    sizes = {"one": [(N, M)], "several": [(N, M), (N, 4), (N, M)], "mlp": [(N, M), (N, M), (M, N)]}[operation]
    x, factors = random(*leading, N), [(random(R, n), random(m, R)) for n, m in sizes]
    leaves = [x, *(factor for pair in factors for factor in pair)]
    found = []
    for call in OPERATIONS[operation]:
        ys = call(x * 1, [projection(a, b) for a, b in factors])
        for y in ys:
            other = torch.linspace(-2, 3, y.numel(), dtype=torch.float64).view(y.shape)
            for name in writes:
                WRITES[name](y, other)
        found.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
