"""A frozen matrix laid out as oneDNN's own products read it, for passes of decoding on a CPU.

A product of few rows is bound by reading W, and a plain W [M, N] isn't in the order in which a kernel reads it: each
call puts blocks of it in order first, or goes without. Once in blocks, it is read at the speed of memory. Measured on
one core of a Zen 5, 1536 x 576, µs:

    rows                        1     4    16    64   320
    float32   F.linear (MKL)  223   315   509  1277  5647
              prepacked       116   124   217   555  2480
    bfloat16  F.linear        133   138   184   370  1455
              prepacked        67    79   133   319  1384

The same products are summed in another order: nothing is rounded that wasn't. Blocks for 16 rows serve all others, too
(those for one row take 1.5 times as long with 16). Making them takes 1.1 ms in float32.

A copy holds what the matrix was: it is made anew when the tensor has been written to or moved since.

Rejected: one matrix of all that read one x (query, key, value; gate, up), which spares two calls of a layer and at 16
rows no time at all; MKL's own packs (no faster than MKL without); transposed weights (1.5 times as fast with one row,
no faster with 16).

Letters: M outputs, N inputs.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from deltaw.kernels.copies import are_made, fits

ROWS = 16  # that the blocks are made for


class Prepacked(NamedTuple):
    """A copy, and what the tensor was then."""

    blocks: Tensor
    was: tuple[int, int]

    @staticmethod
    def of(w_MN: Tensor) -> "Prepacked":
        """That of a tensor."""
        with torch.inference_mode(False):  # it is read outside of it, too
            blocks = torch.ops.mkldnn._reorder_linear_weight(w_MN.detach(), ROWS)
        return Prepacked(blocks, _state(w_MN))

    def current(self, w_MN: Tensor) -> bool:
        """Whether it is this tensor's, as it is now."""
        return self.was == _state(w_MN)

    def matmul(self, x_TN: Tensor, bias_M: Tensor | None) -> Tensor:
        """x Wᵀ + bias, [..., M]."""
        y_TM: Tensor = _product()(x_TN, self.blocks, bias_M, "none", [], "")
        return y_TM


_copies: "WeakIdKeyDictionary" = WeakIdKeyDictionary()  # None: there was no room for one


def prepacked(w_MN: Tensor) -> Prepacked | None:
    """The copy of a frozen parameter; None where there is none and none is made."""
    if type(w_MN) is not nn.Parameter or w_MN.requires_grad or w_MN.is_inference():
        return None
    copy: Prepacked | None = _copies.get(w_MN)
    if copy is not None and not copy.current(w_MN):
        del _copies[w_MN]
        copy = None
    if copy is None and are_made() and w_MN not in _copies and _can(w_MN.device, w_MN.dtype):
        copy = _copies[w_MN] = Prepacked.of(w_MN) if fits(w_MN.nbytes) else None
    return copy


def _state(w_MN: Tensor) -> tuple[int, int]:
    return w_MN._version, w_MN.data_ptr()


@functools.cache
def _product() -> "torch._ops.OpOverload":
    return torch.ops.mkldnn._linear_pointwise.default


@functools.cache
def _can(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch has such products, and the processor numbers of this type."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
