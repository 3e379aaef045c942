"""The other kinds of update: `Dense`, what full fine-tuning learns, and `DoRA`.

`Dense` is the matrix itself, which LoRA is compared with.

`DoRA` (Liu et al. 2024, §4) replaces the weight's rows by rows of a learnt length m in a learnt direction:

    W' = m ∘ V / ‖V‖,   V = W + scale · B A,   ‖·‖ the 2-norm of each row (linalg/row_norms.py)

so ΔW = W' − W depends on W and has full rank in general: it has no SVD and no sum, only `relative_to(W)`.

Letters: M output features, N input features, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltaw.errors import InputError
from deltaw.factors import LowRank, count_terms
from deltaw.kernels.weight import Weight
from deltaw.linalg.row_norms import norms_of_sum, over_norms, squared_norms
from deltaw.updates import Plain, Svd, Update


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Plain):
    """ΔW as the matrix itself, [M, N]: what full fine-tuning learns. Raises ValueError when it isn't a matrix."""

    kind: ClassVar[str] = "full"
    scale: ClassVar[float] = 1.0
    delta_MN: Tensor

    def __post_init__(self) -> None:
        if self.delta_MN.ndim != 2:
            raise ValueError(f"not a matrix: shape {tuple(self.delta_MN.shape)}")

    @staticmethod
    def of(tensors: Mapping[str, Tensor], scale: float) -> "Dense":
        return Dense(tensors["delta"])

    @property
    def rank(self) -> int:
        """min(M, N): nothing limits it."""
        return min(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta_MN.shape[0], self.delta_MN.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        return {"delta": self.delta_MN}

    def apply(self, x_TN: Tensor) -> Tensor:
        return x_TN @ self.delta_MN.T

    def dense(self) -> Tensor:
        """No copy."""
        return self.delta_MN

    def svd(self) -> Svd:
        """A full decomposition, O(M N K)."""
        u, s, vt = torch.linalg.svd(self.delta_MN, full_matrices=False)
        return u, s, vt

    def truncate(self, rank: int | None = None, energy: float | None = None) -> LowRank:
        """The best LoRA of a rank, or of the least rank that keeps `energy` of ‖ΔW‖²_F; √S in both factors, scale 1."""
        svd = self.svd()
        return LowRank.of_svd(svd, count_terms(svd[1], rank, energy))

    def rows(self, start: int, stop: int) -> "Dense":
        return Dense(self.delta_MN[start:stop])

    def low_rank(self) -> LowRank:
        raise InputError("full fine-tuning has no factors", fix="extract a LoRA from it first")

    def turned(self) -> "Dense":
        return Dense(self.delta_MN.T)

    def times(self, factor: float) -> "Dense":
        return Dense(factor * self.delta_MN)

    def norm(self) -> float:
        return float(self.delta_MN.norm())

    def inner(self, other: Plain) -> float:
        self.check_shape(other)
        return float((self.delta_MN.double() * other.double().dense()).sum())

    def __add__(self, other: Plain) -> "Dense":
        self.check_shape(other)
        return Dense(self.delta_MN + other.dense())

    __radd__ = __add__


@dataclass(frozen=True, eq=False, repr=False)
class DoRA(Update):
    """m ∘ V / ‖V‖ with V = W + ΔV, ΔV = `low`, m [M] in its dtype. Raises ValueError when m isn't a vector of M."""

    kind: ClassVar[str] = "dora"
    low: LowRank
    magnitude_M: Tensor

    def __post_init__(self) -> None:
        if self.magnitude_M.shape != self.low.shape[:1]:
            raise ValueError(f"magnitudes {tuple(self.magnitude_M.shape)} are not those of {self.low.shape[0]} rows")

    @staticmethod
    def of(tensors: Mapping[str, Tensor], scale: float) -> "DoRA":
        return DoRA(LowRank.of(tensors, scale), tensors["magnitude"])

    @property
    def rank(self) -> int:
        """R of the low-rank part; ΔW's own isn't limited by it."""
        return self.low.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.low.shape

    @property
    def scale(self) -> float:
        return self.low.scale

    def tensors(self) -> dict[str, Tensor]:
        return {**self.low.tensors(), "magnitude": self.magnitude_M}

    def rows(self, start: int, stop: int) -> "DoRA":
        return DoRA(self.low.rows(start, stop), self.magnitude_M[start:stop])

    def relative_to(self, weight: Weight) -> Dense:
        """In the factors' dtype: exactly 0 for fresh factors."""
        if weight.shape != self.shape:
            raise ValueError(f"an update of {self.shape} on a weight of {weight.shape}")
        w_MN = weight.dense().to(self.low.a_RN.dtype)
        norms_M = norms_of_sum(squared_norms(w_MN), (w_MN @ self.low.a_RN.T), self.low.a_RN, self.low.b_MR, self.scale)
        gain_M = over_norms(self.magnitude_M, norms_M)
        return Dense(gain_M[:, None] * (w_MN + self.low.dense()) - w_MN)

    def plain(self) -> Plain:
        raise InputError("DoRA's update depends on the weight", fix="name the base that it was trained on")

    def low_rank(self) -> LowRank:
        fix = "merge it with PEFT (merge_and_unload, save_pretrained), then deltaw extract makes a LoRA of the result"
        raise InputError("DoRA's update depends on the weight and has full rank", fix=fix)


KINDS: dict[str, type[Update]] = {update.kind: update for update in (LowRank, Dense, DoRA)}
