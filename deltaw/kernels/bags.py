"""A quantised matrix as a few rows are multiplied by it: its codes are read as bytes, products and sums are in float32.

For w = d · q + m, with d and m shared by a group of one row's numbers,

    y = Σ_G d_G · (Σ_{n in G} x_n q_n) + Σ_G m_G · (Σ_{n in G} x_n)

An inner sum is a weighted sum of rows of codes, which is what an embedding bag computes, and PyTorch's bag over bytes
turns them into float32 in registers. So nothing is rounded that `unpack` and a product wouldn't round, and a quarter of
float32's bytes are read. One row and 1536 x 576 on one core, beside the same matrix in float32 in memory: 0.11 ms
against 0.24 ms; unpacking it takes 0.37 ms alone. Each row is one pass over all codes, of which the later find them in
the cache. On a busy machine, beside tiles (packed.py), which are cheaper beyond some rows:

    rows        1     4     8    12    16
    bags, ms 0.16  0.35  0.67  0.94  1.21
    tiles    1.4   1.4   1.6   1.7   1.3

The codes lie column by column here, so they are held a second time, in up to 1.25 bytes per number, as long as the
base (copies.py says when they are made).

Rejected, measured: PyTorch's int4 product (`_weight_int4pack_mm`: bfloat16 alone is fast, and rounds x, scales and y;
in float32 it is a loop of 15 times the dense time), its int8 product (the same), its bag over four bits (0.08 ms, but
on one core only), products in bfloat16 (no faster for one row than float32 without AMX), and int8 products of a
rounded x as llama.cpp makes them (another answer than the base's).

Letters: M outputs, N inputs, T rows of x, G groups of a row that share a scale.
"""

import functools
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deltaw.kernels.copies import are_made, fits

FEW = 12  # rows
ZERO = 128  # the byte of code 0


class Coded(Protocol):
    """What is asked of a matrix in parts (packed.py)."""

    parts: dict[str, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""

    def coded(self, index: slice) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Some rows as d · q + m, where they are that."""


class Bags:
    """One matrix."""

    def __init__(self, weight: Coded) -> None:
        m, n = weight.shape
        tail = torch.tensor([1.0, -ZERO]).view(torch.uint8)  # scale and what is added, of a row of the table
        self.table = torch.empty(n, m + len(tail), dtype=torch.uint8)
        self.table[:, m:] = tail
        ds, ms = [], []
        for start in range(0, m, step := max(1, 2**20 // n)):
            tile = slice(start, min(start + step, m))
            coded = weight.coded(tile)
            assert coded is not None
            codes_KN, d_KG, m_KG = coded
            self.table[:, tile] = codes_KN.to(torch.int16).add_(ZERO).to(torch.uint8).T
            ds.append(d_KG)
            ms.append(m_KG)
        self.d_GM = torch.cat(ds).T.contiguous()
        self.m_GM = None if ms[0] is None else torch.cat(ms).T.contiguous()  # type: ignore[arg-type]
        self.each_N = torch.arange(n, dtype=torch.int32)
        self.starts_G = torch.arange(0, n, n // len(self.d_GM), dtype=torch.int32)

    @staticmethod
    def take(x_TN: Tensor) -> bool:
        """Whether they are for these rows: few, in float32, of a step of decoding."""
        few = len(x_TN) <= FEW and x_TN.dtype == torch.float32 and not x_TN.is_cuda
        return few and torch.is_inference_mode_enabled()

    def matmul(self, x_TN: Tensor, bias_M: Tensor | None) -> Tensor:
        """x Wᵀ + bias."""
        x_TN = x_TN.contiguous()
        if len(x_TN) == 1:
            y_TM = self._row(x_TN[0]).unsqueeze(0)
        else:
            y_TM = torch.stack([self._row(x_N) for x_N in x_TN.unbind()])
        if self.m_GM is not None:
            y_TM.addmm_(x_TN.view(len(x_TN), len(self.m_GM), -1).sum(2), self.m_GM)
        return y_TM if bias_M is None else y_TM.add_(bias_M)

    def _row(self, x_N: Tensor) -> Tensor:
        sums_GM: Tensor = _bag()(self.table, self.each_N, self.starts_G, False, 0, False, x_N, None, False)
        return sums_GM.mul_(self.d_GM).sum(0) if len(sums_GM) > 1 else sums_GM.mul_(self.d_GM)[0]


@functools.cache
def _bag() -> Any:
    """PyTorch's bag over bytes."""
    return torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default


_bags: "WeakIdKeyDictionary" = WeakIdKeyDictionary()  # by the matrix's first part, which outlives what reads it


def bags_for(weight: Coded, x_TN: Tensor) -> Bags | None:
    """The matrix for so few rows in a step of decoding; None where tiles must do."""
    if not Bags.take(x_TN):
        return None
    part = next(iter(weight.parts.values()))
    if are_made() and part not in _bags:
        _bags[part] = Bags(weight) if _worth(weight) else None
    bags: Bags | None = _bags.get(part)
    return bags


def _worth(weight: Coded) -> bool:
    """Whether the processor has fast bags, the format codes, and the machine room."""
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if not wide or weight.device.type != "cpu" or weight.coded(slice(0, 1)) is None:
        return False
    m, n = weight.shape
    return fits(m * n)
