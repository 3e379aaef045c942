"""`Nf4Weight`: a matrix in four bits per number, as QLoRA has it. The only file that knows bitsandbytes.

    w = table[code] · absmax              64 numbers of a row share absmax; the table holds 16 quantiles of a normal
    absmax = dynamic[c] · scale + mean    absmaxes in 8 bits (double quantisation), 256 of them share scale
    4.127 bits per number in all

The bits are those of bitsandbytes' `quantize_4bit(compress_statistics=True)`, so that what is trained on is what a
server computes that loads the same base by bitsandbytes.

    codes    uint8 [M, N/2]      two to a byte, the earlier one above
    absmax   uint8 [M, N/64]
    scales   int32 [M N / 2¹⁴]   the bits of float32; the only part that isn't by rows

Only functional calls of bitsandbytes are used: to quantise, a few rows at a time (in one piece it takes 20
bytes per number), and to unpack a tile. The absmaxes of a tile are looked up here: bitsandbytes has no call
for some of them. N must be a multiple of 64, so that no block crosses a row.

Importing bitsandbytes takes seconds, so it is done when something is quantised. Where the package `kernels` is
installed it would download code from the network in its import; it is imported without that package, which it says in
a warning.

Rejected: its Linear4bit (it packs its weight anew in eval mode), and float32 for bfloat16 products (twice the memory
of a tile).

Letters: M outputs, N inputs, K rows of a tile, G blocks of a row.
"""

import functools
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import InputError
from deltaw.kernels.packed import TILE, PackedWeight

BLOCK, NESTED = 64, 256  # numbers that share an absmax, absmaxes that share a scale
NAME = "bitsandbytes"


class Nf4Weight(PackedWeight):
    """A matrix [M, N] in nf4 with double quantisation. `mean`: of its absmaxes."""

    def __init__(self, parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, mean: float) -> None:
        super().__init__(parts, shape, dtype)
        self._mean = mean

    @property
    def form(self) -> str:
        return "nf4"

    def unpack(self, index: Tensor | slice) -> Tensor:
        codes, absmax_KG = self.parts["codes"][index].contiguous(), self._absmax(index)
        shape = [len(codes), self.shape[1]]
        unpack = torch.ops.bitsandbytes.dequantize_4bit.default
        w_KN: Tensor = unpack(codes.view(-1, 1), absmax_KG.view(-1), BLOCK, "nf4", shape, self.dtype)
        return w_KN

    def _absmax(self, index: Tensor | slice) -> Tensor:
        codes_KG, (m, g) = self.parts["absmax"][index], self.parts["absmax"].shape
        device = codes_KG.device
        rows_K = torch.arange(m, device=device)[index]
        scale_KG = (rows_K[:, None] * g + torch.arange(g, device=device)) // NESTED
        scales = self.parts["scales"].view(torch.float32)
        return _table(device)[codes_KG.int()].mul_(scales[scale_KG]).add_(self._mean)


def fits_nf4(w_MN: Tensor) -> bool:
    """Whether a matrix can be had in nf4."""
    return w_MN.shape[1] % BLOCK == 0


@torch.no_grad()
def to_nf4(w_MN: Tensor, dtype: torch.dtype) -> Nf4Weight:
    """A matrix that fits, quantised, for products in `dtype`. Raises InputError where bitsandbytes can't do it."""
    functional = _library()
    (m, n), step = w_MN.shape, max(1, TILE // w_MN.shape[1])
    codes, absmax = [], []
    try:
        for tile in w_MN.split(step):
            code, state = functional.quantize_4bit(tile.contiguous(), blocksize=BLOCK, quant_type="nf4")
            codes.append(code.view(len(tile), n // 2))
            absmax.append(state.absmax)
        absmaxes = torch.cat(absmax)
        mean = absmaxes.mean()
        nested, state = functional.quantize_blockwise(absmaxes - mean, blocksize=NESTED)
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"{NAME} can't quantise on {w_MN.device}: {str(error).splitlines()[0]:.200}",
            fix="use base_weights: int8 or bfloat16",
        ) from None
    parts = {
        "codes": torch.cat(codes),
        "absmax": nested.view(m, n // BLOCK),
        "scales": state.absmax.view(torch.int32),
    }
    return Nf4Weight(parts, (m, n), dtype, float(mean))


def check_nf4() -> None:
    """Raise InputError unless bitsandbytes is installed. Costs nothing."""
    if importlib.util.find_spec(NAME) is None:
        raise _missing("isn't installed")


@functools.cache
def _library() -> Any:
    """bitsandbytes' functional calls; its operators are known to torch from then on."""
    try:
        with _apart("kernels"):
            import bitsandbytes.functional
    except Exception as error:  # its own library doesn't load: whatever it raises
        raise _missing(f"can't be imported here ({str(error).splitlines()[0]:.200})") from None
    return bitsandbytes.functional


@functools.cache
def _table(device: torch.device) -> Tensor:
    """What the codes of absmaxes mean [256]."""
    table: Tensor = _library().create_dynamic_map().to(device)
    return table


@contextmanager
def _apart(package: str) -> Iterator[None]:
    """Imports that don't find a package, and no warnings about it."""
    before, quiet = sys.modules.get(package), logging.root.manager.disable
    sys.modules[package] = None  # type: ignore[assignment]
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(quiet)
        del sys.modules[package]
        if before is not None:
            sys.modules[package] = before


def _missing(what: str) -> InputError:
    return InputError(
        f"base_weights: nf4 needs {NAME}, which {what}", fix="pip install 'deltaw[quant]', or use base_weights: int8"
    )
