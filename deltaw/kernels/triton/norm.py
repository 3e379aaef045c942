"""RMSNorm, alone and behind the residual's addition.

    rms_norm_forward        y = x · r ∘ (offset + w),  r = (mean(x²) + ε)^−½
    rms_norm_backward       dx = r · (h − x · r² · mean(h ∘ x)),  h = dy ∘ (offset + w)
    add_rms_norm_forward    sum = x + delta, rounded;  y and r of it as above
    add_rms_norm_backward   the same dx, and dsum added to it before it is rounded: the gradient of x and of delta

A program takes whole rows, as many as fill a tile (rows of 64 come 64 at a time, one of 16384 alone); a row is one
block, so mean and result need no second pass. The results may be written into wider rows, with room for what the next
product wants behind them.

Letters: T rows, D features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaw.kernels.device import WIDEST
from deltaw.kernels.triton.views import as_rows, power_of_two, uncopied

TILE = 4096  # elements that a program takes, in whole rows


def rms_norm_forward(
    x_TD: Tensor, w_D: Tensor, eps: float, offset: float = 0.0, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y [..., D] in x's dtype or in `out`, r [..., 1] in float32)."""
    y, r_T1 = _room(x_TD, out), _factors(x_TD)
    _forward(x_TD, None, w_D, None, y, r_T1, eps, offset)
    return y, r_T1


def add_rms_norm_forward(
    x_TD: Tensor, delta_TD: Tensor, w_D: Tensor, eps: float, offset: float = 0.0, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + delta [..., D] in x's dtype, y [..., D], its norm, in x's dtype or in `out`, r [..., 1] in float32)."""
    total, y, r_T1 = _room(x_TD), _room(x_TD, out), _factors(x_TD)
    _forward(x_TD, delta_TD, w_D, total, y, r_T1, eps, offset)
    return total, y, r_T1


def rms_norm_backward(
    grad_TD: Tensor, x_TD: Tensor, w_D: Tensor, r_T1: Tensor, offset: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """dx [..., D] in grad's dtype or in `out`."""
    return _backward(grad_TD, None, x_TD, w_D, r_T1, offset, _room(grad_TD, out))


def add_rms_norm_backward(
    grad_TD: Tensor,
    dsum_TD: Tensor,
    sum_TD: Tensor,
    w_D: Tensor,
    r_T1: Tensor,
    offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """∂L/∂x = ∂L/∂delta, [..., D] in grad's dtype or in `out`, of ∂L/∂y = grad and ∂L/∂sum = dsum."""
    return _backward(grad_TD, dsum_TD, sum_TD, w_D, r_T1, offset, _room(grad_TD, out))


def _room(x_TD: Tensor, out: Tensor | None = None) -> Tensor:
    """Room for a result of x's shape: `out` as far as it can be written to where it lies, or rows of its own."""
    if out is None:
        return torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    return uncopied("out", out, x_TD.shape)


def _factors(x_TD: Tensor) -> Tensor:
    return torch.empty(*x_TD.shape[:-1], 1, dtype=torch.float32, device=x_TD.device)


def _forward(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    w_D: Tensor,
    total: Tensor | None,
    y_TD: Tensor,
    r_T1: Tensor,
    eps: float,
    offset: float,
) -> None:
    x, y, tile = as_rows(x_TD), y_TD.view(-1, x_TD.shape[-1]), _tile(x_TD)
    delta = x if delta_TD is None else as_rows(delta_TD)
    tensors = (x, delta, w_D.contiguous(), y if total is None else total, y, r_T1)
    strides = (x.stride(0), delta.stride(0), y.stride(0))
    options = {"D": x.shape[1], "ADDS": delta_TD is not None, **tile}
    with torch.cuda.device_of(x):
        _rms_norm_forward[_grid(x, tile)](*tensors, len(x), *strides, eps, offset, **options)


def _backward(
    grad_TD: Tensor, dsum_TD: Tensor | None, x_TD: Tensor, w_D: Tensor, r_T1: Tensor, offset: float, dx_TD: Tensor
) -> Tensor:
    grad, x, dx, tile = as_rows(grad_TD), as_rows(x_TD), dx_TD.view(-1, x_TD.shape[-1]), _tile(x_TD)
    dsum = grad if dsum_TD is None else as_rows(dsum_TD)
    tensors = (grad, dsum, x, w_D.contiguous(), r_T1.contiguous(), dx)
    strides = (grad.stride(0), dsum.stride(0), x.stride(0), dx.stride(0))
    options = {"D": x.shape[1], "ADDS": dsum_TD is not None, **tile}
    with torch.cuda.device_of(x):
        _rms_norm_backward[_grid(x, tile)](*tensors, len(x), *strides, offset, **options)
    return dx_TD


def _grid(x: Tensor, tile: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(len(x), tile["ROWS"]),)


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
    delta_at: tl.tensor,
    w_at: tl.tensor,
    sum_at: tl.tensor,
    y_at: tl.tensor,
    r_at: tl.tensor,
    rows: tl.tensor,
    x_row: tl.tensor,
    delta_row: tl.tensor,
    y_row: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    D: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    seen = (row < rows)[:, None] & (col < D)[None, :]
    x = tl.load(x_at + row[:, None] * x_row + col[None, :], mask=seen, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(delta_at + row[:, None] * delta_row + col[None, :], mask=seen, other=0.0).to(tl.float32)
        rounded = x.to(sum_at.dtype.element_ty)
        tl.store(sum_at + row[:, None] * D + col[None, :], rounded, mask=seen)
        x = rounded.to(tl.float32)  # what the backward, and whoever reads the sum, has
    gain = tl.load(w_at + col, mask=col < D, other=0.0).to(tl.float32) + offset
    r = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(y_at + row[:, None] * y_row + col[None, :], x * r[:, None] * gain[None, :], mask=seen)
    tl.store(r_at + row, r, mask=row < rows)


@triton.jit
def _rms_norm_backward(
    grad_at: tl.tensor,
    dsum_at: tl.tensor,
    x_at: tl.tensor,
    w_at: tl.tensor,
    r_at: tl.tensor,
    dx_at: tl.tensor,
    rows: tl.tensor,
    grad_row: tl.tensor,
    dsum_row: tl.tensor,
    x_row: tl.tensor,
    dx_row: tl.tensor,
    offset: tl.tensor,
    D: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    seen = (row < rows)[:, None] & (col < D)[None, :]
    x = tl.load(x_at + row[:, None] * x_row + col[None, :], mask=seen, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + row[:, None] * grad_row + col[None, :], mask=seen, other=0.0).to(tl.float32)
    gain = tl.load(w_at + col, mask=col < D, other=0.0).to(tl.float32) + offset
    r = tl.load(r_at + row, mask=row < rows, other=0.0)
    h = grad * gain[None, :]
    mean = tl.sum(h * x, 1) / D
    dx = r[:, None] * (h - x * (r * r * mean)[:, None])
    if ADDS:
        dx += tl.load(dsum_at + row[:, None] * dsum_row + col[None, :], mask=seen, other=0.0).to(tl.float32)
    tl.store(dx_at + row[:, None] * dx_row + col[None, :], dx, mask=seen)
