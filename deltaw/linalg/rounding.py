"""What rounding alone does to a matrix: how much of a difference it makes, and how large a singular value.

An entry x that was rounded to a type of precision ε is off by at most half of u(x) = ε · 2^⌊log₂|x|⌋, evenly spread,
so

    variance of an entry      v(x) = u(x)² / 12
    ‖E‖²_F                    Σ v(xᵢⱼ), on average
    ‖E‖₂                      about max_i √(Σ_j v(xᵢⱼ)) + max_j √(Σ_i v(xᵢⱼ))    (Bandeira & van Handel 2016)

The type is read off the numbers, not off the file: a matrix that was saved as float32 after it had been bfloat16 is
rounded to bfloat16. The bound on ‖E‖₂ is tight where all entries are of one size, √v (√M + √N) (Marchenko & Pastur
1967), and then a singular value above it is hardly ever chance.

Letters: M rows, N columns.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rounding(NamedTuple):
    """The expected ‖E‖²_F and ‖E‖₂ of the rounding errors of a matrix."""

    energy: float
    edge: float


NONE = Rounding(0.0, 0.0)


def precision(x: Tensor) -> float:
    """ε of the shortest type that holds every entry exactly: bfloat16, float16, or its own."""
    for dtype in (torch.bfloat16, torch.float16):
        if x.dtype == dtype or torch.equal(x.to(dtype).to(x.dtype), x):
            return torch.finfo(dtype).eps
    return torch.finfo(x.dtype).eps


def rounding(x_MN: Tensor) -> Rounding:
    """What the errors of x's own rounding come to."""
    _, exponent_MN = torch.frexp(x_MN.float())  # x = m · 2^e with m in [0.5, 1)
    spacing_MN = torch.where(x_MN == 0, 0.0, precision(x_MN) * torch.exp2(exponent_MN.float() - 1))
    variance_MN = spacing_MN.double().square_() / 12
    rows, columns = variance_MN.sum(1), variance_MN.sum(0)
    return Rounding(float(rows.sum()), math.sqrt(float(rows.max())) + math.sqrt(float(columns.max())))
