"""The gated MLP's element-wise half with the thin products that read its results.

    gated_ranked        [v  v a],  v = act(g) ∘ u
    gated_ranked_back   v again, and [dg du  dg s + du s′],  dg = d ∘ u ∘ act′(g),  du = d ∘ act(g),  [s; s′] one matrix

The formulas are those of gated.py, and thin.py says how a program goes along its rows. Results are rounded before they
are multiplied, as a product that reads them would find them.

Letters: T rows, I inner size, K columns of the thin factors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaw.kernels.triton.gated import _act
from deltaw.kernels.triton.thin import BLOCK, few_rows
from deltaw.kernels.triton.views import power_of_two, uncopied


def gated_ranked(
    g_TI: Tensor, u_TI: Tensor, activation: str, a_IK: Tensor, out_TX: Tensor, block: int = BLOCK
) -> Tensor:
    """`out` [T, I + K]: act(g) ∘ u, and behind it its product with a, any strides."""
    (T, size), K = g_TI.shape, a_IK.shape[1]
    g, u = uncopied("g", g_TI, g_TI.shape), uncopied("u", u_TI, g_TI.shape)
    out = uncopied("out", out_TX, torch.Size((T, size + K)))
    rows = few_rows(T)
    strides = (g.stride(0), u.stride(0), a_IK.stride(0), a_IK.stride(1), out.stride(0))
    options = {"ROWS": rows, "BLOCK": block, "RANKS": power_of_two(max(K, 16)), "num_warps": 4, "num_stages": 3}
    if T:
        with torch.cuda.device_of(g):
            _gated_ranked[(triton.cdiv(T, rows),)](g, u, a_IK, out, T, size, K, *strides, ACT=activation, **options)
    return out


def gated_ranked_back(
    d_TI: Tensor,
    g_TI: Tensor,
    u_TI: Tensor,
    activation: str,
    s_MK: Tensor,
    v_TI: Tensor,
    out_TX: Tensor,
    block: int = BLOCK,
) -> Tensor:
    """`out` [T, 2I + K]: dg, du and behind them [dg du] s; and act(g) ∘ u in `v`."""
    (T, size), K = g_TI.shape, s_MK.shape[1]
    named = {"d": d_TI, "g": g_TI, "u": u_TI, "v": v_TI}
    d, g, u, v = (uncopied(name, x, g_TI.shape) for name, x in named.items())
    out = uncopied("out", out_TX, torch.Size((T, 2 * size + K)))
    rows = few_rows(T)
    strides = (d.stride(0), g.stride(0), u.stride(0), s_MK.stride(0), s_MK.stride(1), v.stride(0), out.stride(0))
    options = {"ROWS": rows, "BLOCK": block, "RANKS": power_of_two(max(K, 16)), "num_warps": 4, "num_stages": 3}
    if T:
        with torch.cuda.device_of(g):
            _gated_ranked_back[(triton.cdiv(T, rows),)](
                d, g, u, s_MK, v, out, T, size, K, *strides, ACT=activation, **options
            )
    return out


@triton.jit
def _gated_ranked(
    g_at: tl.tensor,
    u_at: tl.tensor,
    a_at: tl.tensor,
    out_at: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    ranks: tl.tensor,
    g_row: tl.tensor,
    u_row: tl.tensor,
    a_row: tl.tensor,
    a_column: tl.tensor,
    out_row: tl.tensor,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    rank = tl.arange(0, RANKS)[None, :]
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        seen = (row < rows) & (col < width)[None, :]
        g = tl.load(g_at + row * g_row + col[None, :], mask=seen, other=0.0).to(tl.float32)
        u = tl.load(u_at + row * u_row + col[None, :], mask=seen, other=0.0).to(tl.float32)
        value, _ = _act(g, ACT)
        v = (value * u).to(out_at.dtype.element_ty)
        tl.store(out_at + row * out_row + col[None, :], v, mask=seen)
        known = (col < width)[:, None] & (rank < ranks)
        a = tl.load(a_at + col[:, None] * a_row + rank * a_column, mask=known, other=0.0)
        total = tl.dot(v, a, total, input_precision="ieee")
    tl.store(out_at + row * out_row + width + rank, total, mask=(row < rows) & (rank < ranks))


@triton.jit
def _gated_ranked_back(
    d_at: tl.tensor,
    g_at: tl.tensor,
    u_at: tl.tensor,
    s_at: tl.tensor,
    v_at: tl.tensor,
    out_at: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    ranks: tl.tensor,
    d_row: tl.tensor,
    g_row: tl.tensor,
    u_row: tl.tensor,
    s_row: tl.tensor,
    s_column: tl.tensor,
    v_row: tl.tensor,
    out_row: tl.tensor,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    rank = tl.arange(0, RANKS)[None, :]
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        seen = (row < rows) & (col < width)[None, :]
        d = tl.load(d_at + row * d_row + col[None, :], mask=seen, other=0.0).to(tl.float32)
        g = tl.load(g_at + row * g_row + col[None, :], mask=seen, other=0.0).to(tl.float32)
        u = tl.load(u_at + row * u_row + col[None, :], mask=seen, other=0.0).to(tl.float32)
        value, slope = _act(g, ACT)
        dg = (d * u * slope).to(out_at.dtype.element_ty)
        du = (d * value).to(out_at.dtype.element_ty)
        tl.store(v_at + row * v_row + col[None, :], value * u, mask=seen)
        place = out_at + row * out_row + col[None, :]
        tl.store(place, dg, mask=seen)
        tl.store(place + width, du, mask=seen)
        known = (col < width)[:, None] & (rank < ranks)
        s_place = s_at + col.to(tl.int64)[:, None] * s_row + rank * s_column
        total = tl.dot(dg, tl.load(s_place, mask=known, other=0.0), total, input_precision="ieee")
        beside = tl.load(s_place + width.to(tl.int64) * s_row, mask=known, other=0.0)
        total = tl.dot(du, beside, total, input_precision="ieee")
    tl.store(out_at + row * out_row + 2 * width + rank, total, mask=(row < rows) & (rank < ranks))
