"""`LowRank`: ΔW = scale · B A, what LoRA trains, as a value.

It is two thin factors, so adding, negating and cutting are exact and cheap. The dense M x N matrix exists only where
`dense()` is written.

The SVD of thin factors costs O((M + N) R²) and gives thin factors again (linalg/svd.py). A command asks for that of one
update many times, for its spectrum and then for each size it tries, so `wide_svd` is computed once per value and kept
with it. It is in float64, so it takes twice the memory of float32 factors for as long as the value lives.

Letters: T rows of inputs, M output features, N input features, R rank, K = min(M, N, R). A is [R, N], B is [M, R], as
in the LoRA paper (Hu et al. 2021, §4.1) and PEFT; `docs/math.md` maps other notations to this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from deltaw.linalg.rank import energy_rank
from deltaw.linalg.svd import product_singular_values, product_svd
from deltaw.updates import Plain, Svd


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Plain):
    """ΔW = scale · B A with A [R, N] and B [M, R]; raises ValueError when the shapes do not fit."""

    kind: ClassVar[str] = "lora"
    a_RN: Tensor
    b_MR: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        a, b = self.a_RN, self.b_MR
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"factors do not fit: A is {tuple(a.shape)} (R, N), B is {tuple(b.shape)} (M, R)")

    @staticmethod
    def of(tensors: Mapping[str, Tensor], scale: float) -> "LowRank":
        return LowRank(tensors["a"], tensors["b"], scale)

    @staticmethod
    def of_svd(svd: Svd, rank: int, scale: float = 1.0) -> "LowRank":
        """The first `rank` terms, √(S / scale) in both factors."""
        u_MK, s_K, vt_KN = svd
        root_R = (s_K[:rank] / scale).sqrt()
        return LowRank(root_R[:, None] * vt_KN[:rank], u_MK[:, :rank] * root_R, scale)

    @property
    def rank(self) -> int:
        return self.a_RN.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b_MR.shape[0], self.a_RN.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        return {"a": self.a_RN, "b": self.b_MR}

    def apply(self, x_TN: Tensor) -> Tensor:
        """In O(R (M + N)) per row."""
        return self.scale * ((x_TN @ self.a_RN.T) @ self.b_MR.T)

    def dense(self) -> Tensor:
        return self.scale * (self.b_MR @ self.a_RN)

    def svd(self) -> Svd:
        """From the factors alone."""
        u, s, vt = product_svd(self.b_MR, self.a_RN)
        sign = -1.0 if self.scale < 0 else 1.0
        return sign * u, abs(self.scale) * s, vt

    @cached_property
    def wide_svd(self) -> Svd:
        """The same of float64 factors, computed once."""
        return self.double().svd()

    def truncate(self, rank: int | None = None, energy: float | None = None) -> "LowRank":
        """The best approximation of a lower rank (Eckart-Young-Mirsky), in factors of the update's own scale and dtype;
        the update itself where it has no more than that.

        Give exactly one: `rank`, or `energy` in (0, 1], the share of ‖ΔW‖²_F to keep.
        """
        terms = count_terms(self.wide_svd[1], rank, energy)
        if terms == self.rank:
            return self
        cut = LowRank.of_svd(self.wide_svd, terms, abs(self.scale) or 1.0)
        return LowRank(cut.a_RN.to(self.a_RN.dtype), cut.b_MR.to(self.b_MR.dtype), cut.scale)

    def rows(self, start: int, stop: int) -> "LowRank":
        return LowRank(self.a_RN, self.b_MR[start:stop], self.scale)

    def low_rank(self) -> "LowRank":
        return self

    def turned(self) -> "LowRank":
        return LowRank(self.b_MR.T, self.a_RN.T, self.scale)

    def times(self, factor: float) -> "LowRank":
        return LowRank(self.a_RN, self.b_MR, factor * self.scale)

    def norm(self) -> float:
        return abs(self.scale) * float(product_singular_values(self.b_MR, self.a_RN).norm())

    def inner(self, other: Plain) -> float:
        """scale · ⟨B, ΔW' Aᵀ⟩: O((M + N) R R') for two of low rank."""
        self.check_shape(other)
        wide = self.double()
        return wide.scale * float((wide.b_MR * other.double().apply(wide.a_RN).T).sum())

    def stacked(self, other: "LowRank") -> "LowRank":
        """The sum, exactly: [s₁B₁ s₂B₂] [A₁; A₂]; the ranks add up."""
        self.check_shape(other)
        b_MR = torch.cat([self.scale * self.b_MR, other.scale * other.b_MR], dim=1)
        return LowRank(torch.cat([self.a_RN, other.a_RN]), b_MR)

    def __add__(self, other: Plain) -> Plain:
        """Of two by stacking; with another kind, that kind's own sum."""
        return self.stacked(other) if isinstance(other, LowRank) else NotImplemented


def count_terms(s_K: Tensor, rank: int | None, energy: float | None) -> int:
    """How many terms to keep, at least 1. Raises ValueError unless exactly one of both is given, and possible."""
    if (rank is None) == (energy is None):
        raise ValueError("give rank or energy, one of the two")
    terms = max(1, int(energy_rank(s_K, energy))) if energy is not None else rank
    if terms is None or not 1 <= terms <= len(s_K):
        raise ValueError(f"rank must lie in 1..{len(s_K)}, got {rank}")
    return terms
