"""`PackedWeight`: a frozen matrix in fewer bytes than its numbers take, unpacked tile by tile where it is multiplied.

    parts      integer tensors: codes, scales by their bits; the base's memory, and all that is kept
    unpack     some rows of W in numbers, as the format means them
    dtype      the type in which products are made: what `rows` and `dense` give

A tile is a few rows of W, unpacked, multiplied and dropped, so that beside the packed bytes one tile is held and never
the matrix. Both directions take the same tiles: y's columns are those of the tile's rows, and ∂L/∂x is a sum over
tiles. Nothing of W is kept between forward and backward; unpacking twice costs less than moving it through memory.

Parts are integers, whatever they mean: a model asks the first floating-point tensor that it has for its own dtype, and
`.to(dtype)` must not round a scale. Where it can be, dimension 0 of a part is W's rows, so that it can be cut there.

`CastWeight` is the plainest: numbers of 16 bits under products of 32. It loses nothing, since every bfloat16 and
float16 is a float32.

Letters: M outputs, N inputs, T rows of x, K rows of a tile.
"""

import abc
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from deltaw.kernels.bags import Bags, bags_for
from deltaw.kernels.weight import Weight

TILE = 2**20  # numbers of a tile on a CPU: 4 MB in float32, which stays in the cache between unpacking and product
GPU_TILE = 2**26


class PackedWeight(Weight):
    """A matrix [M, N] in `parts`. Subclasses say how their bits are read."""

    def __init__(self, parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.parts = dict(parts)
        self._shape, self._dtype = shape, dtype
        self._bags: Bags | None = None

    @abc.abstractmethod
    def unpack(self, index: Tensor | slice) -> Tensor:
        """Those rows of W [K, N], new, in any floating type that loses none of what the bits mean."""

    def coded(self, index: slice) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Those rows as w = d · q + m: whole numbers q [K, N] in [−128, 127], d [K, G] and m [K, G] (None: 0) in
        float32, N / G of a row to each. None where the format isn't that, and for products in another type."""
        return None

    def with_parts(self, parts: Mapping[str, Tensor]) -> "PackedWeight":
        """The same matrix in other tensors of the same names: moved to a device, or gathered."""
        other = copy.copy(self)
        other.parts, other._bags = dict(parts), None
        return other

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    @property
    @abc.abstractmethod
    def form(self) -> str:
        """What its numbers are stored as, for people: "bfloat16", "Q4_1"."""

    @property
    def nbytes(self) -> int:
        """Bytes of its parts."""
        return sum(part.nbytes for part in self.parts.values())

    def rows(self, index: Tensor | slice) -> Tensor:
        return self.unpack(index).to(self._dtype)

    def matmul(self, x_TN: Tensor, bias_M: Tensor | None = None) -> Tensor:
        rows_TN = x_TN if x_TN.ndim == 2 else x_TN.reshape(-1, x_TN.shape[-1])
        self._bags = self._bags or bags_for(self, rows_TN)
        if self._bags is not None and self._bags.take(rows_TN):
            y_TM = self._bags.matmul(rows_TN, bias_M)
        else:
            y_TM = self._by_tiles(rows_TN, bias_M)
        return y_TM if x_TN.ndim == 2 else y_TM.view(*x_TN.shape[:-1], self._shape[0])

    @torch.no_grad()
    def _by_tiles(self, rows_TN: Tensor, bias_M: Tensor | None) -> Tensor:
        y_TM = rows_TN.new_empty(len(rows_TN), self._shape[0])
        for tile in self._tiles():
            w_NK = self.unpack(tile).to(rows_TN.dtype).T
            if bias_M is None:
                torch.mm(rows_TN, w_NK, out=y_TM[:, tile])
            else:
                torch.addmm(bias_M[tile], rows_TN, w_NK, out=y_TM[:, tile])
        return y_TM

    @torch.no_grad()
    def matmul_t(self, g_TM: Tensor, onto: Tensor | None = None) -> Tensor:
        onto = g_TM.new_zeros(len(g_TM), self._shape[1]) if onto is None else onto
        for tile in self._tiles():
            onto.addmm_(g_TM[:, tile], self.unpack(tile).to(g_TM.dtype))
        return onto

    def _tiles(self) -> Iterator[slice]:
        m, n = self._shape
        step = max(1, (TILE if self.device.type == "cpu" else GPU_TILE) // n)
        return (slice(start, min(start + step, m)) for start in range(0, m, step))


class CastWeight(PackedWeight):
    """The numbers of a 16-bit tensor [M, N], which may be a view."""

    def __init__(self, w_MN: Tensor, dtype: torch.dtype) -> None:
        super().__init__({"numbers": w_MN.view(torch.int16)}, (w_MN.shape[0], w_MN.shape[1]), dtype)
        self._stored = w_MN.dtype

    @property
    def form(self) -> str:
        return str(self._stored).removeprefix("torch.")

    def unpack(self, index: Tensor | slice) -> Tensor:
        return self.parts["numbers"][index].view(self._stored)
