"""Cutting an update: to which rank, at what loss, and the nearest low-rank update of a dense change.

With singular values σ₁ ≥ σ₂ ≥ … the best update of rank k keeps the first k terms, at the relative error

    ‖ΔW − ΔW_k‖_F / ‖ΔW‖_F = √(Σ_{i>k} σᵢ²) / √(Σ σᵢ²)              (Eckart & Young 1936)

Every verb that cuts (resize, combine, extract) states it as a `Loss` per module, so that nothing is silently lost.

`nearest` is for a change that is given as a matrix. With an energy to keep, the whole spectrum is needed and the full
SVD is taken. With a rank well below min(M, N) a randomised one does (linalg/svd.py). Its error is measured, not
assumed, and the power steps are doubled until that makes the error less than 0.3 % smaller. What is left is then of
that size (over the spectra of the tests the error is within 0.05 % of the optimum's; the tests ask for 1 %). Where
eight steps don't suffice the full SVD decides.

Letters: M outputs, N inputs, K singular values.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.kinds import Dense
from deltaw.linalg.rank import energy_rank
from deltaw.linalg.svd import OVERSAMPLE, Approximation, randomised_svd, truncated_svd

SMALL = 8  # times (rank + oversample) must fit in min(M, N) for the randomised SVD to be the cheaper one
POWERS = (2, 4, 8)
SETTLED = 3e-3  # a relative gain in error below which more power steps are not worth it
ROUNDING = 1e-6  # of ‖Δ‖: float32 products tell no smaller error apart


@dataclass(frozen=True)
class Loss:
    """What a module's update lost: its rank before and after, and ‖ΔW − ΔW'‖_F / ‖ΔW‖_F (0 where ΔW = 0)."""

    module: str
    old_rank: int
    new_rank: int
    relative_error: float


def check_size(rank: int | None, energy: float | None) -> None:
    """Raise InputError unless exactly one of a rank of 1 or more and an energy in (0, 1] is given."""
    if (rank is None) == (energy is None):
        raise InputError("give a rank or an energy, one of the two")
    if rank is not None and rank < 1:
        raise InputError(f"rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy is the share of ‖ΔW‖² to keep, above 0 and at most 1, not {energy}")


def wanted_rank(s_K: Tensor, rank: int | None, energy: float | None) -> int:
    """`rank` if it is given and there are as many singular values, else the least that keeps `energy`; at least 1."""
    wanted = rank if energy is None else int(energy_rank(s_K, energy))
    return max(1, min(wanted or 1, len(s_K)))


def relative_error(s_K: Tensor, rank: int) -> float:
    """√(Σ_{i>rank} σᵢ² / Σ σᵢ²), 0 for zeros."""
    shares_K = (s_K / (float(s_K[0]) or 1)).square()
    return math.sqrt(float(shares_K[rank:].sum()) / (float(shares_K.sum()) or 1))


def nearest(
    delta_MN: Tensor, *, rank: int | None = None, energy: float | None = None, edge: float = 0.0
) -> tuple[LowRank, float]:
    """The nearest update of a rank (or of the least rank for an energy), scale 1, and its relative error.

    `edge`: the largest singular value that rounding alone gives; an energy below 1 is not filled up with smaller ones.
    """
    if rank is not None and SMALL * (rank + OVERSAMPLE) <= min(delta_MN.shape):
        top = _randomised(delta_MN, rank)
        size = float(torch.linalg.matrix_norm(delta_MN))
        return LowRank.of_svd((top.u_MK, top.s_K, top.vt_KN), rank), float(top.error_frobenius) / (size or 1)
    svd = Dense(delta_MN).svd()
    s_K = svd[1]
    k = wanted_rank(s_K, rank, energy)
    if energy is not None and energy < 1:
        k = max(1, min(k, int((s_K > edge).sum())))
    return LowRank.of_svd(svd, k), relative_error(s_K.double(), k)


def _randomised(delta_MN: Tensor, rank: int) -> Approximation:
    """With as many power steps as the spectrum needs, or the full SVD."""
    floor = ROUNDING * float(torch.linalg.matrix_norm(delta_MN))
    best = float("inf")
    for power in POWERS:
        top = randomised_svd(delta_MN, rank, power=power, generator=torch.Generator(delta_MN.device).manual_seed(0))
        error = float(top.error_frobenius)
        if error <= floor or error >= (1 - SETTLED) * best:
            return top
        best = error
    return truncated_svd(delta_MN, rank)
