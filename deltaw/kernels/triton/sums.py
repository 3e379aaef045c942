"""The gradients of several thin factors, in two launches.

    factor_sums    out += scale · wideᵀ thin    for each: dA of an input, dB of its outputs

Each is a sum over all T rows of a matrix that is wide for the sake of a few columns of one that is thin. A product
library takes two launches for each of them and fills an eighth of a GPU with it where the wide matrix is narrow. Here a
program takes BLOCK columns and a share of the rows, so that there are programs enough; their sums, in float32, are
added up in a fixed order by the second launch, which adds them to what is there.

Letters: T rows, C columns of a wide matrix, R of a thin one.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaw.kernels.triton.views import power_of_two, uncopied

BLOCK, STEP = 64, 64  # columns and rows of a tile
PROGRAMS = 528  # wanted: four for each multiprocessor of an H100
SHARE = 256  # rows of a program at least


def factor_sums(sums: Sequence[tuple[Tensor, Tensor, Tensor, float]]) -> None:
    """Add scale · wideᵀ thin to each `out` [C, R], in float32 and of any strides, of (wide [T, C], thin [T, R], out,
    scale). All have the same rows; wide and thin are of one dtype. Raises ValueError where the entries of a row don't
    lie side by side."""
    T = len(sums[0][0])
    ranks = power_of_two(max(16, *(thin_TR.shape[1] for _, thin_TR, _, _ in sums)))
    parts: list[tuple[Any, ...]] = []
    blocks = 0
    for wide_TC, thin_TR, out_CR, scale in sums:
        C, R = out_CR.shape
        uncopied("wide", wide_TC, torch.Size((T, C)))
        uncopied("thin", thin_TR, torch.Size((T, R)))
        strides = (wide_TC.stride(0), thin_TR.stride(0), *out_CR.stride())
        first, blocks = blocks, blocks + triton.cdiv(C, BLOCK)
        parts.append((wide_TC, thin_TR, out_CR, C, R, *strides, float(scale), first, blocks))
    shares = max(1, min(PROGRAMS // max(blocks, 1), triton.cdiv(T, SHARE)))
    rows = triton.cdiv(triton.cdiv(T, shares), STEP) * STEP
    partial = torch.empty(shares, blocks, BLOCK, ranks, dtype=torch.float32, device=sums[0][0].device)
    options = {"PARTS": len(parts), "BLOCK": BLOCK, "RANKS": ranks, "num_warps": 4}
    if blocks:
        with torch.cuda.device_of(partial):
            grid = (blocks, shares)
            _partial_sums[grid](tuple(parts), partial, blocks, T, rows, STEP=STEP, **options, num_stages=4)
            _add_up[(blocks,)](tuple(parts), partial, blocks, shares, **options)


@triton.jit
def _partial_sums(
    parts: tl.tuple,
    partial_at: tl.tensor,
    blocks: tl.tensor,
    rows: tl.tensor,
    share: tl.tensor,
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    """wideᵀ thin [BLOCK, RANKS] of one block of columns and one share of the rows."""
    block, begin = tl.program_id(0), tl.program_id(1) * share
    inside = tl.arange(0, BLOCK)[:, None] * RANKS + tl.arange(0, RANKS)[None, :]
    place = partial_at + (tl.program_id(1) * blocks + block).to(tl.int64) * BLOCK * RANKS + inside
    rank = tl.arange(0, RANKS)
    for part in tl.static_range(PARTS):
        wide_at, thin_at, _, columns, ranks, wide_row, thin_row, _, _, _, first, end = parts[part]
        if (block >= first) & (block < end):
            col = (block - first) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK, RANKS), tl.float32)
            for start in range(begin, tl.minimum(begin + share, rows), STEP):
                row = start + tl.arange(0, STEP)[:, None]
                far, there = row.to(tl.int64), row < rows
                wide = tl.load(wide_at + far * wide_row + col, mask=there & (col < columns), other=0.0)
                thin = tl.load(thin_at + far * thin_row + rank, mask=there & (rank < ranks), other=0.0)
                total = tl.dot(tl.trans(wide), thin, total, input_precision="ieee")
            tl.store(place, total)


@triton.jit
def _add_up(
    parts: tl.tuple,
    partial_at: tl.tensor,
    blocks: tl.tensor,
    shares: tl.tensor,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    """out += scale · all shares of one block of columns."""
    block = tl.program_id(0)
    inside = tl.arange(0, BLOCK)[:, None] * RANKS + tl.arange(0, RANKS)[None, :]
    total = tl.zeros((BLOCK, RANKS), tl.float32)
    for share in range(shares):
        total += tl.load(partial_at + (share * blocks + block).to(tl.int64) * BLOCK * RANKS + inside)
    rank = tl.arange(0, RANKS)[None, :]
    for part in tl.static_range(PARTS):
        _, _, out_at, columns, ranks, _, _, out_column, out_rank, scale, first, end = parts[part]
        if (block >= first) & (block < end):
            col = (block - first) * BLOCK + tl.arange(0, BLOCK)[:, None]
            seen = (col < columns) & (rank < ranks)
            place = out_at + col * out_column + rank * out_rank
            tl.store(place, tl.load(place, mask=seen, other=0.0) + scale * total, mask=seen)
