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

The Functions take and give matrices [T, ·], and leading dimensions are put back outside: a view made inside a Function
may not be written to, and a model may write into what a linear layer returned (Falcon adds attention to the MLP's).

Letters: T rows (tokens), N inputs, M outputs, R rank, K the sum of the ranks of projections of one input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.device import on_gpu


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer and the update beside it; no factors, no update."""

    w_MN: Tensor
    bias_M: Tensor | None = None
    a_RN: Tensor | None = None
    b_MR: Tensor | None = None
    scale: float = 0.0


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
    return lora_linears(x_TN, [Projection(w_MN, bias_M, a_RN, b_MR, scale)])[0]


def lora_linears(x_TN: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Each projection of one x, [..., M] in x's dtype. x is [..., N]; only x and the factors can get gradients."""
    ys: tuple[Tensor, ...] = _LoRALinears.apply(x_TN.reshape(-1, x_TN.shape[-1]), projections, *_factors(projections))
    return tuple(y_TM.view(*x_TN.shape[:-1], y_TM.shape[1]) for y_TM in ys)


def lora_gated_mlp(x_TN: Tensor, gate: Projection, up: Projection, down: Projection, activation: str) -> Tensor:
    """down(act(gate(x)) ∘ up(x)) -> [..., M] in x's dtype. `activation` is a key of `ACTIVATIONS`."""
    three = (gate, up, down)
    y_TM: Tensor = _LoRAGatedMLP.apply(x_TN.reshape(-1, x_TN.shape[-1]), three, activation, *_factors(three))
    return y_TM.view(*x_TN.shape[:-1], y_TM.shape[1])


def lora_linear_plain(
    x_TN: Tensor, w_MN: Tensor, bias_M: Tensor | None, a_RN: Tensor | None, b_MR: Tensor | None, scale: float
) -> Tensor:
    """The same formula through autograd: the twin that `lora_linear` is tested against."""
    if a_RN is None or b_MR is None:
        return F.linear(x_TN, w_MN, bias_M)
    a, b = a_RN.to(x_TN.dtype), b_MR.to(x_TN.dtype)
    return F.linear(x_TN, w_MN, bias_M) + scale * F.linear(F.linear(x_TN, a), b)


def lora_linears_plain(x_TN: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """The twin of `lora_linears`."""
    return tuple(lora_linear_plain(x_TN, p.w_MN, p.bias_M, p.a_RN, p.b_MR, p.scale) for p in projections)


def lora_gated_mlp_plain(x_TN: Tensor, gate: Projection, up: Projection, down: Projection, activation: str) -> Tensor:
    """The twin of `lora_gated_mlp`."""
    g, u = lora_linears_plain(x_TN, [gate, up])
    return lora_linears_plain(ACTIVATIONS[activation].forward(g) * u, [down])[0]


def _gated(g_TI: Tensor, u_TI: Tensor, activation: str) -> Tensor:
    """act(g) ∘ u."""
    if on_gpu(g_TI):
        from deltaw.kernels.triton import gated_forward

        return gated_forward(g_TI, u_TI, activation)
    return ACTIVATIONS[activation].forward(g_TI).mul_(u_TI)


def _gated_back(d_TI: Tensor, g_TI: Tensor, u_TI: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(act(g) ∘ u once more, ∂L/∂g, ∂L/∂u) of D = ∂L/∂(act(g) ∘ u), which may be overwritten."""
    if on_gpu(g_TI):
        from deltaw.kernels.triton import gated_backward

        return gated_backward(d_TI, g_TI, u_TI, activation)
    act = ACTIVATIONS[activation]
    act_g = act.forward(g_TI)
    inner, du = act_g * u_TI, act_g.mul_(d_TI)
    return inner, act.backward(d_TI.mul_(u_TI), g_TI), du


def _project(x_TN: Tensor, projections: Sequence[Projection]) -> tuple[list[Tensor], Tensor | None]:
    """(each output [T, M], H [T, K] or None where nothing has an update)."""
    a_KN = _stacked_a(projections, x_TN.dtype)
    h_TK = None if a_KN is None else x_TN @ a_KN.T
    ys, at = [], 0
    for p in projections:
        y_TM = F.linear(x_TN, p.w_MN, p.bias_M)
        if h_TK is not None and p.b_MR is not None:
            rank = p.b_MR.shape[1]
            y_TM.addmm_(h_TK[:, at : at + rank], p.b_MR.to(x_TN.dtype).T, alpha=p.scale)
            at += rank
        ys.append(y_TM)
    return ys, h_TK


def _back_to_input(p_TK: Tensor | None, grads: Sequence[Tensor], projections: Sequence[Projection]) -> Tensor:
    """∂L/∂x [T, N] = Σ G W + P A."""
    dx_TN = grads[0] @ projections[0].w_MN
    for g_TM, p in zip(grads[1:], projections[1:], strict=True):
        dx_TN.addmm_(g_TM, p.w_MN)
    a_KN = _stacked_a(projections, dx_TN.dtype)
    return dx_TN if p_TK is None or a_KN is None else dx_TN.addmm_(p_TK, a_KN)


def _rank_space(grads: Sequence[Tensor], projections: Sequence[Projection]) -> Tensor | None:
    """P [T, K] = s · G B of each projection with an update, side by side; None where there is none."""
    parts = [
        (g_TM @ p.b_MR.to(g_TM.dtype)).mul_(p.scale)
        for g_TM, p in zip(grads, projections, strict=True)
        if p.b_MR is not None
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1) if parts else None


def _back_to_factors(
    x_TN: Tensor | None,
    h_TK: Tensor | None,
    p_TK: Tensor | None,
    grads: Sequence[Tensor],
    projections: Sequence[Projection],
) -> list[Tensor | None]:
    """∂L/∂A and ∂L/∂B of each projection in turn; None where it has no update."""
    if x_TN is None or h_TK is None or p_TK is None:
        return [None, None] * len(projections)
    da_KN, at = p_TK.T @ x_TN, 0
    factor_grads: list[Tensor | None] = []
    for g_TM, p in zip(grads, projections, strict=True):
        if p.a_RN is None or p.b_MR is None:
            factor_grads += [None, None]
            continue
        rows = slice(at, at + len(p.a_RN))
        # R x M, then transposed: the long side of G is read in the order it lies in memory.
        db_MR = (h_TK[:, rows].T @ g_TM).T.to(p.b_MR.dtype).mul_(p.scale)
        factor_grads += [da_KN[rows].to(p.a_RN.dtype), db_MR]
        at = rows.stop
    return factor_grads


def _stacked_a(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    """[A₁; A₂; …] as [K, N] in `dtype`, or None."""
    parts = [p.a_RN for p in projections if p.a_RN is not None]
    if not parts:
        return None
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _factors(projections: Sequence[Projection]) -> list[Tensor | None]:
    """A and B of each: autograd sees a Function's tensors only where they are arguments of their own."""
    return [factor for p in projections for factor in (p.a_RN, p.b_MR)]


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TN: Tensor, projections: Sequence[Projection], *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ys, h_TK = _project(x_TN, projections)
        # The factors are kept so that autograd sees it when one is written to before the backward.
        ctx.save_for_backward(x_TN if h_TK is not None else None, h_TK, *factors)
        ctx.projections = projections
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TN, h_TK, *_ = ctx.saved_tensors
        p_TK = _rank_space(grads, ctx.projections)
        dx_TN = _back_to_input(p_TK, grads, ctx.projections) if ctx.needs_input_grad[0] else None
        return dx_TN, None, *_back_to_factors(x_TN, h_TK, p_TK, grads, ctx.projections)


class _LoRAGatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TN: Tensor, three: Sequence[Projection], activation: str, *factors: Tensor | None
    ) -> Tensor:
        (g, u), h_TK = _project(x_TN, three[:2])
        (y_TM,), down_TR = _project(_gated(g, u, activation), three[2:])
        ctx.save_for_backward(x_TN if h_TK is not None else None, h_TK, g, u, down_TR, *factors)
        ctx.three, ctx.activation = three, activation
        return y_TM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor | None, ...]:
        x_TN, h_TK, g, u, down_TR, *_ = ctx.saved_tensors
        pair, down = ctx.three[:2], ctx.three[2:]
        rows = [grad_TM]
        down_p = _rank_space(rows, down)
        if h_TK is None and not ctx.needs_input_grad[0]:  # nothing below down_proj trains
            inner = _gated(g, u, ctx.activation)
            return None, None, None, *[None] * 4, *_back_to_factors(inner, down_TR, down_p, rows, down)
        inner, dg, du = _gated_back(_back_to_input(down_p, rows, down), g, u, ctx.activation)
        down_grads = _back_to_factors(inner, down_TR, down_p, rows, down)
        pair_p = _rank_space([dg, du], pair)
        dx_TN = _back_to_input(pair_p, [dg, du], pair) if ctx.needs_input_grad[0] else None
        return dx_TN, None, None, *_back_to_factors(x_TN, h_TK, pair_p, [dg, du], pair), *down_grads
