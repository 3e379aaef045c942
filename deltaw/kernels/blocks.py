"""`BlockWeight`: a matrix in the blocks of a GGUF file, as llama.cpp will multiply it.

    Q8_0                    w = d · q              32 numbers share d (float16)
    Q4_0  Q5_0              w = d · (q − 2^(b−1))
    Q4_1  Q5_1              w = d · q + m          m is float16, too
    Q4_K  Q5_K              w = (d · s) · q − dₘ · t    256 numbers share d and dₘ, 32 of them s and t (6 bits)
    Q6_K                    w = (d · s) · (q − 32)      256 numbers share d, 16 of them s (8 bits)

Numbers are those of gguf's own `dequantize` to the bit: the same products in the same order, in float32.

A file has its blocks one after the other, scales among the codes. Unpacked like that, a matrix takes twice the time
(0.88 ms instead of 0.37 ms for 1536 x 576 in Q4_1), so a block's fields are put apart once, when it is loaded:

    codes   [M, N]     int8, of Q8_0
    low     [M, N/2]   the lower four bits: of number j, and above them of number j + N/2 of the row
    high    [M, N/8]   the fifth bit of numbers j, j + N/8, j + 2N/8, … (Q6_K: [M, N/4], two bits)
    d, m    [M, N/32]  bits of float16, of K-quants by 256
    s, t    [M, N/32]  the six bits of a K-quant in a byte each, which makes it 3 % larger

So all that is done to codes runs along a row, in bytes. What a format doesn't have isn't there.

Rejected: unpacking the file's own layout (above), a table of 16 products per block and `torch.compile` (a compiler on
the user's machine), and integer products as llama.cpp makes them (they round x to 8 bits; training would see it).

Letters: M outputs, N inputs, K rows of a tile, B blocks of a row, G groups of a row that share a scale.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.packed import PackedWeight

Parts = dict[str, Tensor]


class Format(NamedTuple):
    """A block: `size` numbers in `nbytes` bytes, codes of `bits` bits less `offset`, `group` of them to a scale, and
    where its fields begin. K-quants have `scales`; `m` is what is added (dₘ, and taken away, in K-quants)."""

    name: str
    size: int
    nbytes: int
    bits: int
    group: int
    codes: int
    d: int = 0
    m: int | None = None
    high: int = 0
    scales: int | None = None
    offset: int = 0


# By ggml's number of the type.
FORMATS = {
    2: Format("Q4_0", 32, 18, bits=4, group=32, codes=2, offset=8),
    3: Format("Q4_1", 32, 20, bits=4, group=32, codes=4, m=2),
    6: Format("Q5_0", 32, 22, bits=5, group=32, codes=6, high=2, offset=16),
    7: Format("Q5_1", 32, 24, bits=5, group=32, codes=8, m=2, high=4),
    8: Format("Q8_0", 32, 34, bits=8, group=32, codes=2),
    12: Format("Q4_K", 256, 144, bits=4, group=32, codes=16, m=2, scales=4),
    13: Format("Q5_K", 256, 176, bits=5, group=32, codes=48, m=2, high=16, scales=4),
    14: Format("Q6_K", 256, 210, bits=6, group=16, codes=0, d=208, high=128, scales=192, offset=32),
}


class BlockWeight(PackedWeight):
    """A matrix [M, N] in blocks of one format; N is a multiple of their size."""

    def __init__(self, kind: Format, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        m, width = parts["d"].shape
        super().__init__(parts, (m, width * kind.size), dtype)
        self.kind = kind

    @property
    def form(self) -> str:
        return self.kind.name

    def unpack(self, index: Tensor | slice) -> Tensor:
        return numbers_of(self.kind, {name: part[index] for name, part in self.parts.items()})

    def coded(self, index: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        parts = {name: part[index] for name, part in self.parts.items()}
        return _codes(self.kind, parts), *_scales(self.kind, parts)


def numbers_of(kind: Format, parts: Parts) -> Tensor:
    """Some rows' numbers [K, N] in float32."""
    out_KN = _codes(kind, parts)
    out_KGg = out_KN.view(len(out_KN), out_KN.shape[1] // kind.group, kind.group)
    d_KG, m_KG = _scales(kind, parts)
    out_KGg.mul_(d_KG[..., None])
    if m_KG is not None:  # in two passes: addcmul, which makes one, takes twice their time with numbers for a group
        out_KGg.add_(m_KG[..., None])
    return out_KN


def parts_of(kind: Format, raw_MX: Tensor) -> Parts:
    """The parts of rows of blocks, [M, bytes] in uint8 as a file has them."""
    raw_MBx = raw_MX.unflatten(1, (-1, kind.nbytes))
    parts = {"d": _halves(raw_MBx, kind.d)}
    if kind.m is not None:
        parts["m"] = _halves(raw_MBx, kind.m)
    if kind.scales is not None:
        parts |= _k_scales(kind, raw_MBx)
    if kind.bits == 8:
        return parts | {"codes": raw_MBx[..., kind.codes :].flatten(1).view(torch.int8)}
    low_MN, high_MN = _low_bits(kind, raw_MBx), _high_bits(kind, raw_MBx)
    half = low_MN.shape[1] // 2
    parts["low"] = low_MN[:, :half] | low_MN[:, half:] << 4
    if high_MN is not None:
        width, count = kind.bits - 4, 8 // (kind.bits - 4)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
        parts["high"] = (high_MN.unflatten(1, (count, -1)) << shifts).sum(1, dtype=torch.uint8)
    return parts


def _codes(kind: Format, parts: Parts) -> Tensor:
    """The codes less their offset, [K, N] in float32."""
    if kind.bits == 8:
        return parts["codes"].float()
    low = parts["low"]
    half = low.shape[1]
    if kind.bits == 4:
        out_KN = torch.empty(len(low), 2 * half, device=low.device)
        for codes, place in ((low & 15, out_KN[:, :half]), (low >> 4, out_KN[:, half:])):
            place.copy_(codes.view(torch.int8).sub_(kind.offset) if kind.offset else codes)
        return out_KN
    codes_KN = torch.cat([low & 15, low >> 4], 1)
    high, width = parts["high"], kind.bits - 4
    mask = (2**width - 1) << 4
    for number, place in enumerate(codes_KN.tensor_split(8 // width, 1)):
        shift = 4 - number * width
        place.bitwise_or_((high << shift if shift >= 0 else high >> -shift).bitwise_and_(mask))
    return (codes_KN.view(torch.int8).sub_(kind.offset) if kind.offset else codes_KN).float()


def _scales(kind: Format, parts: Parts) -> tuple[Tensor, Tensor | None]:
    """What codes are multiplied by and what is added then, [K, G] in float32."""
    d = parts["d"].view(torch.float16).float()
    m = parts["m"].view(torch.float16).float() if "m" in parts else None
    if kind.scales is None:
        return d, m
    per = kind.size // kind.group
    blocks = (d.shape[1], per)  # in so many words, since there may be no row
    d = (d[..., None] * parts["s"].unflatten(1, blocks)).flatten(1)
    return d, None if m is None else (m.neg_()[..., None] * parts["t"].unflatten(1, blocks)).flatten(1)


def _halves(raw_MBx: Tensor, at: int) -> Tensor:
    """The bits of a float16 per block [M, B]."""
    return raw_MBx[..., at : at + 2].contiguous().view(torch.int16).squeeze(-1)


def _k_scales(kind: Format, raw_MBx: Tensor) -> Parts:
    """The scales within a block of a K-quant [M, G], and what is scaled by its dₘ."""
    assert kind.scales is not None
    if kind.name == "Q6_K":
        return {"s": raw_MBx[..., kind.scales : kind.scales + 16].flatten(1).view(torch.int8)}
    first, second, third = raw_MBx[..., kind.scales : kind.scales + 12].unflatten(-1, (3, 4)).unbind(-2)
    s = torch.cat([first & 63, third & 15 | first >> 2 & 48], -1)
    t = torch.cat([second & 63, third >> 4 | second >> 2 & 48], -1)
    return {"s": s.flatten(1), "t": t.flatten(1)}


def _low_bits(kind: Format, raw_MBx: Tensor) -> Tensor:
    """The lower four bits of each number [M, N], in order: a run of bytes has its lower halves, then its upper ones."""
    run = {"Q4_K": 32, "Q5_K": 32, "Q6_K": 64}.get(kind.name, 16)
    runs = raw_MBx[..., kind.codes : kind.codes + kind.size // 2].unflatten(-1, (-1, run))
    return torch.stack([runs & 15, runs >> 4], -2).flatten(1)


def _high_bits(kind: Format, raw_MBx: Tensor) -> Tensor | None:
    """The bits above them [M, N], in order, in formats that have some."""
    width = kind.bits - 4
    if not width:
        return None
    field = raw_MBx[..., kind.high : kind.high + kind.size * width // 8]
    if kind.size == 32:  # bit by bit
        return (field[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)
    runs = field.unflatten(-1, (-1, 1, 32))
    return (runs >> torch.arange(0, 8, width, dtype=torch.uint8)[:, None] & (2**width - 1)).flatten(1)
