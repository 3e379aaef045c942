"""Rotary position embedding.

    rotary_turn   y₁ = x₁ ∘ cos − sign · x₂ ∘ sin,  y₂ = x₂ ∘ cos + sign · x₁ ∘ sin,  the rest of a head as it is

One program per token, so that its angles are read once for all heads.

Letters: T tokens, H heads, E head size, R entries that turn.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaw.kernels.triton.views import power_of_two, unit


def rotary_turn(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor, sign: int) -> Tensor:
    """[T, H, E] in x's dtype, turned by the angles (sign 1) or back (sign −1)."""
    (T, H, E), half = x_THE.shape, cos_TR.shape[1] // 2
    x, cos, sin = (unit(part) for part in (x_THE, cos_TR, sin_TR))
    y = torch.empty(T, H, E, dtype=x.dtype, device=x.device)
    rest = E - 2 * half
    sizes = {"HEADS": power_of_two(H), "PART": power_of_two(half), "REST": power_of_two(rest) if rest else 0}
    strides = (x.stride(0), x.stride(1), cos.stride(0), sin.stride(0))
    warps = min(max(sizes["HEADS"] * sizes["PART"] // 256, 1), 8)  # 8 entries, 16 bytes in bfloat16, a thread
    with torch.cuda.device_of(x):
        _rotary_turn[(T,)](x, cos, sin, y, *strides, SIGN=sign, H=H, E=E, HALF=half, **sizes, num_warps=warps)
    return y


@triton.jit
def _rotary_turn(
    x_at: tl.tensor,
    cos_at: tl.tensor,
    sin_at: tl.tensor,
    y_at: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    cos_token: tl.tensor,
    sin_token: tl.tensor,
    SIGN: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, PART)[None, :]
    seen = (head < H) & (i < HALF)
    cos = tl.load(cos_at + token * cos_token + i, mask=i < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_at + token * sin_token + i, mask=i < HALF, other=0.0).to(tl.float32) * SIGN
    x_row = x_at + token * x_token + head * x_head
    y_row = y_at + (token * H + head) * E
    one = tl.load(x_row + i, mask=seen, other=0.0).to(tl.float32)
    two = tl.load(x_row + HALF + i, mask=seen, other=0.0).to(tl.float32)
    tl.store(y_row + i, one * cos - two * sin, mask=seen)
    tl.store(y_row + HALF + i, two * cos + one * sin, mask=seen)
    if REST > 0:
        j = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = (head < H) & (j < E)
        tl.store(y_row + j, tl.load(x_row + j, mask=inside, other=0.0), mask=inside)
