"""All factors of a model written to where its products read them: destination = scale · source, one launch on a GPU.

Masters are float32 and the products want them in the activations' dtype, inside larger matrices. To round them one by
one is hundreds of launches, each of which moves some ten thousand numbers; here a table of addresses is made once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.device import on_gpu

WRITTEN = (torch.float32, torch.bfloat16, torch.float16)  # what the kernel writes, all destinations in one of them
LARGEST = 2**31 - 2**20  # numbers of a source: the kernel counts them in 32 bits


class Spread:
    """Sources [M, N], each with a destination of its shape (a view of something larger, any strides) and a scale.

    The tensors must stay where they lie: a source or a destination that is given another storage isn't followed.
    Raises ValueError where a destination has another shape or device than its source and, on a GPU, where a source
    isn't a contiguous float32 matrix, and where destinations differ in dtype or have one that isn't in `WRITTEN`.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        self.parts = tuple((source.detach(), destination.detach(), scale) for source, destination, scale in parts)
        for source, destination, _ in self.parts:
            if source.shape != destination.shape or source.device != destination.device:
                raise ValueError(f"no destination for {_told(source)}: {_told(destination)}")
        self._table: Any = None
        if self.parts and on_gpu(self.parts[0][0]):
            self._refuse()
            from deltaw.kernels.triton import spread_table

            self._table = spread_table(self.parts)

    def spread(self) -> None:
        """Write every destination: the product in the source's dtype, then rounded to the destination's."""
        if self._table is not None:
            from deltaw.kernels.triton import spread

            spread(self._table)
            return
        for source, destination, scale in self.parts:
            destination.copy_(source * scale)

    def _refuse(self) -> None:
        """What the kernel would read or write wrongly."""
        first, written, _ = self.parts[0]
        for source, destination, _ in self.parts:
            fits = source.dtype == torch.float32 and source.ndim == 2 and source.is_contiguous()
            if not fits or source.numel() > LARGEST or source.device != first.device:
                raise ValueError(f"a source must be a contiguous float32 matrix on one GPU: {_told(source)}")
            if destination.dtype not in WRITTEN or destination.dtype != written.dtype:
                raise ValueError(f"destinations of one dtype that the kernel writes, not {_told(destination)}")


def _told(x: Tensor) -> str:
    return f"{list(x.shape)} in {x.dtype} on {x.device}"
