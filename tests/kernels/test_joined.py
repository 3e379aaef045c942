"""Joined projections are the projections: values and gradients of lora.py's plain twins."""

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from deltaw.kernels.joined import FILL, Joined, joined_gated_mlp, joined_heads, joined_linears
from deltaw.kernels.lora import ACTIVATIONS, Factors, Projection, lora_gated_mlp_plain, lora_linears_plain
from deltaw.kernels.rotary import rotary_plain
from deltaw.kernels.weight import DenseWeight

WIDE = torch.float64


class Layers:
    """Projections of one x, of these outputs and ranks (0: no update), and the same joined."""

    def __init__(self, outputs: Sequence[int], ranks: Sequence[int], inputs: int, seed: int, **options: Any) -> None:
        draw, dtype = torch.Generator().manual_seed(seed), options.get("dtype", WIDE)
        factors = options.get("factors", dtype)

        def numbers(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=WIDE).to(kind)

        weights = [numbers(m, inputs) for m in outputs]
        biases = [numbers(m) if options.get("bias") else None for m in outputs]
        self.updates = [
            Factors(
                numbers(r, inputs, kind=factors).requires_grad_(), numbers(m, r, kind=factors).requires_grad_(), 1.7
            )
            if r
            else None
            for m, r in zip(outputs, ranks, strict=True)
        ]
        self.joined = Joined(weights, biases, self.updates)
        for factor, place, scale in self.joined.places:
            place.copy_(factor.detach() * scale)
        self.plain = [
            Projection(DenseWeight(w), b, {} if u is None else {0: u})
            for w, b, u in zip(weights, biases, self.updates, strict=True)
        ]


def gradients(ys: Sequence[Tensor], x: Tensor, factors: Sequence[Tensor], seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    total = sum((y.double() * torch.randn(y.shape, generator=draw, dtype=WIDE)).sum() for y in ys)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, [x, *factors]))


SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=3).filter(
    lambda pairs: any(rank for _, rank in pairs)
)


@given(SIZES, st.integers(1, 11), st.integers(0, 7), st.booleans(), st.integers(0, 1000))
def test_linears(sizes: list[tuple[int, int]], inputs: int, rows: int, bias: bool, seed: int) -> None:
    layers = Layers([m for m, _ in sizes], [r for _, r in sizes], inputs, seed, bias=bias)
    x = torch.randn(rows, inputs, dtype=WIDE, requires_grad=True)
    ours, plain = joined_linears(x, layers.joined), lora_linears_plain(x, layers.plain)
    for mine, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, wanted)
    factors = layers.joined.factors
    torch.testing.assert_close(gradients(ours, x, factors, seed), gradients(plain, x, factors, seed))


@given(
    st.integers(1, 9), st.integers(1, 7), st.integers(0, 7), st.sampled_from(sorted(ACTIVATIONS)), st.integers(0, 1000)
)
def test_gated_mlp(size: int, inputs: int, rows: int, activation: str, seed: int) -> None:
    pair = Layers([size, size], [2, 3], inputs, seed)
    down = Layers([inputs], [1], size, seed + 1)
    x = torch.randn(rows, inputs, dtype=WIDE, requires_grad=True)
    ours = joined_gated_mlp(x, pair.joined, down.joined, activation)
    plain = lora_gated_mlp_plain(x, *pair.plain, *down.plain, activation)
    torch.testing.assert_close(ours, plain)
    factors = [*pair.joined.factors, *down.joined.factors]
    torch.testing.assert_close(gradients([ours], x, factors, seed), gradients([plain], x, factors, seed))


def test_gradients_are_added_to_the_sinks() -> None:
    layers = Layers([6, 4], [2, 3], 5, 0)
    x = torch.randn(7, 5, dtype=WIDE, requires_grad=True)
    wanted = gradients(joined_linears(x, layers.joined), x, layers.joined.factors, 1)
    sinks = layers.joined.collect()
    for times in (1, 2):
        draw = torch.Generator().manual_seed(1)
        parts = [(y * torch.randn(y.shape, generator=draw, dtype=WIDE)).sum() for y in joined_linears(x, layers.joined)]
        torch.stack(parts).sum().backward()
        assert all(factor.grad is None for factor in layers.joined.factors)
        for factor, gradient in zip(layers.joined.factors, wanted[1:], strict=True):
            torch.testing.assert_close(sinks[factor], times * gradient)


def test_no_gradient_for_an_input_that_wants_none() -> None:
    layers = Layers([6, 4], [2, 3], 5, 0)
    ys = joined_linears(torch.randn(7, 5, dtype=WIDE), layers.joined)
    sum(y.sum() for y in ys).backward()  # type: ignore[union-attr]
    assert all(factor.grad is not None for factor in layers.joined.factors)


def test_half_precision_rounds_the_factors_once() -> None:
    layers = Layers([8, 8], [4, 4], 16, 3, dtype=torch.bfloat16, factors=torch.float32)
    x = torch.randn(5, 16).bfloat16().requires_grad_()
    ours, plain = joined_linears(x, layers.joined), lora_linears_plain(x, layers.plain)
    for mine, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0.05, atol=0.1)
    found = gradients(ours, x, layers.joined.factors, 3)
    assert [one.dtype for one in found] == [torch.bfloat16] + 4 * [torch.float32]


def test_rows_begin_lines_and_ranks_are_filled_up() -> None:
    joined = Layers([6, 4], [2, 3], 5, 0, dtype=torch.bfloat16).joined
    assert joined.room == FILL
    assert joined.whole.stride(0) * joined.whole.element_size() % 128 == 0
    assert [view.shape for view in joined.views] == [(6, 5), (4, 5)]
    assert not joined.whole[joined.outputs + 5 :].any() and not joined.s_MK[:, 5:].any()


def test_a_bias_here_and_none_there_is_refused() -> None:
    w = torch.randn(3, 4)
    with pytest.raises(ValueError, match="bias"):
        Joined([w, w], [torch.zeros(3), None], [None, Factors(torch.zeros(1, 4), torch.zeros(3, 1), 1.0)])


@given(st.integers(1, 3), st.integers(1, 2), st.integers(0, 5), st.integers(0, 1000))
def test_heads_are_turned(heads: int, kv_heads: int, rows: int, seed: int) -> None:
    head, turning = 8, 6
    layers = Layers([heads * head, kv_heads * head, kv_heads * head], [2, 0, 3], 5, seed)
    x = torch.randn(rows, 5, dtype=WIDE, requires_grad=True)
    angle_TR = torch.randn(rows, turning // 2, dtype=WIDE).repeat(1, 2)
    cos, sin = angle_TR.cos(), angle_TR.sin()
    ours = joined_heads(x, layers.joined, cos, sin, head)
    q, k, v = (y.unflatten(1, (-1, head)) for y in lora_linears_plain(x, layers.plain))
    plain = rotary_plain(q, cos, sin), rotary_plain(k, cos, sin), v
    for mine, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, wanted)
    factors = layers.joined.factors
    torch.testing.assert_close(gradients(ours, x, factors, seed), gradients(plain, x, factors, seed))
