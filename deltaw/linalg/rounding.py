"""What rounding does to a matrix: at most to a singular value, on average, and what it
leaves of an update.

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

What is left (`Survival`): weights of a type Q that take an update Δ see Δ̂ = Q(W + Δ) − Q(W), the difference between
the two models that are served. Where W lies on Q's own grid (a bfloat16 base), whatever is below half a step is gone,
Δ̂ = 0; where it doesn't (a block that is quantised again), it moves some entries by a whole step, and Δ̂ is Δ on average
with noise beside it. Hence two figures:

    kept      ⟨Δ̂, Δ⟩ / ‖Δ‖²                 what arrives along Δ itself; 1 but for what is rounded away
    cosine    ⟨Δ̂, Δ⟩ / (‖Δ̂‖ ‖Δ‖)           1 but for what is rounded away and for the noise

They come from ‖Δ̂‖², ‖Δ‖² and ‖Δ̂ − Δ‖², sums that add up over the parts of a model. ⟨Δ̂, Δ⟩ is not summed: half of
‖Δ̂‖² + ‖Δ‖² − ‖Δ̂ − Δ‖² is as exact where little is left and where nearly all is.

Letters: M rows, N columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 13  # numbers that float32 adds up with all the digits it has


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


@dataclass(frozen=True)
class Survival:
    """What rounded weights see of an update, as sums over its entries: `a + b` is that of both."""

    entries: int = 0
    changed: int = 0  # entries with Δ̂ ≠ 0
    seen: float = 0.0  # ‖Δ̂‖²
    true: float = 0.0  # ‖Δ‖²
    lost: float = 0.0  # ‖Δ̂ − Δ‖²

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(
            self.entries + other.entries,
            self.changed + other.changed,
            self.seen + other.seen,
            self.true + other.true,
            self.lost + other.lost,
        )

    @property
    def share(self) -> float:
        """Of the entries, those that change; 0 of none."""
        return self.changed / self.entries if self.entries else 0.0

    @property
    def kept(self) -> float:
        """The part of Δ that arrives along itself; 0 of an update of zeros, as what follows."""
        return (self.seen + self.true - self.lost) / 2 / self.true if self.true else 0.0

    @property
    def cosine(self) -> float:
        """Between Δ̂ and Δ; 0 where nothing is seen, too."""
        size = math.sqrt(self.seen) * math.sqrt(self.true)
        return max(-1.0, min(1.0, (self.seen + self.true - self.lost) / 2 / size)) if size else 0.0

    @property
    def error(self) -> float:
        """‖Δ̂ − Δ‖ / ‖Δ‖."""
        return math.sqrt(self.lost / self.true) if self.true else 0.0


def survival(w: Tensor, delta: Tensor, rounded: Callable[[Tensor], Tensor]) -> Survival:
    """What is left of `delta` on `w`, float32 or float64, in weights that hold `rounded(x)` for x, in x's type."""
    seen = rounded(w + delta) - rounded(w)
    return survived(seen, delta)


def survived(seen: Tensor, delta: Tensor) -> Survival:
    """The same of Δ̂ where somebody has it already; `seen` is overwritten."""
    seen, delta = seen.reshape(-1), delta.reshape(-1)
    # On a CPU numpy compares and counts ten times as fast as torch.
    changed, energy = int(np.count_nonzero(np.not_equal(seen.detach().cpu().numpy(), 0))), _product(seen, seen)
    lost = seen.sub_(delta)
    return Survival(len(delta), changed, energy, _product(delta, delta), _product(lost, lost))


def survived_of(error: Tensor, delta: Tensor, changed: int, entries: int) -> Survival:
    """The same where W lies on Q's grid, of e = Q(W + Δ) − (W + Δ) and the count of entries that change: Δ̂ = Δ + e, so
    that it needs no matrix of its own. Not for a Q so fine that W + Δ is rounded as much when it is formed. `error` and
    `delta` may be a sample of the `entries`: their sums are scaled."""
    scale = entries / max(1, delta.numel())
    true, lost, across = (scale * _product(*pair) for pair in ((delta, delta), (error, error), (error, delta)))
    return Survival(entries, changed, max(0.0, true + 2 * across + lost) if changed else 0.0, true, lost)


def _product(x: Tensor, y: Tensor) -> float:
    """Σxy, in rows or blocks: float32 loses 4e-5 of the norm of a million numbers when it takes them at once. One call
    of numpy's, since threads that make many calls wait for each other between them."""
    a, b = x.detach().cpu().numpy(), y.detach().cpu().numpy()
    if a.ndim == 2 and a.shape[1] <= BLOCK:
        return float(np.einsum("ij,ij->i", a, b).sum(dtype=np.float64))
    a, b = a.reshape(-1), b.reshape(-1)
    whole = len(a) - len(a) % BLOCK
    blocks = np.einsum("ij,ij->i", a[:whole].reshape(-1, BLOCK), b[:whole].reshape(-1, BLOCK))
    return float(blocks.sum(dtype=np.float64)) + float(np.einsum("i,i->", a[whole:], b[whole:]))
