"""RMSNorm.

    rms_norm_forward    y = x · r ∘ (offset + w),  r = (mean(x²) + ε)^−½
    rms_norm_backward   dx = r · (h − x · r² · mean(h ∘ x)),  h = dy ∘ (offset + w)

A program takes whole rows, as many as fill a tile (rows of 64 come 64 at a time, one of 16384 alone); a row is one
block, so mean and result need no second pass.

Letters: T rows, D features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaw.kernels.device import WIDEST
from deltaw.kernels.triton.views import as_rows, power_of_two

TILE = 4096  # elements that a program takes, in whole rows


def rms_norm_forward(x_TD: Tensor, w_D: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(y [..., D] in x's dtype, r [..., 1] in float32)."""
    x, tile = as_rows(x_TD), _tile(x_TD)
    y = torch.empty(x_TD.shape, dtype=x.dtype, device=x.device)
    r_T1 = torch.empty(*x_TD.shape[:-1], 1, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(len(x), tile["ROWS"]),)
    with torch.cuda.device_of(x):
        _rms_norm_forward[grid](x, w_D.contiguous(), y, r_T1, len(x), x.stride(0), eps, offset, D=x.shape[1], **tile)
    return y, r_T1


def rms_norm_backward(grad_TD: Tensor, x_TD: Tensor, w_D: Tensor, r_T1: Tensor, offset: float = 0.0) -> Tensor:
    """dx [..., D] in grad's dtype."""
    grad, x, tile = as_rows(grad_TD), as_rows(x_TD), _tile(x_TD)
    dx = torch.empty(grad_TD.shape, dtype=grad.dtype, device=grad.device)
    grid = (triton.cdiv(len(x), tile["ROWS"]),)
    pointers = (grad, x, w_D.contiguous(), r_T1.contiguous(), dx)
    with torch.cuda.device_of(x):
        _rms_norm_backward[grid](*pointers, len(x), grad.stride(0), x.stride(0), offset, D=x.shape[1], **tile)
    return dx


def _tile(x_TD: Tensor) -> dict[str, int]:
    """Rows, width and warps of one program of the norm."""
    size = x_TD.shape[-1]
    if size > WIDEST:
        raise ValueError(f"rows of {size} features: the kernel holds one in a block of at most {WIDEST}")
    block = power_of_two(size)
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": 8 if block <= 8192 else 16}


@triton.jit
def _rms_norm_forward(
    x_at: tl.tensor,
    w_at: tl.tensor,
    y_at: tl.tensor,
    r_at: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    seen = (row < rows)[:, None] & (col < D)[None, :]
    x = tl.load(x_at + row[:, None] * stride + col[None, :], mask=seen, other=0.0).to(tl.float32)
    gain = tl.load(w_at + col, mask=col < D, other=0.0).to(tl.float32) + offset
    r = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(y_at + row[:, None] * D + col[None, :], x * r[:, None] * gain[None, :], mask=seen)
    tl.store(r_at + row, r, mask=row < rows)


@triton.jit
def _rms_norm_backward(
    grad_at: tl.tensor,
    x_at: tl.tensor,
    w_at: tl.tensor,
    r_at: tl.tensor,
    dx_at: tl.tensor,
    rows: tl.tensor,
    grad_stride: tl.tensor,
    x_stride: tl.tensor,
    offset: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    seen = (row < rows)[:, None] & (col < D)[None, :]
    x = tl.load(x_at + row[:, None] * x_stride + col[None, :], mask=seen, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + row[:, None] * grad_stride + col[None, :], mask=seen, other=0.0).to(tl.float32)
    gain = tl.load(w_at + col, mask=col < D, other=0.0).to(tl.float32) + offset
    r = tl.load(r_at + row, mask=row < rows, other=0.0)
    h = grad * gain[None, :]
    mean = tl.sum(h * x, 1) / D
    dx = r[:, None] * (h - x * (r * r * mean)[:, None])
    tl.store(dx_at + row[:, None] * D + col[None, :], dx, mask=seen)
