"""Many small matrices written to where the products read them, in one launch.

    spread   destination = scale · source, rounded to the destination's dtype, for each part of a table

A model has hundreds of factors of some ten thousand numbers: a launch for each costs more than what it moves. So the
table holds their addresses, and one list says for every program which part is its own and where in it it starts; no
program is without work, however much the parts differ in size. A part is read in the order it lies in memory and
written one number at a time, which the hardware gathers where a destination's columns lie side by side.

The addresses are read when the table is made and stay: a launch looks at nothing on the host, so that a CUDA graph may
hold it. Whoever makes the table keeps the tensors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Table(NamedTuple):
    """P parts and N programs, on the parts' device."""

    parts_P6: Tensor  # int64: source, destination, its size, its columns, the destination's two strides
    scales_P: Tensor  # float32
    programs_N2: Tensor  # int32: the part, the first of its numbers
    dtype: torch.dtype  # the destinations'


def spread_table(parts: Sequence[tuple[Tensor, Tensor, float]]) -> Table:
    """The table of (source, destination, scale): float32 matrices whose numbers lie one after the other, destinations
    of the same shape in one of `DTYPES`, with any strides. At least one part; all on one device."""
    dtype, device = parts[0][1].dtype, parts[0][0].device
    entries, programs = [], []
    for number, (source, destination, _) in enumerate(parts):
        where, columns = (source.data_ptr(), destination.data_ptr()), source.shape[1]
        entries.append((*where, source.numel(), columns, *destination.stride()))
        programs += [(number, first) for first in range(0, source.numel(), BLOCK)]
    return Table(
        torch.tensor(entries, dtype=torch.int64, device=device),
        torch.tensor([scale for *_, scale in parts], dtype=torch.float32, device=device),
        torch.tensor(programs, dtype=torch.int32, device=device).view(-1, 2),
        dtype,
    )


def spread(table: Table) -> None:
    """Write every destination of the table."""
    with torch.cuda.device_of(table.parts_P6):
        _spread[(len(table.programs_N2),)](*table[:3], OUT=DTYPES[table.dtype], BLOCK=BLOCK)


@triton.jit
def _spread(
    parts_at: tl.tensor, scales_at: tl.tensor, programs_at: tl.tensor, OUT: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    program = tl.program_id(0)
    number = tl.load(programs_at + 2 * program).to(tl.int64)
    part = parts_at + 6 * number
    source = tl.load(part).to(tl.pointer_type(tl.float32))
    destination = tl.load(part + 1).to(tl.pointer_type(OUT))
    size = tl.load(part + 2).to(tl.int32)
    columns = tl.load(part + 3).to(tl.int32)
    i = tl.load(programs_at + 2 * program + 1) + tl.arange(0, BLOCK)
    seen = i < size
    row = i // columns
    at = row.to(tl.int64) * tl.load(part + 4) + (i - row * columns).to(tl.int64) * tl.load(part + 5)
    tl.store(destination + at, tl.load(source + i, mask=seen) * tl.load(scales_at + number), mask=seen)
