"""The gated MLP's element-wise half.

    gated_forward    inner = act(g) ∘ u
    gated_backward   inner again,  dg = d ∘ u ∘ act′(g),  du = d ∘ act(g)

Every matrix has a row stride of its own, so that g and u may be the halves of one product [T, 2I], and dg and du
columns of the matrix that the next product reads: nothing is split or joined by a copy. A program takes BLOCK columns
of one row, 16 bytes of a bfloat16 row for each thread; where I and the strides are multiples of 16, Triton compiles a
version of the kernel that knows it and moves those at once. Programs are numbered row by row along one axis, since a
grid's second ends at 65535.

Letters: T rows, I inner size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaw.kernels.triton.tanh import tanh
from deltaw.kernels.triton.views import uncopied

BLOCK = 1024


def gated_forward(g_TI: Tensor, u_TI: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """act(g) ∘ u, [T, I] in g's dtype or in `out`, which is returned; `activation` is a key of lora.py's ACTIVATIONS.

    Rows may lie as far apart as they like in each. Raises ValueError where the entries of a row don't lie side by side.
    """
    inner = _fresh(g_TI) if out is None else out
    tensors = [uncopied(name, x, g_TI.shape) for name, x in {"g": g_TI, "u": u_TI, "inner": inner}.items()]
    grid, block = _grid(g_TI)
    with torch.cuda.device_of(g_TI):
        _gated_forward[grid](
            *tensors, g_TI.shape[1], *_strides(tensors), ACT=activation, BLOCK=block, num_warps=block // 256
        )
    return inner


def gated_backward(
    d_TI: Tensor, g_TI: Tensor, u_TI: Tensor, activation: str, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(act(g) ∘ u, ∂L/∂g, ∂L/∂u) for d = ∂L/∂(act(g) ∘ u), each [T, I] in g's dtype or in its part of `out`.

    Rows may lie as far apart as they like in each. Raises ValueError where the entries of a row don't lie side by side.
    """
    inner, dg, du = out or (_fresh(g_TI), _fresh(g_TI), _fresh(g_TI))
    named = {"d": d_TI, "g": g_TI, "u": u_TI, "inner": inner, "dg": dg, "du": du}
    tensors = [uncopied(name, x, g_TI.shape) for name, x in named.items()]
    grid, block = _grid(g_TI)
    with torch.cuda.device_of(g_TI):
        _gated_backward[grid](
            *tensors, g_TI.shape[1], *_strides(tensors), ACT=activation, BLOCK=block, num_warps=block // 256
        )
    return inner, dg, du


def _fresh(x_TI: Tensor) -> Tensor:
    """Room for another such, its rows one after the other, whatever x's own lie in."""
    return torch.empty(x_TI.shape, dtype=x_TI.dtype, device=x_TI.device)


def _grid(x_TI: Tensor) -> tuple[tuple[int], int]:
    """(programs, columns of one): half a block where a whole one would leave half of the last empty."""
    rows, width = x_TI.shape
    block = BLOCK // 2 if 0 < width % BLOCK <= BLOCK // 2 else BLOCK
    return (rows * triton.cdiv(width, block),), block


def _strides(tensors: list[Tensor]) -> list[int]:
    return [x.stride(0) for x in tensors]


@triton.jit
def _act(g: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """(act(g), act′(g)); what a caller does not use, the compiler drops."""
    if ACT == "silu":
        s = tl.sigmoid(g)
        value = g * s
        slope = s * (1.0 + g * (1.0 - s))
    elif ACT == "gelu":
        below = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * below
        slope = below + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        tl.static_assert(ACT == "gelu_tanh")
        t, bend = tanh(0.7978845608028654 * g * (1.0 + 0.044715 * g * g))
        value = 0.5 * g * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * g * bend * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
    return value, slope


@triton.jit
def _gated_forward(
    g_at: tl.tensor,
    u_at: tl.tensor,
    inner_at: tl.tensor,
    width: tl.tensor,
    g_row: tl.tensor,
    u_row: tl.tensor,
    inner_row: tl.tensor,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    seen = col < width
    g = tl.load(g_at + row * g_row + col, mask=seen, other=0.0).to(tl.float32)
    u = tl.load(u_at + row * u_row + col, mask=seen, other=0.0).to(tl.float32)
    value, _ = _act(g, ACT)
    tl.store(inner_at + row * inner_row + col, value * u, mask=seen)


@triton.jit
def _gated_backward(
    d_at: tl.tensor,
    g_at: tl.tensor,
    u_at: tl.tensor,
    inner_at: tl.tensor,
    dg_at: tl.tensor,
    du_at: tl.tensor,
    width: tl.tensor,
    d_row: tl.tensor,
    g_row: tl.tensor,
    u_row: tl.tensor,
    inner_row: tl.tensor,
    dg_row: tl.tensor,
    du_row: tl.tensor,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    seen = col < width
    d = tl.load(d_at + row * d_row + col, mask=seen, other=0.0).to(tl.float32)
    g = tl.load(g_at + row * g_row + col, mask=seen, other=0.0).to(tl.float32)
    u = tl.load(u_at + row * u_row + col, mask=seen, other=0.0).to(tl.float32)
    value, slope = _act(g, ACT)
    tl.store(inner_at + row * inner_row + col, value * u, mask=seen)
    tl.store(dg_at + row * dg_row + col, d * u * slope, mask=seen)
    tl.store(du_at + row * du_row + col, d * value, mask=seen)
