"""Updates that say what takes a weight's place: `Rows`, some of its rows, and `Whole`, all of it.

They are of the two matrices of the vocabulary, the embedding and the head [V, D], and are what PEFT keeps of trained
tokens and of `modules_to_save`: the new numbers themselves, not what they differ by. So ΔW depends on W, and there is
nothing to decompose without it: `relative_to(W)` gives

    Rows     a LowRank of as many directions as rows: B one-hot [V, K], A the rows' differences [K, D]
    Whole    a Dense, W' − W

A token that the base doesn't have is a row beyond its last one. `relative_to` takes W to have zeros there, so that
W + ΔW is the matrix with the new rows, `height` of them.

Rejected: differences in the file's place. The row of a new token differs from something that only its trainer's
tokenizer knows, and two of PEFT's readers would get two models.

Letters: V words of the vocabulary, K trained rows, D hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.kernels.weight import Weight
from deltaw.kinds import Dense
from deltaw.updates import Plain, Update

MERGE = "merge it into its base: deltaw merge"


@dataclass(frozen=True, eq=False, repr=False)
class Rows(Update):
    """Row index_K[k] of the weight is rows_KD[k]. Raises ValueError where they don't fit or a row is named twice."""

    kind: ClassVar[str] = "tokens"
    scale: ClassVar[float] = 1.0
    index_K: Tensor
    rows_KD: Tensor

    def __post_init__(self) -> None:
        index_K, rows_KD = self.index_K, self.rows_KD
        if rows_KD.ndim != 2 or index_K.shape != rows_KD.shape[:1] or not len(index_K):
            raise ValueError(f"{tuple(index_K.shape)} numbers of rows for rows of shape {tuple(rows_KD.shape)}")
        if int(index_K.min()) < 0 or len(index_K.unique()) < len(index_K):
            raise ValueError("a row is named twice, or by a negative number")

    @staticmethod
    def of(tensors: Mapping[str, Tensor], scale: float) -> "Rows":
        return Rows(tensors["index"], tensors["rows"])

    @property
    def shape(self) -> tuple[int, int]:
        """The smallest weight that has these rows."""
        return int(self.index_K.max()) + 1, self.rows_KD.shape[1]

    @property
    def rank(self) -> int:
        """K, or D where that is less."""
        return min(self.rows_KD.shape)

    @property
    def parameters(self) -> int:
        return self.rows_KD.numel()

    def height(self, rows: int) -> int:
        """How many rows a weight of so many has with these: more, where tokens were added."""
        return max(rows, self.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index_K, "rows": self.rows_KD}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(self.index_K, change(self.rows_KD))

    def cpu(self) -> Self:
        return type(self)(self.index_K.cpu(), self.rows_KD.cpu())

    def rows(self, start: int, stop: int) -> Update:
        """Those among them; where there is none, nothing."""
        inside_K = (self.index_K >= start) & (self.index_K < stop)
        if not inside_K.any():
            return LowRank(self.rows_KD.new_zeros(1, self.rows_KD.shape[1]), self.rows_KD.new_zeros(stop - start, 1))
        return Rows(self.index_K[inside_K] - start, self.rows_KD[inside_K])

    def relative_to(self, weight: Weight) -> LowRank:
        (v, d), index_K = weight.shape, self.index_K
        if d != self.rows_KD.shape[1]:
            raise ValueError(f"rows of {self.rows_KD.shape[1]} numbers for a weight of {weight.shape}")
        known_K = index_K < v
        before_KD = torch.zeros_like(self.rows_KD)
        before_KD[known_K] = weight.rows(index_K[known_K].to(weight.device)).to(before_KD)
        one_VK = F.one_hot(index_K, self.height(v)).T.to(self.rows_KD)
        return LowRank(self.rows_KD - before_KD, one_VK)

    def plain(self) -> Plain:
        raise InputError(
            "trained tokens are rows that take the place of the base's", fix="name the base that they were trained on"
        )

    def low_rank(self) -> LowRank:
        raise InputError("trained tokens are rows of a matrix, not two factors", fix=MERGE)


@dataclass(frozen=True, eq=False, repr=False)
class Whole(Update):
    """The weight itself, [V, D]. Raises ValueError when it isn't a matrix."""

    kind: ClassVar[str] = "whole"
    scale: ClassVar[float] = 1.0
    weight_VD: Tensor

    def __post_init__(self) -> None:
        if self.weight_VD.ndim != 2:
            raise ValueError(f"not a matrix: shape {tuple(self.weight_VD.shape)}")

    @staticmethod
    def of(tensors: Mapping[str, Tensor], scale: float) -> "Whole":
        return Whole(tensors["weight"])

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight_VD.shape[0], self.weight_VD.shape[1]

    @property
    def rank(self) -> int:
        """min(V, D): nothing limits it."""
        return min(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight_VD}

    def rows(self, start: int, stop: int) -> "Whole":
        return Whole(self.weight_VD[start:stop])

    def relative_to(self, weight: Weight) -> Dense:
        if weight.shape != self.shape:
            raise ValueError(f"a weight of {self.shape} in the place of one of {weight.shape}")
        return Dense(self.weight_VD - weight.dense().to(self.weight_VD))

    def plain(self) -> Plain:
        raise InputError(
            "a module that was trained whole takes the place of the base's", fix="name the base that it was trained on"
        )

    def low_rank(self) -> LowRank:
        raise InputError("a module that was trained whole has no factors", fix=MERGE)


REPLACED: dict[str, type[Update]] = {update.kind: update for update in (Rows, Whole)}
