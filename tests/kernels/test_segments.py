"""Rows of several updates in one pass: each has the outputs and gradients that it has alone on its rows."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deltaw.kernels.lora import (
    Factors,
    Projection,
    lora_gated_mlp,
    lora_gated_mlp_plain,
    lora_linears,
    lora_linears_plain,
)
from deltaw.kernels.segments import Segment, Segments
from deltaw.kernels.weight import DenseWeight, Weight
from tests.halves import Halves, HalvesLinear

T, N, M, R = 11, 6, 5, 2
SHAPES = {"linears": [(M, N), (4, N), (3, N)], "mlp": [(M, N), (M, N), (N, M)]}
OPS = pytest.mark.parametrize("op", sorted(SHAPES))
# Update 1 twice, a row of nobody's, one of an update that is on no layer (7), an empty one.
SEGMENTS = (Segment(1, 0, 3), Segment(0, 3, 5), Segment(2, 5, 5), Segment(7, 6, 7), Segment(1, 7, T))


def weights(op: str, kind: str = "dense", seed: int = 0) -> list[Weight]:
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES[op]]
    if kind == "dense":
        return [DenseWeight(w_MN) for w_MN in matrices]
    return [Halves(w_MN * 0.3, w_MN * 0.7) for w_MN in matrices]


def factors(op: str, on: str, seed: int = 1) -> list[dict[int, tuple[Tensor, Tensor]]]:
    """By projection: A and B of the updates that it has; `on` says which, as "012 1 02"."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    made = []
    for (m, n), numbers in zip(SHAPES[op], on.split("-"), strict=True):
        ranks = {int(number): R + int(number) for number in numbers}
        made.append({number: (random(rank, n), random(m, rank)) for number, rank in ranks.items()})
    return made


def run(
    op: str,
    fast: bool,
    x: Tensor,
    weights: list[Weight],
    pairs: list[dict[int, tuple[Tensor, Tensor]]],
    segments: Segments | None,
) -> tuple[Tensor, ...]:
    projections = [
        Projection(
            weight,
            torch.linspace(-1, 1, weight.shape[0], dtype=torch.float64),
            {number: Factors(a, b, 0.5 + number) for number, (a, b) in updates.items()},
            segments,
        )
        for weight, updates in zip(weights, pairs, strict=True)
    ]
    if op == "linears":
        return (lora_linears if fast else lora_linears_plain)(x, projections)
    return ((lora_gated_mlp if fast else lora_gated_mlp_plain)(x, *projections, "silu"),)


def leaves(pairs: list[dict[int, tuple[Tensor, Tensor]]]) -> list[Tensor]:
    return [factor for updates in pairs for pair in updates.values() for factor in pair]


def random_x(seed: int = 2) -> Tensor:
    return torch.randn(T, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@OPS
@pytest.mark.parametrize("kind", ["dense", "halves"])
@pytest.mark.parametrize("on", ["01-01-01", "012-1-0", "-0-12", "--1"])
def test_gradcheck_in_float64(op: str, kind: str, on: str) -> None:
    x, pairs, ws = random_x(), factors(op, on), weights(op, kind)

    def call(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        return run(op, True, x, ws, [{n: (next(rest), next(rest)) for n in updates} for updates in pairs], SEGMENTS)

    used = {segment.update for segment in SEGMENTS if segment.end > segment.start}
    pairs = [{n: pair for n, pair in updates.items() if n in used} for updates in pairs]
    assert torch.autograd.gradcheck(call, (x, *leaves(pairs)))


@settings(deadline=None, max_examples=40)
@given(
    op=st.sampled_from(sorted(SHAPES)),
    kind=st.sampled_from(["dense", "halves"]),
    on=st.lists(st.sampled_from(["", "0", "1", "01", "02", "012"]), min_size=3, max_size=3),
    updates=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    data=st.data(),
)
def test_fast_is_plain_and_each_row_is_what_its_update_makes_of_it_alone(
    op: str, kind: str, on: list[str], updates: list[int], data: Any
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, T), min_size=2 * len(updates), max_size=2 * len(updates))))
    segments = tuple(Segment(u, cuts[2 * i], cuts[2 * i + 1]) for i, u in enumerate(updates))
    x, pairs, ws = random_x(), factors(op, "-".join(on)), weights(op, kind)
    wanted = [x, *leaves(pairs)]
    whole = [run(op, fast, x, ws, pairs, segments) for fast in (True, False)]
    grads = [torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) for y in whole[0]]
    alone = [y.clone() for y in run(op, True, x, ws, [{}, {}, {}], None)]  # rows of no segment are the base's
    for update, start, end in segments:
        one = [{update: given[update]} if update in given else {} for given in pairs]
        for y, part in zip(alone, run(op, True, x[start:end], ws, one, None), strict=True):
            y[start:end] = part
    results = []
    for ys in (*whole, tuple(alone)):
        gradients = torch.autograd.grad(ys, wanted, grads, allow_unused=True)
        results.append(
            [*ys, *(torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wanted, strict=True))]
        )
    for fast, plain, apart in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fast, apart, rtol=1e-9, atol=1e-9)


@OPS
def test_one_segment_over_all_rows_has_the_bits_of_none(op: str) -> None:
    pairs, ws = factors(op, "1-1-1"), weights(op)
    results = []
    for segments in (None, (Segment(1, 0, T),)):
        x = random_x()
        ys = run(op, True, x, ws, pairs, segments)
        results.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *leaves(pairs)])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@OPS
def test_an_update_that_no_row_takes_gets_no_gradient(op: str) -> None:
    pairs = factors(op, "02-02-02")
    run(op, True, random_x(), weights(op), pairs, (Segment(0, 0, T),))[0].sum().backward()
    assert all(factor.grad is None for updates in pairs for factor in updates[2])
    assert pairs[0][0][1].grad is not None


@pytest.mark.parametrize("segments", [(Segment(0, 0, T + 1),), (Segment(0, 4, 3),), (Segment(0, -1, 3),)])
def test_segments_outside_the_pass_are_refused(segments: Segments) -> None:
    with pytest.raises(ValueError, match="segment"):
        run("linears", True, random_x(), weights("linears"), factors("linears", "0-0-0"), segments)


def test_several_updates_want_segments_and_one_inputs_projections_the_same() -> None:
    x, ws, pairs = random_x(), weights("linears"), factors("linears", "01-0-0")
    with pytest.raises(ValueError, match="several"):
        run("linears", True, x, ws, pairs, None)
    one, other = ((Segment(0, 0, 3),), (Segment(0, 0, 4),))
    mixed = [
        Projection(w, None, {0: Factors(*p[0], 1.0)}, s) for w, p, s in zip(ws, pairs, (one, one, other), strict=True)
    ]
    with pytest.raises(ValueError, match="different"):
        lora_linears(x, mixed)


# Weights themselves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "view", "halves"])
def test_a_weight_is_its_matrix(kind: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(N, M).to(dtype).requires_grad_(False)
    made: dict[str, Weight] = {
        "dense": DenseWeight(linear.weight),
        "view": DenseWeight(linear.weight.T.contiguous().T),
        "halves": HalvesLinear(linear).frozen_weight(),
    }
    weight, x, g, c = (
        made[kind],
        torch.randn(T, N, dtype=dtype),
        torch.randn(T, M, dtype=dtype),
        torch.randn(N, R, dtype=dtype),
    )
    w, onto = weight.dense(), torch.randn(T, N, dtype=dtype)
    assert weight.shape == (M, N) and weight.dtype == w.dtype == dtype and weight.device == w.device
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(weight.matmul(x, linear.bias), x @ w.T + linear.bias, **close)
    torch.testing.assert_close(weight.matmul_t(g), g @ w, **close)
    torch.testing.assert_close(weight.times(c), w @ c, **close)
    total = onto.clone()
    assert weight.matmul_t(g, onto=total) is total
    torch.testing.assert_close(total, onto + g @ w, **close)
    index = torch.tensor([3, 0])
    assert torch.equal(weight.rows(index), w[index]) and torch.equal(weight.rows(slice(1, 3)), w[1:3])
    squares = weight.squares()
    assert squares.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(squares, w.to(squares.dtype).square().sum(1), rtol=1e-6, atol=0)
