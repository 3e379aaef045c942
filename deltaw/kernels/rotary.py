"""Rotary position embedding (Su et al. 2021), halves rotated against each other as in GPT-NeoX and Llama.

A head's first R entries are two halves; entry i of the one and of the other turn together by their position's angle:

    y₁ = x₁ ∘ cos − x₂ ∘ sin        y₂ = x₂ ∘ cos + x₁ ∘ sin

The backward is the rotation back, so nothing of x is kept. The usual `x ∘ cos + rotate_half(x) ∘ sin` makes a copy with
its halves exchanged, one negated, and two products, and autograd as many again.

Letters: T tokens, H heads, K key/value heads, E head size, R ≤ E entries that turn, M columns of the whole.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.device import on_gpu


def rotary(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """[T, H, E] turned by the angles of each token; both halves of cos and sin are the same numbers."""
    if not torch.is_grad_enabled():  # a Function's own cost is felt where a pass is one token
        return _turn(x_THE, cos_TR, sin_TR, 1)
    out: Tensor = _Rotary.apply(x_THE, cos_TR, sin_TR)
    return out


def rotary_plain(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The twin, through autograd."""
    turned, rest = x_THE.split([cos_TR.shape[1], x_THE.shape[2] - cos_TR.shape[1]], 2)
    one, two = turned.chunk(2, 2)
    cos, sin = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    return torch.cat([turned * cos + torch.cat([-two, one], 2) * sin, rest], 2)


def turned(x_THE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    """[T, H, E] where all E entries turn, forward alone, in three calls; sin's first half is negative."""
    return torch.addcmul(x_THE * cos_T1E, x_THE.roll(x_THE.shape[2] // 2, -1), sin_T1E)


def turn_(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """`rotary` in x's own place, without a gradient: queries and keys, say, as the first heads of one product."""
    if on_gpu(x_THE):
        from deltaw.kernels.triton import rotary_turn

        return rotary_turn(x_THE, cos_TR, sin_TR, 1, out=x_THE)
    return x_THE.copy_(_turn(x_THE, cos_TR, sin_TR, 1))


def turn_back(dq_THE: Tensor, dk_TKE: Tensor, dv_TKE: Tensor, cos_TR: Tensor, sin_TR: Tensor, out_TM: Tensor) -> Tensor:
    """The gradient of what one product gave, from those of queries and keys that have been turned, and of values: in
    the first (H + 2K) E columns of `out`, which is returned."""
    if on_gpu(dq_THE):
        from deltaw.kernels.triton import rotary_back

        return rotary_back(dq_THE, dk_TKE, dv_TKE, cos_TR, sin_TR, out_TM)
    back = [_turn(dq_THE, cos_TR, sin_TR, -1), _turn(dk_TKE, cos_TR, sin_TR, -1), dv_TKE]
    whole_TM = torch.cat([part.flatten(1) for part in back], 1)
    out_TM[:, : whole_TM.shape[1]] = whole_TM
    return out_TM


def _turn(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor, sign: int) -> Tensor:
    if on_gpu(x_THE):
        from deltaw.kernels.triton import rotary_turn

        return rotary_turn(x_THE, cos_TR, sin_TR, sign)
    half = cos_TR.shape[1] // 2
    cos, sin = cos_TR[:, None, :half].to(x_THE.dtype), sin_TR[:, None, :half].to(x_THE.dtype)
    one, two, rest = x_THE.split([half, half, x_THE.shape[2] - 2 * half], 2)
    y = torch.empty_like(x_THE)
    y_one, y_two, y_rest = y.split([half, half, rest.shape[2]], 2)
    torch.mul(one, cos, out=y_one).addcmul_(two, sin, value=-sign)
    torch.mul(two, cos, out=y_two).addcmul_(one, sin, value=sign)
    y_rest.copy_(rest)
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None
