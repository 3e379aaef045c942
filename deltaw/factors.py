"""The update as a value: `Update`, what can be asked of any ΔW, and `LowRank`, ΔW = scale · B A, what LoRA trains.

An update is immutable and isn't a layer: training makes it, a file stores it, and everything else is a function of it.
What depends on its kind is a method of `Update`, so that nobody asks which class a value has; the other kinds, full
fine-tuning and DoRA, are in kinds.py, and a new kind is one new class there.

`LowRank` is two thin factors, so adding, negating and cutting are exact and cheap. The dense M x N matrix exists only
where `dense()` is written.

The SVD of thin factors costs O((M + N) R²) and gives thin factors again (linalg/svd.py). A command asks for that of one
update many times, for its spectrum and then for each size it tries, so `wide_svd` is computed once per value and kept
with it. It is in float64, so it takes twice the memory of float32 factors for as long as the value lives.

Letters: T rows of inputs, M output features, N input features, R rank, K = min(M, N, R). A is [R, N], B is [M, R], as
in the LoRA paper (Hu et al. 2021, §4.1) and PEFT; `docs/math.md` maps other notations to this one.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from deltaw.kernels.weight import Weight
from deltaw.linalg.rank import energy_rank
from deltaw.linalg.svd import product_singular_values, product_svd

Svd = tuple[Tensor, Tensor, Tensor]  # U [M, K], S [K] descending, Vᵀ [K, N]


class Update(abc.ABC):
    """What one weight [M, N] changes by."""

    kind: ClassVar[str]  # the AdapterSpec.kind that trains it

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(M, N): the shape of the weight that this updates."""

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """R, the number of directions that are stored (not how many are used)."""

    @property
    @abc.abstractmethod
    def scale(self) -> float:
        """The factor in front of B A; 1 where there is none."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored and trained, by the names that layers and files have for it."""

    @staticmethod
    @abc.abstractmethod
    def of(tensors: Mapping[str, Tensor], scale: float) -> "Update":
        """The update that has these `tensors()` (others are ignored) and this scale."""

    @abc.abstractmethod
    def rows(self, start: int, stop: int) -> "Update":
        """What those rows of W take."""

    @abc.abstractmethod
    def relative_to(self, weight: Weight) -> "Plain":
        """ΔW on the weight W. Costs M N numbers where it depends on W, nothing elsewhere."""

    @abc.abstractmethod
    def plain(self) -> "Plain":
        """ΔW by itself. Raises InputError where it depends on the weight."""

    @abc.abstractmethod
    def low_rank(self) -> "LowRank":
        """The two factors that this is. Raises InputError, with what to do instead, where it isn't that."""

    @property
    def parameters(self) -> int:
        """The count of numbers that are stored and trained."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same kind of update, of changed tensors."""
        tensors = {name: change(tensor) for name, tensor in self.tensors().items()}
        return self.of(tensors, self.scale)  # type: ignore[return-value]

    def cpu(self) -> Self:
        """The same update on the CPU."""
        return self.map(Tensor.cpu)

    def double(self) -> Self:
        """The same update in float64."""
        return self.map(Tensor.double)


class Plain(Update, abc.ABC):
    """An update that is a matrix whatever W is."""

    def relative_to(self, weight: Weight) -> "Plain":
        return self

    def plain(self) -> "Plain":
        return self

    @abc.abstractmethod
    def apply(self, x_TN: Tensor) -> Tensor:
        """x ΔWᵀ, [..., M]."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """The [M, N] matrix itself. Costs M N numbers: named so that nobody forms it by accident."""

    @abc.abstractmethod
    def svd(self) -> Svd:
        """U [M, K], S [K], Vᵀ [K, N] of ΔW, in its own dtype."""

    @abc.abstractmethod
    def turned(self) -> "Plain":
        """ΔWᵀ, for a weight that is stored as [N, M]."""

    @abc.abstractmethod
    def times(self, factor: float) -> "Plain":
        """factor · ΔW."""

    @abc.abstractmethod
    def norm(self) -> float:
        """‖ΔW‖_F."""

    @abc.abstractmethod
    def inner(self, other: "Plain") -> float:
        """⟨ΔW, ΔW'⟩_F in float64. Raises ValueError when the shapes differ."""

    @abc.abstractmethod
    def __add__(self, other: "Plain") -> "Plain": ...

    def __neg__(self) -> "Plain":
        return self.times(-1.0)

    def __sub__(self, other: "Plain") -> "Plain":
        return self + (-other)

    def check_shape(self, other: Update) -> None:
        """Raise ValueError where the two can't be of one weight."""
        if self.shape != other.shape:
            raise ValueError(f"updates of different shapes: {self.shape} and {other.shape}")


@dataclass(frozen=True, eq=False)
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
