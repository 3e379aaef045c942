"""A matrix copied to where there is room behind it, and its product with thin factors written there.

    ranked    out = [x  x a]

The copy has to read all of x; the product rides on it. A program takes ROWS rows and goes along them BLOCK columns at a
time, adding up its rows of x a in float32; tiles of x come through shared memory, several ahead. Fewer rows a program
where there are few in all, so that every multiprocessor has some.

Letters: T rows, N columns of x, K columns of the factors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaw.kernels.triton.views import power_of_two, uncopied

BLOCKS = (128, 256)  # of a matrix of at most 1,024 columns, and of wider ones
PROGRAMS = 256  # wanted at least


def ranked(x_TN: Tensor, a_NK: Tensor, out_TX: Tensor) -> Tensor:
    """`out` [T, N + K] in x's dtype: x, and behind it x a, added up in float32. `a` in x's dtype, any strides; K at
    least 16, for a GPU's matrix units.

    Raises ValueError where the entries of a row of x or `out` don't lie side by side.
    """
    (T, N), K = x_TN.shape, a_NK.shape[1]
    x, out = uncopied("x", x_TN, x_TN.shape), uncopied("out", out_TX, torch.Size((T, N + K)))
    rows = 64
    while rows > 16 and triton.cdiv(T, rows) < PROGRAMS:
        rows //= 2
    block, stages = (BLOCKS[N > 1024], 4) if x.element_size() == 2 else (BLOCKS[0], 2)  # what shared memory holds
    strides = (x.stride(0), a_NK.stride(0), a_NK.stride(1), out.stride(0))
    options = {"ROWS": rows, "BLOCK": block, "RANKS": power_of_two(max(K, 16)), "num_warps": 4, "num_stages": stages}
    if T:
        with torch.cuda.device_of(x):
            _ranked[(triton.cdiv(T, rows),)](x, a_NK, out, T, N, K, *strides, **options)
    return out


@triton.jit
def _ranked(
    x_at: tl.tensor,
    a_at: tl.tensor,
    out_at: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    ranks: tl.tensor,
    x_row: tl.tensor,
    a_row: tl.tensor,
    a_column: tl.tensor,
    out_row: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANKS)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, columns, BLOCK):
        col = start + tl.arange(0, BLOCK)
        seen = (row < rows)[:, None] & (col < columns)[None, :]
        x = tl.load(x_at + row[:, None] * x_row + col[None, :], mask=seen, other=0.0)
        known = (col < columns)[:, None] & (rank < ranks)[None, :]
        a = tl.load(a_at + col[:, None] * a_row + rank[None, :] * a_column, mask=known, other=0.0)
        total = tl.dot(x, a, total, input_precision="ieee")
        tl.store(out_at + row[:, None] * out_row + col[None, :], x, mask=seen)
    seen = (row < rows)[:, None] & (rank < ranks)[None, :]
    tl.store(out_at + row[:, None] * out_row + columns + rank[None, :], total, mask=seen)
