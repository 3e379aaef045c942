"""y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ with the backward written by hand.

With G = ∂L/∂y and the rank-space products H = x Aᵀ and P = scale · G B, the gradients are

    ∂L/∂A = Pᵀ x        ∂L/∂B = scale · Gᵀ H        ∂L/∂x = G W + P A

(LoRA §4.1 by the chain rule; `docs/math.md` derives them.) W and bias are frozen: they get no gradient, so nothing
that only they would need is kept. Autograd's own graph of the same formula keeps x twice, H, and the [T, M] output
of the low-rank branch, and adds the branches in passes of their own; here x and H alone are kept and the sums ride
on the matrix products (`addmm`).

The factors may be wider than x (float32 masters, bfloat16 activations): they are rounded to x's dtype for the
products, and their gradients come back in their own dtype.

Letters: T rows (tokens), N inputs, M outputs, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_linear(x_TN: Tensor, w_MN: Tensor, bias_M: Tensor | None, a_RN: Tensor, b_MR: Tensor, scale: float) -> Tensor:
    """x Wᵀ + bias + scale (x Aᵀ) Bᵀ -> [..., M] in x's dtype. x is [..., N]; only x, A and B can get gradients."""
    out: Tensor = _LoRALinear.apply(x_TN, w_MN, bias_M, a_RN, b_MR, scale)
    return out


def lora_linear_plain(
    x_TN: Tensor, w_MN: Tensor, bias_M: Tensor | None, a_RN: Tensor, b_MR: Tensor, scale: float
) -> Tensor:
    """The same formula through autograd: the twin that `lora_linear` is tested against."""
    a, b = a_RN.to(x_TN.dtype), b_MR.to(x_TN.dtype)
    return F.linear(x_TN, w_MN, bias_M) + scale * F.linear(F.linear(x_TN, a), b)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_MN: Tensor, bias_M: Tensor | None, a_RN: Tensor, b_MR: Tensor, scale: float
    ) -> Tensor:
        x_TN = x.reshape(-1, x.shape[-1])
        a, b = a_RN.to(x.dtype), b_MR.to(x.dtype)
        h_TR = x_TN @ a.T
        y_TM = F.linear(x_TN, w_MN, bias_M)
        y_TM.addmm_(h_TR, b.T, alpha=scale)
        ctx.save_for_backward(x_TN, h_TR, w_MN, a_RN, b_MR)
        ctx.scale, ctx.shape = scale, x.shape
        return y_TM.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TN, h_TR, w_MN, a_RN, b_MR = ctx.saved_tensors
        g_TM = grad.reshape(-1, grad.shape[-1])
        p_TR = (g_TM @ b_MR.to(g_TM.dtype)).mul_(ctx.scale)
        da_RN = (p_TR.T @ x_TN).to(a_RN.dtype) if ctx.needs_input_grad[3] else None
        # R x M, then transposed: the long side of G is read in the order it lies in memory.
        db_MR = (h_TR.T @ g_TM).T.to(b_MR.dtype).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g_TM @ w_MN).addmm_(p_TR, a_RN.to(g_TM.dtype)).view(ctx.shape)
        return dx, None, None, da_RN, db_MR, None
