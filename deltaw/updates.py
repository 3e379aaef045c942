"""What can be asked of any update ΔW, whatever its kind: `Update`, and `Plain`, one that is a matrix by itself.

An update is immutable and isn't a layer: training makes it, a file stores it, and everything else is a function of it.
What depends on its kind is a method here, so that nobody asks which class a value has. LoRA's is `LowRank`
(factors.py); full fine-tuning's and DoRA's are in kinds.py, and a new kind is one new class there.

Letters: T rows of inputs, M output features, N input features, K = min(M, N, R).
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor

from deltaw.kernels.weight import Weight

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
    def low_rank(self) -> Any:
        """The two factors that this is, a `LowRank`. Raises InputError, with what to do instead, for another kind."""

    def __repr__(self) -> str:
        """What it is, not the numbers: a notebook shows the last value of a cell."""
        (m, n), scale = self.shape, f", scale {self.scale:g}" if self.scale != 1 else ""
        return f"{type(self).__name__}({m} x {n}, rank {self.rank}{scale})"

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
