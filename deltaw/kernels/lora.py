"""LoRA projections with the backward written by hand: one linear layer, several of one input, a gated MLP.

For y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ, with G = ∂L/∂y and the rank-space products H = x Aᵀ and P = s · G B,

    ∂L/∂A = Pᵀ x        ∂L/∂B = s · Gᵀ H        ∂L/∂x = G W + P A

(LoRA §4.1 by the chain rule; `docs/math.md` derives them.) W and bias are frozen: they get no gradient, so nothing
that only they would need is kept. Autograd's own graph of the same formula keeps x twice, H, and the [T, M] output
of the low-rank branch, and adds the branches in passes of their own; here x and H alone are kept and the sums ride
on the matrix products (`addmm`).

`lora_linears`: projections that read one x (query, key, value; gate, up). x is kept once; their A stand on top of each
other, so that x is read once for all H and once for all ∂L/∂A, and ∂L/∂x is one sum, again in the products:

    H = x [A₁; A₂; …]ᵀ      ∂L/∂[A₁; A₂; …] = [P₁ P₂ …]ᵀ x      ∂L/∂x = Σ Gᵢ Wᵢ + [P₁ P₂ …] [A₁; A₂; …]

`lora_gated_mlp`: down(act(g) ∘ u) with g, u the gate and up projections of x. Kept are x, g and u; act(g) ∘ u is cheap
and made again in the backward. With D = ∂L/∂(act(g) ∘ u):  ∂L/∂u = D ∘ act(g),  ∂L/∂g = D ∘ u ∘ act′(g).

The factors may be wider than x (float32 masters, bfloat16 activations): they are rounded to x's dtype for the products,
and their gradients come back in their own dtype. Rounding them at each use costs milliseconds of a step of seconds, so
no copy is kept.

A layer may carry several updates, and a pass may hold rows of each (segments.py). The base's product is one for all
rows; each update is added to its own rows, x₁ of x, and gets its gradients from them alone:

    y₁ = x₁ Wᵀ + bias + s (x₁ A₁ᵀ) B₁ᵀ      ∂L/∂A₁ = P₁ᵀ x₁      ∂L/∂B₁ = s G₁ᵀ H₁      ∂L/∂x₁ = G₁ W + P₁ A₁

With one update for all rows these are the calls of the formula above and nothing else. W is a `Weight` (weight.py):
`matmul` and `matmul_t` are all that is asked of it.

The Functions take and give matrices [T, ·], and leading dimensions are put back outside: a view made inside a Function
may not be written to, and a model may write into what a linear layer returned (Falcon adds attention to the MLP's).

Letters: T rows of a pass or a segment, N inputs, M outputs, R rank, K the sum of the ranks of what reads one x.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.device import on_gpu
from deltaw.kernels.segments import Segments
from deltaw.kernels.weight import DenseWeight, Weight


class Factors(NamedTuple):
    """An update as it acts: scale · B A."""

    a_RN: Tensor
    b_MR: Tensor
    scale: float


class Projection(NamedTuple):
    """A frozen linear layer and the updates beside it, by their numbers.

    `segments`: which rows take which; None: all rows take the only one. Rows whose update isn't here are the base's.
    """

    weight: Weight
    bias_M: Tensor | None = None
    updates: Mapping[int, Factors] = MappingProxyType({})
    segments: Segments | None = None


@dataclass(frozen=True)
class Activation:
    """act(g) and D ∘ act′(g), elementwise."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (D, g)


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda g: F.gelu(g, approximate="tanh"), lambda d, g: torch.ops.aten.gelu_backward(d, g, approximate="tanh")
    ),
}


def lora_linear(x_TN: Tensor, w_MN: Tensor, bias_M: Tensor | None, a_RN: Tensor, b_MR: Tensor, scale: float) -> Tensor:
    """x Wᵀ + bias + scale (x Aᵀ) Bᵀ -> [..., M] in x's dtype. x is [..., N]; only x, A and B can get gradients."""
    return lora_linears(x_TN, [Projection(DenseWeight(w_MN), bias_M, {0: Factors(a_RN, b_MR, scale)})])[0]


def lora_linears(x_TN: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Each projection of one x, [..., M] in x's dtype. x is [..., N]; only x and the factors can get gradients."""
    rows_TN = x_TN.reshape(-1, x_TN.shape[-1])
    ys: Sequence[Tensor]
    if torch.is_grad_enabled():
        ys = _LoRALinears.apply(rows_TN, projections, *_factors(projections))
    else:  # a Function's own cost is felt where a pass is one token
        ys, _ = _project(rows_TN, projections, _spans(projections, len(rows_TN)))
    return tuple(y_TM.view(*x_TN.shape[:-1], y_TM.shape[1]) for y_TM in ys)


def lora_gated_mlp(x_TN: Tensor, gate: Projection, up: Projection, down: Projection, activation: str) -> Tensor:
    """down(act(gate(x)) ∘ up(x)) -> [..., M] in x's dtype. `activation` is a key of `ACTIVATIONS`."""
    three, rows_TN = (gate, up, down), x_TN.reshape(-1, x_TN.shape[-1])
    y_TM: Tensor
    if torch.is_grad_enabled():
        y_TM = _LoRAGatedMLP.apply(rows_TN, three, activation, *_factors(three))
    else:
        g, u = _project(rows_TN, three[:2], _spans(three[:2], len(rows_TN)))[0]
        y_TM = _project(gated(g, u, activation), three[2:], _spans(three[2:], len(rows_TN)))[0][0]
    return y_TM.view(*x_TN.shape[:-1], y_TM.shape[1])


def lora_linear_plain(
    x_TN: Tensor, w_MN: Tensor, bias_M: Tensor | None, a_RN: Tensor, b_MR: Tensor, scale: float
) -> Tensor:
    """The same formula through autograd: the twin that `lora_linear` is tested against."""
    return _plain(x_TN, Projection(DenseWeight(w_MN), bias_M, {0: Factors(a_RN, b_MR, scale)}))


def lora_linears_plain(x_TN: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """The twin of `lora_linears`."""
    return tuple(_plain(x_TN, p) for p in projections)


def lora_gated_mlp_plain(x_TN: Tensor, gate: Projection, up: Projection, down: Projection, activation: str) -> Tensor:
    """The twin of `lora_gated_mlp`."""
    g, u = lora_linears_plain(x_TN, [gate, up])
    return lora_linears_plain(ACTIVATIONS[activation].forward(g) * u, [down])[0]


def _plain(x_TN: Tensor, projection: Projection) -> Tensor:
    """The same of a projection, on the matrix itself."""
    y_TM = F.linear(x_TN, projection.weight.dense(), projection.bias_M)
    if projection.segments is None:
        for a_RN, b_MR, scale in projection.updates.values():  # one at most
            y_TM = y_TM + scale * F.linear(F.linear(x_TN, a_RN.to(x_TN.dtype)), b_MR.to(x_TN.dtype))
        return y_TM
    rows_TN, low_TM = x_TN.reshape(-1, x_TN.shape[-1]), torch.zeros_like(y_TM).view(-1, y_TM.shape[-1])
    for update, start, end in projection.segments:
        if factors := projection.updates.get(update):
            a, b = factors.a_RN.to(x_TN.dtype), factors.b_MR.to(x_TN.dtype)
            low_TM[start:end] = factors.scale * F.linear(F.linear(rows_TN[start:end], a), b)
    return y_TM + low_TM.view_as(y_TM)


def gated(g_TI: Tensor, u_TI: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """act(g) ∘ u, in `out` where that is given."""
    if on_gpu(g_TI):
        from deltaw.kernels.triton import gated_forward

        return gated_forward(g_TI, u_TI, activation, out=out)
    inner = ACTIVATIONS[activation].forward(g_TI).mul_(u_TI)
    return inner if out is None else out.copy_(inner)


def gated_back(
    d_TI: Tensor, g_TI: Tensor, u_TI: Tensor, activation: str, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(act(g) ∘ u once more, ∂L/∂g, ∂L/∂u) of D = ∂L/∂(act(g) ∘ u), which may be overwritten; in `out` where that is
    given."""
    if on_gpu(g_TI):
        from deltaw.kernels.triton import gated_backward

        return gated_backward(d_TI, g_TI, u_TI, activation, out=out)
    act = ACTIVATIONS[activation]
    act_g = act.forward(g_TI)
    inner, du = act_g * u_TI, act_g.mul_(d_TI)
    found = inner, act.backward(d_TI.mul_(u_TI), g_TI), du
    if out is None:
        return found
    torch._foreach_copy_(list(out), list(found))
    return out


class _Span(NamedTuple):
    """Rows that take the same updates: all (None), or a segment. By projection: the update and its number, if any."""

    rows: slice | None
    updates: tuple[tuple[int, Factors] | None, ...]

    def of(self, x_TN: Tensor) -> Tensor:
        """Its rows of a matrix: the matrix itself, or a view."""
        return x_TN if self.rows is None else x_TN[self.rows]

    def stacked_a(self, dtype: torch.dtype) -> Tensor:
        """[A₁; A₂; …] as [K, N] in `dtype`."""
        parts = [update[1].a_RN for update in self.updates if update is not None]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _spans(projections: Sequence[Projection], rows: int) -> list[_Span]:
    """The spans with an update, in a pass of so many rows. Raises ValueError for segments that lie outside it, and
    where the projections' differ."""
    adapted = [p for p in projections if p.updates]
    if not adapted:
        return []
    segments = adapted[0].segments
    if any(p.segments != segments for p in adapted[1:]):
        raise ValueError("projections of one input with different segments")
    if segments is None:
        if any(len(p.updates) > 1 for p in adapted):
            raise ValueError("several updates, and no segments that say which rows take which")
        return [_Span(None, tuple(next(iter(p.updates.items()), None) for p in projections))]
    spans = []
    for update, start, end in segments:
        if not 0 <= start <= end <= rows:
            raise ValueError(f"a segment of the rows {start} to {end}, of {rows}")
        taken = tuple((update, p.updates[update]) if update in p.updates else None for p in projections)
        if end > start and any(one is not None for one in taken):
            spans.append(_Span(slice(start, end), taken))
    return spans


def _project(
    x_TN: Tensor, projections: Sequence[Projection], spans: Sequence[_Span]
) -> tuple[list[Tensor], list[Tensor]]:
    """(each output [T, M], H [T, K] of each span)."""
    hs = [span.of(x_TN) @ span.stacked_a(x_TN.dtype).T for span in spans]
    ys, at = [], [0] * len(spans)
    for number, p in enumerate(projections):
        y_TM = p.weight.matmul(x_TN, p.bias_M)
        for i, span in enumerate(spans):
            if (update := span.updates[number]) is not None:
                _, (_, b_MR, scale) = update
                rank = b_MR.shape[1]
                span.of(y_TM).addmm_(hs[i][:, at[i] : at[i] + rank], b_MR.to(x_TN.dtype).T, alpha=scale)
                at[i] += rank
        ys.append(y_TM)
    return ys, hs


def _back_to_input(
    ps: Sequence[Tensor], grads: Sequence[Tensor], projections: Sequence[Projection], spans: Sequence[_Span]
) -> Tensor:
    """∂L/∂x [T, N] = Σ G W + P A."""
    dx_TN = projections[0].weight.matmul_t(grads[0])
    for g_TM, p in zip(grads[1:], projections[1:], strict=True):
        p.weight.matmul_t(g_TM, onto=dx_TN)
    for p_TK, span in zip(ps, spans, strict=True):
        span.of(dx_TN).addmm_(p_TK, span.stacked_a(dx_TN.dtype))
    return dx_TN


def _rank_space(grads: Sequence[Tensor], spans: Sequence[_Span]) -> list[Tensor]:
    """P [T, K] = s · G B of each span: those of the projections with an update, side by side."""
    ps = []
    for span in spans:
        parts = [
            (span.of(g_TM) @ update[1].b_MR.to(g_TM.dtype)).mul_(update[1].scale)
            for g_TM, update in zip(grads, span.updates, strict=True)
            if update is not None
        ]
        ps.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
    return ps


def _back_to_factors(
    x_TN: Tensor | None,
    hs: Sequence[Tensor],
    ps: Sequence[Tensor],
    grads: Sequence[Tensor],
    projections: Sequence[Projection],
    spans: Sequence[_Span],
) -> list[Tensor | None]:
    """∂L/∂A and ∂L/∂B of each update of each projection in turn; None where no row took it."""
    sums: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for h_TK, p_TK, span in zip(hs, ps, spans, strict=True):
        assert x_TN is not None
        da_KN, at = p_TK.T @ span.of(x_TN), 0
        for number, (g_TM, update) in enumerate(zip(grads, span.updates, strict=True)):
            if update is None:
                continue
            key, (a_RN, b_MR, scale) = (number, update[0]), update[1]
            rows = slice(at, at + len(a_RN))
            # R x M, then transposed: the long side of G is read in the order it lies in memory.
            db_MR = (h_TK[:, rows].T @ span.of(g_TM)).T.to(b_MR.dtype).mul_(scale)
            da_RN = da_KN[rows].to(a_RN.dtype)
            if key in sums:  # another segment of the same update
                da_RN, db_MR = da_RN + sums[key][0], db_MR + sums[key][1]
            sums[key], at = (da_RN, db_MR), rows.stop
    return [
        gradient
        for number, p in enumerate(projections)
        for update in p.updates
        for gradient in sums.get((number, update), (None, None))
    ]


def _factors(projections: Sequence[Projection]) -> list[Tensor]:
    """A and B of each update of each: autograd sees a Function's tensors only where they are arguments of their own."""
    return [factor for p in projections for update in p.updates.values() for factor in update[:2]]


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TN: Tensor, projections: Sequence[Projection], *factors: Tensor) -> tuple[Tensor, ...]:
        spans = _spans(projections, len(x_TN))
        ys, hs = _project(x_TN, projections, spans)
        # The factors are kept so that autograd sees it when one is written to before the backward.
        ctx.save_for_backward(x_TN if spans else None, *hs, *factors)
        ctx.projections, ctx.spans = projections, spans
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        projections, spans = ctx.projections, ctx.spans
        x_TN, *saved = ctx.saved_tensors
        hs, ps = saved[: len(spans)], _rank_space(grads, spans)
        dx_TN = _back_to_input(ps, grads, projections, spans) if ctx.needs_input_grad[0] else None
        return dx_TN, None, *_back_to_factors(x_TN, hs, ps, grads, projections, spans)


class _LoRAGatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TN: Tensor, three: Sequence[Projection], activation: str, *factors: Tensor) -> Tensor:
        pair, down = _spans(three[:2], len(x_TN)), _spans(three[2:], len(x_TN))
        (g, u), pair_hs = _project(x_TN, three[:2], pair)
        (y_TM,), down_hs = _project(gated(g, u, activation), three[2:], down)
        ctx.save_for_backward(x_TN if pair else None, g, u, *pair_hs, *down_hs, *factors)
        ctx.three, ctx.activation, ctx.spans = three, activation, (pair, down)
        return y_TM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        (pair, down), three, rows = ctx.spans, ctx.three, [grad_TM]
        x_TN, g, u, *saved = ctx.saved_tensors
        pair_hs, down_hs = saved[: len(pair)], saved[len(pair) : len(pair) + len(down)]
        down_ps = _rank_space(rows, down)
        if not pair and not ctx.needs_input_grad[0]:  # nothing below down_proj trains
            inner, nothing = gated(g, u, ctx.activation), [None] * len(_factors(three[:2]))
            return None, None, None, *nothing, *_back_to_factors(inner, down_hs, down_ps, rows, three[2:], down)
        inner, dg, du = gated_back(_back_to_input(down_ps, rows, three[2:], down), g, u, ctx.activation)
        down_grads = _back_to_factors(inner, down_hs, down_ps, rows, three[2:], down)
        pair_ps = _rank_space([dg, du], pair)
        dx_TN = _back_to_input(pair_ps, [dg, du], three[:2], pair) if ctx.needs_input_grad[0] else None
        pair_grads = _back_to_factors(x_TN, pair_hs, pair_ps, [dg, du], three[:2], pair)
        return dx_TN, None, None, *pair_grads, *down_grads
