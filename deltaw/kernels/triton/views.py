"""What the kernels ask of their tensors: entries of a row side by side, and blocks that are powers of two."""

import torch
import triton
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """x itself where its last entries lie side by side, else a copy where they do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """[rows, D] of [..., D], entries side by side: a view where there is one."""
    return unit(x.reshape(-1, x.shape[-1]))


def uncopied(name: str, x: Tensor, shape: torch.Size) -> Tensor:
    """x, which a kernel reads or writes where it lies. Raises ValueError for another shape, and for rows whose entries
    don't lie side by side: a copy of them would be a pass of its own, and what is written to it would be lost."""
    if x.shape != shape:
        raise ValueError(f"{name} is {list(x.shape)}, not {list(shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}: the entries of a row must lie side by side, not {x.stride(-1)} apart")
    return x


def power_of_two(size: int) -> int:
    """The power of two that a block of `size` needs."""
    block: int = triton.next_power_of_2(size)
    return block
