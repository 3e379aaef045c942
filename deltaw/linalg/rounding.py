"""What rounding alone does to a matrix: the most that it can do to a singular value, and what it does on average.

At most (`Rounding`), where it is known what the entries were rounded to before they were widened. ε max(M, N) σ₁ of
that type would soon be more than σ₁ itself (ε of bfloat16 is 2⁻⁷). But an E with |E_ij| ≤ u |X_ij| + h moves no
singular value by more than ‖E‖₂ (Weyl), and

    ‖E‖₂ ≤ u min(‖X‖_F, longest row + longest column) + h min(√(M N), √M + √N)

The first of each pair holds for any E, the second for errors of independent signs, as rounding makes (it is about twice
what it needs to be: Bandeira & van Handel 2016, with their root mean square for the largest).

On average (`noise`): an entry x that was rounded to a type of precision ε is off by at most half of
u(x) = ε · 2^⌊log₂|x|⌋, evenly spread, so

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
    """What entries were rounded to before they were widened: by at most a share of each, and an amount."""

    name: str = ""
    relative: float = 0.0
    absolute: float = 0.0

    @staticmethod
    def to(dtype: torch.dtype) -> "Rounding":
        """Half a step of a floating type, and half of its smallest number."""
        about = torch.finfo(dtype)
        return Rounding(str(dtype).removeprefix("torch."), about.eps / 2, about.smallest_normal * about.eps / 2)

    def error(self, x_MN: Tensor) -> float:
        """The most by which it can have moved a singular value of one matrix."""
        m, n = x_MN.shape
        top = float(x_MN.abs().max()) or 1.0  # so that no square overflows
        rows_M, columns_N = (torch.linalg.vector_norm(x_MN / top, dim=side) for side in (1, 0))
        share = min(float(rows_M.norm()), float(rows_M.max() + columns_N.max()))
        return self.relative * share * top + self.absolute * min((m * n) ** 0.5, m**0.5 + n**0.5)


class Noise(NamedTuple):
    """The expected ‖E‖²_F and ‖E‖₂ of the rounding errors of a matrix."""

    energy: float
    edge: float


NONE = Noise(0.0, 0.0)


def precision(x: Tensor) -> float:
    """ε of the shortest type that holds every entry exactly: bfloat16, float16, or its own."""
    for dtype in (torch.bfloat16, torch.float16):
        if x.dtype == dtype or torch.equal(x.to(dtype).to(x.dtype), x):
            return torch.finfo(dtype).eps
    return torch.finfo(x.dtype).eps


def noise(x_MN: Tensor) -> Noise:
    """What the errors of x's own rounding come to."""
    _, exponent_MN = torch.frexp(x_MN.float())  # x = m · 2^e with m in [0.5, 1)
    spacing_MN = torch.where(x_MN == 0, 0.0, precision(x_MN) * torch.exp2(exponent_MN.float() - 1))
    variance_MN = spacing_MN.double().square_() / 12
    rows, columns = variance_MN.sum(1), variance_MN.sum(0)
    return Noise(float(rows.sum()), math.sqrt(float(rows.max())) + math.sqrt(float(columns.max())))
