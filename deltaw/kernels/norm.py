"""RMSNorm with the backward written by hand (Zhang & Sennrich 2019).

    y = x · r ∘ (offset + w),   r = (mean(x²) + ε)^−½        per row; offset is 1 where a model keeps w − 1 (Gemma)
    ∂L/∂x = r · (h − x · r² · mean(h ∘ x)),   h = ∂L/∂y ∘ (offset + w)

w is frozen. Only x and r (one number per row) are kept; x is the residual stream, which is there anyway. All sums are
in float32 and y is rounded once; the module that this stands in for rounds twice or makes five float32 copies (a
forward and backward of 2048 x 576 float32 in transformers' Llama: 3.7 ms on two cores, here 1.5 ms).

`add_rms_norm`: the residual's addition and the norm behind it, both of whose results the layer goes on with. Of the
gradients of the two, ∂L/∂x = ∂L/∂delta is the norm's with the sum's added to it; on a GPU each is one kernel. Without a
delta it is x and its norm, and the backward's addition alone.

Letters: T rows, D features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.device import on_gpu
from deltaw.kernels.room import give_room, rows_with_room


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float, offset: float = 0.0, room: int = 0) -> Tensor:
    """[..., D] in x's dtype. Only x can get a gradient. `room`: columns that are to be free behind the result
    (room.py)."""
    if room:
        return give_room(_RMSNorm.apply(x_TD, w_D, eps, offset, room), room)
    one_call = x_TD.dtype == torch.float32 or (x_TD.dtype == torch.bfloat16 and not x_TD.is_cuda)
    if one_call and torch.is_inference_mode_enabled() and not offset and x_TD.dtype == w_D.dtype:
        return F.rms_norm(x_TD, w_D.shape, w_D, eps)  # in one call: decoding
    if not torch.is_grad_enabled():  # a Function's own cost is felt where a pass is one token
        return _normed(x_TD, w_D, eps, offset, on_gpu(x_TD, x_TD.shape[-1]))[0]
    out: Tensor = _RMSNorm.apply(x_TD, w_D, eps, offset, 0)
    return out


def add_rms_norm(
    x_TD: Tensor, delta_TD: Tensor | None, w_D: Tensor, eps: float, offset: float = 0.0, room: int = 0
) -> tuple[Tensor, Tensor]:
    """(x + delta, its norm), both [..., D] in x's dtype, which is delta's; (x, its norm) without a delta. Only x and
    delta can get a gradient. `room`: behind the norm."""
    if room:
        total, y = _AddRMSNorm.apply(x_TD, delta_TD, w_D, eps, offset, room)
        return total, give_room(y, room)
    if not torch.is_grad_enabled():
        return _added(x_TD, delta_TD, w_D, eps, offset, on_gpu(x_TD, x_TD.shape[-1]))[:2]
    out: tuple[Tensor, Tensor] = _AddRMSNorm.apply(x_TD, delta_TD, w_D, eps, offset, 0)
    return out


def rms_norm_plain(x_TD: Tensor, w_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The twin, through autograd."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x = x_TD.to(wide)
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * r * (offset + w_D.to(wide))).to(x_TD.dtype)


def add_rms_norm_plain(
    x_TD: Tensor, delta_TD: Tensor, w_D: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The twin, through autograd."""
    total = x_TD + delta_TD
    return total, rms_norm_plain(total, w_D, eps, offset)


def _gain(w_D: Tensor, offset: float, wide: torch.dtype) -> Tensor:
    return w_D.to(wide) + offset if offset else w_D.to(wide)


def _normed(x: Tensor, w_D: Tensor, eps: float, offset: float, gpu: bool, room: int = 0) -> tuple[Tensor, Tensor]:
    """(y, r)."""
    out = rows_with_room(x, room) if room else None
    if gpu:
        from deltaw.kernels.triton import rms_norm_forward

        return rms_norm_forward(x, w_D, eps, offset, out)
    wide = torch.promote_types(x.dtype, torch.float32)
    wide_x = x.to(wide)  # at once: operations on two dtypes are slow on a CPU
    # Norm first: one pass over x, no copy of its squares.
    norm_T1 = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
    r_T1 = torch.rsqrt(norm_T1.square_().div_(x.shape[-1]).add_(eps))
    y = (wide_x * r_T1).mul_(_gain(w_D, offset, wide))
    return y.to(x.dtype) if out is None else out.copy_(y), r_T1


def _added(
    x: Tensor, delta: Tensor | None, w_D: Tensor, eps: float, offset: float, gpu: bool, room: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + delta, y, r)."""
    if delta is None:
        return x, *_normed(x, w_D, eps, offset, gpu, room)
    if gpu:
        from deltaw.kernels.triton import add_rms_norm_forward

        return add_rms_norm_forward(x, delta, w_D, eps, offset, rows_with_room(x, room) if room else None)
    total = x + delta
    return total, *_normed(total, w_D, eps, offset, gpu, room)


def _back(grad: Tensor, x: Tensor, w_D: Tensor, r_T1: Tensor, offset: float, dsum: Tensor | None, gpu: bool) -> Tensor:
    """∂L/∂x of the norm of x, and what else reached x added to it."""
    if gpu:
        from deltaw.kernels.triton import add_rms_norm_backward, rms_norm_backward

        if dsum is None:
            return rms_norm_backward(grad, x, w_D, r_T1, offset)
        return add_rms_norm_backward(grad, dsum, x, w_D, r_T1, offset)
    h = grad.to(r_T1.dtype) * _gain(w_D, offset, r_T1.dtype)
    x = x.to(r_T1.dtype)
    mean_T1 = torch.linalg.vecdot(h, x).unsqueeze(-1).div_(x.shape[-1])
    dx = h.mul_(r_T1).addcmul_(x, mean_T1.mul_(r_T1.pow(3)), value=-1)
    return (dx if dsum is None else dx.add_(dsum)).to(grad.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_D: Tensor, eps: float, offset: float, room: int) -> Tensor:
        ctx.offset, ctx.gpu = offset, on_gpu(x, x.shape[-1])
        y, r_T1 = _normed(x, w_D, eps, offset, ctx.gpu, room)
        ctx.save_for_backward(x, w_D, r_T1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_D, r_T1 = ctx.saved_tensors
        return _back(grad, x, w_D, r_T1, ctx.offset, None, ctx.gpu), None, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, w_D: Tensor, eps: float, offset: float, room: int
    ) -> tuple[Tensor, Tensor]:
        ctx.offset, ctx.gpu = offset, on_gpu(x, x.shape[-1])
        ctx.set_materialize_grads(False)
        total, y, r_T1 = _added(x, delta, w_D, eps, offset, ctx.gpu, room)
        ctx.save_for_backward(total, w_D, r_T1)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        total, w_D, r_T1 = ctx.saved_tensors
        dx = dsum if grad is None else _back(grad, total, w_D, r_T1, ctx.offset, dsum, ctx.gpu)
        return dx, dx if ctx.needs_input_grad[1] else None, None, None, None, None
