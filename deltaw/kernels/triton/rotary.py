"""Rotary position embedding.

    rotary_turn   y₁ = x₁ ∘ cos − sign · x₂ ∘ sin,  y₂ = x₂ ∘ cos + sign · x₁ ∘ sin,  the rest of a head as it is
    rotary_back   the gradients of queries, keys and values side by side: the first two turned back, the last as it is

One program per token, so that its angles are read once for all heads. Queries and keys that one product made are heads
of one matrix, turned where they lie: a program has read its token's entries before it writes any of them.

Letters: T tokens, H heads, K key/value heads, E head size, R entries that turn, M columns of the whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaw.kernels.triton.views import power_of_two, uncopied, unit


def rotary_turn(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor, sign: int, out: Tensor | None = None) -> Tensor:
    """[T, H, E] in x's dtype, turned by the angles (sign 1) or back (sign −1); in `out`, if given, which may be x."""
    (T, H, E), half = x_THE.shape, cos_TR.shape[1] // 2
    x, cos, sin = (unit(part) for part in (x_THE, cos_TR, sin_TR))
    y = torch.empty(T, H, E, dtype=x.dtype, device=x.device) if out is None else uncopied("out", out, x_THE.shape)
    sizes = {"HEADS": power_of_two(H), **_head(E, half)}
    strides = (*x.stride()[:2], *y.stride()[:2], cos.stride(0), sin.stride(0))
    warps = _warps(sizes["HEADS"] * sizes["PART"])
    with torch.cuda.device_of(x):
        _rotary_turn[(T,)](x, cos, sin, y, *strides, SIGN=sign, H=H, E=E, HALF=half, **sizes, num_warps=warps)
    return y


def rotary_back(
    dq_THE: Tensor, dk_TKE: Tensor, dv_TKE: Tensor, cos_TR: Tensor, sin_TR: Tensor, out_TM: Tensor
) -> Tensor:
    """[dq turned back, dk turned back, dv] in the first (H + 2K) E columns of `out`, M of them or more; returns `out`.

    Raises ValueError where there are fewer, and where a row's entries in `out` don't lie side by side."""
    (T, H, E), K, half = dq_THE.shape, dk_TKE.shape[1], cos_TR.shape[1] // 2
    y = uncopied("out", out_TM[:, : (H + 2 * K) * E], torch.Size((T, (H + 2 * K) * E)))
    parts = [unit(part) for part in (dq_THE, dk_TKE, dv_TKE, cos_TR, sin_TR)]
    strides = [stride for part in parts[:3] for stride in part.stride()[:2]]
    sizes = {"HEADS": power_of_two(H), "SHARED": power_of_two(K), "WHOLE": power_of_two(E), **_head(E, half)}
    strides += [y.stride(0), parts[3].stride(0), parts[4].stride(0)]
    warps = _warps(sizes["HEADS"] * sizes["PART"])
    with torch.cuda.device_of(y):
        _rotary_back[(T,)](*parts, y, *strides, H=H, K=K, E=E, HALF=half, **sizes, num_warps=warps)
    return out_TM


def _head(size: int, half: int) -> dict[str, int]:
    """Blocks for half of what turns of a head, and for what doesn't."""
    rest = size - 2 * half
    return {"PART": power_of_two(half), "REST": power_of_two(rest) if rest else 0}


def _warps(entries: int) -> int:
    return min(max(entries // 256, 1), 8)  # 8 entries, 16 bytes in bfloat16, a thread


@triton.jit
def _turn_heads(
    x_row: tl.tensor,
    x_head: tl.tensor,
    y_row: tl.tensor,
    y_head: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    H: tl.constexpr,
    E: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """The heads of one token, by its angles [1, PART]."""
    head = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, PART)[None, :]
    seen = (head < H) & (i < HALF)
    x_row += head * x_head
    y_row += head * y_head
    one = tl.load(x_row + i, mask=seen, other=0.0).to(tl.float32)
    two = tl.load(x_row + HALF + i, mask=seen, other=0.0).to(tl.float32)
    tl.store(y_row + i, one * cos - two * sin, mask=seen)
    tl.store(y_row + HALF + i, two * cos + one * sin, mask=seen)
    if REST > 0:
        j = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = (head < H) & (j < E)
        tl.store(y_row + j, tl.load(x_row + j, mask=inside, other=0.0), mask=inside)


@triton.jit
def _rotary_turn(
    x_at: tl.tensor,
    cos_at: tl.tensor,
    sin_at: tl.tensor,
    y_at: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    y_token: tl.tensor,
    y_head: tl.tensor,
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
    i = tl.arange(0, PART)[None, :]
    cos = tl.load(cos_at + token * cos_token + i, mask=i < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_at + token * sin_token + i, mask=i < HALF, other=0.0).to(tl.float32) * SIGN
    x_row = x_at + token * x_token
    y_row = y_at + token * y_token
    _turn_heads(x_row, x_head, y_row, y_head, cos, sin, H, E, HALF, HEADS, PART, REST)


@triton.jit
def _rotary_back(
    dq_at: tl.tensor,
    dk_at: tl.tensor,
    dv_at: tl.tensor,
    cos_at: tl.tensor,
    sin_at: tl.tensor,
    y_at: tl.tensor,
    dq_token: tl.tensor,
    dq_head: tl.tensor,
    dk_token: tl.tensor,
    dk_head: tl.tensor,
    dv_token: tl.tensor,
    dv_head: tl.tensor,
    y_token: tl.tensor,
    cos_token: tl.tensor,
    sin_token: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PART)[None, :]
    cos = tl.load(cos_at + token * cos_token + i, mask=i < HALF, other=0.0).to(tl.float32)
    sin = -tl.load(sin_at + token * sin_token + i, mask=i < HALF, other=0.0).to(tl.float32)
    y_row = y_at + token * y_token
    _turn_heads(dq_at + token * dq_token, dq_head, y_row, E, cos, sin, H, E, HALF, HEADS, PART, REST)
    _turn_heads(dk_at + token * dk_token, dk_head, y_row + H * E, E, cos, sin, K, E, HALF, SHARED, PART, REST)
    head = tl.arange(0, SHARED)[:, None]
    j = tl.arange(0, WHOLE)[None, :]
    seen = (head < K) & (j < E)
    dv = tl.load(dv_at + token * dv_token + head * dv_head + j, mask=seen, other=0.0)
    tl.store(y_row + (H + K) * E + head * E + j, dv, mask=seen)
