"""`Int8Weight`: a matrix in eight bits per number, each row with a scale of its own.

    w = code · scale        scale = max|row| / 127, code = round(w / scale) in [−127, 127]
    codes  int8 [M, N]      scales  int32 [M]: the bits of float32

A rounding is at most half a scale: 0.8 % of the norm of a normal matrix, and in a product less, since it averages out.

Rejected: bitsandbytes' `int8_vectorwise_quant` (the same numbers from float16 alone, by a dependency), torchao's
(warnings on import, tensor subclasses), and products of integers (they round x, and training would see it).

Letters: M outputs, N inputs, K rows of a tile.
"""

import torch
from torch import Tensor

from deltaw.kernels.packed import PackedWeight

MOST = 127


class Int8Weight(PackedWeight):
    """A matrix [M, N] of int8 with a scale per row."""

    @property
    def form(self) -> str:
        return "int8"

    def unpack(self, index: Tensor | slice) -> Tensor:
        scales_K = self.parts["scales"][index].view(torch.float32)
        return self.parts["codes"][index].float().mul_(scales_K[:, None])

    def coded(self, index: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.parts["codes"][index], self.parts["scales"][index].view(torch.float32)[:, None], None


@torch.no_grad()
def to_int8(w_MN: Tensor, dtype: torch.dtype) -> Int8Weight:
    """A matrix, quantised, for products in `dtype`."""
    m, n = w_MN.shape
    codes_MN = torch.empty(m, n, dtype=torch.int8, device=w_MN.device)
    scales_M = torch.empty(m, dtype=torch.float32, device=w_MN.device)
    for start in range(0, m, step := max(1, 2**20 // n)):
        tile_KN = w_MN[start : start + step].float()
        # A row of zeros, or of numbers too small for a scale: any scale will do.
        scales_K = (tile_KN.abs().amax(1) / MOST).clamp_min(torch.finfo(torch.float32).tiny)
        codes_MN[start : start + step] = (tile_KN / scales_K[:, None]).round_()
        scales_M[start : start + step] = scales_K
    return Int8Weight({"codes": codes_MN, "scales": scales_M.view(torch.int32)}, (m, n), dtype)
