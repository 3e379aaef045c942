"""How far off rounding to a format leaves a number: the standard deviation of its error, entry by entry.

    floats      |x| u / √6. The error is spread evenly over ± u · 2^⌊log₂|x|⌋, a third of whose square is its variance,
                and x is 1 to 2 times the power, evenly in its logarithm: u/√3 · √0.54. u is the unit roundoff, half of
                the distance to the next number: bfloat16 2⁻⁸, float16 2⁻¹¹
    float32     u = 2⁻²⁰ and not 2⁻²⁴: it stands for sums of a few hundred products in another order, √N · 2⁻²⁴
    blocks      step / √12, the step that a block's own extremes give: 32 (or 16) numbers along a row with 2^b levels,
                either symmetric about 0 (largest |x| / 2^(b−1)) or between the smallest and the largest

K-quants and IQ types round their steps once more and choose them better than by the extremes; their steps here are what
their bits allow, which is the right size and no more. An unknown format is taken for bfloat16.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """`size` numbers share a step; `levels` steps from 0 to the largest, or from the smallest to the largest."""

    size: int
    levels: int
    symmetric: bool


UNIT = {"float32": 2.0**-20, "bfloat16": 2.0**-8, "float16": 2.0**-11}
BLOCKS = {
    "Q8_0": Block(32, 127, True),
    "Q8_1": Block(32, 127, True),
    "Q5_0": Block(32, 16, True),
    "Q5_1": Block(32, 31, False),
    "Q4_0": Block(32, 8, True),
    "Q4_1": Block(32, 15, False),
    "Q6_K": Block(16, 32, True),
    "Q5_K": Block(32, 31, False),
    "Q4_K": Block(32, 15, False),
    "Q3_K": Block(16, 4, True),
    "Q2_K": Block(16, 3, False),
    "IQ4_NL": Block(32, 8, True),
    "IQ4_XS": Block(32, 8, True),
    "MXFP4": Block(32, 8, True),
}
ROUGHEST = "Q2_K"  # stands for the 1 to 3 bit types


def known(name: str) -> str:
    """The format's own name, or that of the one that stands for it."""
    if name in UNIT or name in BLOCKS:
        return name
    return ROUGHEST if name.startswith(("IQ", "TQ", "Q1", "Q2", "Q3")) else "bfloat16"


def exact(name: str) -> bool:
    """Whether only the order of sums loses anything."""
    return known(name) == "float32"


def error(name: str, x: Tensor) -> Tensor:
    """The standard deviation of each entry's error when `x` is rounded along its last side, float32."""
    name, x = known(name), x.float()
    if name in UNIT:
        return x.abs() * (UNIT[name] / math.sqrt(6))
    block = BLOCKS[name]
    length = x.shape[-1]
    padded = F.pad(x, (0, -length % block.size)).unflatten(-1, (-1, block.size))
    span = (
        padded.abs().amax(-1, keepdim=True)
        if block.symmetric
        else padded.amax(-1, keepdim=True) - padded.amin(-1, keepdim=True)
    )
    steps = (span / (block.levels * math.sqrt(12))).expand_as(padded).flatten(-2)
    return steps[..., :length]


def described(name: str) -> str:
    """In words, for whoever reads the verdict."""
    name = known(name)
    if name == "float32":
        return "float32 (sums in another order, about 2⁻²⁰)"
    if name in UNIT:
        return f"{name} (off by up to {'2⁻⁸' if name == 'bfloat16' else '2⁻¹¹'} of each number)"
    block = BLOCKS[name]
    return f"{name} (blocks of {block.size} numbers with {block.levels} steps)"


def rms(name: str) -> float:
    """The error relative to normally distributed numbers: what a format costs, in one figure."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    return float(error(name, x).square().mean().sqrt())
