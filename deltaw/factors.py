"""`LowRank`: the value ΔW = scale · B A that everything here is about; `Dense` and `DoRA`: the other two kinds.

It is an immutable value, not a layer: training makes it, a file stores it, and truncate, add and negate are exact
functions of the two thin factors. The dense M x N matrix exists only where `dense()` is written, and in `Dense`, the ΔW
of full fine-tuning, which is what LoRA is compared with. Both have the same face, so whatever looks at an update can
look at either.

`DoRA` (Liu et al. 2024, §4) replaces the weight's rows by rows of a learnt length m in a learnt direction:

    W' = m ∘ V / ‖V‖,   V = W + scale · B A,   ‖·‖ the 2-norm of each row

so ΔW = W' − W depends on W and has full rank in general: it has no `dense()`, no SVD and no sum, only `relative_to(W)`,
and `as_plain` for whoever takes any update. The norms need no dense sum (`row_norms`):

    ‖vᵢ‖² = ‖wᵢ‖² + s bᵢ·(2 cᵢ + s K bᵢ),   C = W Aᵀ [M, R],   K = A Aᵀ [R, R],   s = scale

in O(M N R) given ‖wᵢ‖². It is a difference where ΔW takes a row nearly away: the relative error of ‖vᵢ‖ is a few
roundings times (‖wᵢ‖² + ‖s bᵢA‖²) / ‖vᵢ‖². With factors in float32 that matters below ‖vᵢ‖ ≈ ‖wᵢ‖ / 1000, where no
training goes; with factors in bfloat16 it would matter everywhere, so they are float32 or float64.

Letters: M output features, N input features, R rank. A is [R, N], B is [M, R], as in the LoRA paper (Hu et al.
2021, §4.1) and PEFT; `docs/math.md` maps other notations to this one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.linalg.rank import energy_rank
from deltaw.linalg.svd import product_svd


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = scale · B A with A [R, N] and B [M, R]; raises ValueError when the shapes do not fit."""

    a_RN: Tensor
    b_MR: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        a, b = self.a_RN, self.b_MR
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"factors do not fit: A is {tuple(a.shape)} (R, N), B is {tuple(b.shape)} (M, R)")

    @property
    def rank(self) -> int:
        """R, the number of directions available (not how many are used)."""
        return self.a_RN.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N): the shape of the weight this updates."""
        return self.b_MR.shape[0], self.a_RN.shape[1]

    @property
    def parameters(self) -> int:
        """R (M + N), the count of numbers that are stored and trained."""
        return self.a_RN.numel() + self.b_MR.numel()

    def apply(self, x_TN: Tensor) -> Tensor:
        """x ΔWᵀ, [..., M], in O(R (M + N)) a row."""
        return self.scale * ((x_TN @ self.a_RN.T) @ self.b_MR.T)

    def dense(self) -> Tensor:
        """The [M, N] matrix itself. Costs M N numbers: named so that nobody forms it by accident."""
        return self.scale * (self.b_MR @ self.a_RN)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [M, K], S [K], Vᵀ [K, N] of ΔW, K = min(M, N, R), from the factors alone."""
        u, s, vt = product_svd(self.b_MR, self.a_RN)
        sign = -1.0 if self.scale < 0 else 1.0
        return sign * u, abs(self.scale) * s, vt

    def truncate(self, rank: int | None = None, energy: float | None = None) -> "LowRank":
        """The best approximation of a lower rank (Eckart-Young-Mirsky); √S is shared by both factors, scale 1.

        Give exactly one: `rank`, or `energy` in (0, 1], the share of ‖ΔW‖²_F to keep.
        """
        return _truncated(self.svd(), rank, energy)

    def cpu(self) -> "LowRank":
        """The same update on the CPU."""
        return LowRank(self.a_RN.cpu(), self.b_MR.cpu(), self.scale)

    def rows(self, start: int, stop: int) -> "LowRank":
        """What those rows of W take."""
        return LowRank(self.a_RN, self.b_MR[start:stop], self.scale)

    def turned(self) -> "LowRank":
        """ΔWᵀ, for a weight that is stored as [N, M]."""
        return LowRank(self.b_MR.T, self.a_RN.T, self.scale)

    def __add__(self, other: "LowRank") -> "LowRank":
        """Exact, by stacking: [s₁B₁ s₂B₂] [A₁; A₂]; the ranks add up."""
        if self.shape != other.shape:
            raise ValueError(f"updates of different shapes: {self.shape} and {other.shape}")
        return LowRank(
            torch.cat([self.a_RN, other.a_RN]),
            torch.cat([self.scale * self.b_MR, other.scale * other.b_MR], dim=1),
        )

    def __neg__(self) -> "LowRank":
        return LowRank(self.a_RN, self.b_MR, -self.scale)

    def __sub__(self, other: "LowRank") -> "LowRank":
        return self + (-other)


@dataclass(frozen=True, eq=False)
class Dense:
    """ΔW as the matrix itself, [M, N]: what full fine-tuning learns. Raises ValueError when it is no matrix."""

    delta_MN: Tensor
    scale: float = 1.0  # always; so that an update can be asked

    def __post_init__(self) -> None:
        if self.delta_MN.ndim != 2:
            raise ValueError(f"not a matrix: shape {tuple(self.delta_MN.shape)}")

    @property
    def rank(self) -> int:
        """min(M, N): nothing limits it."""
        return min(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return self.delta_MN.shape[0], self.delta_MN.shape[1]

    @property
    def parameters(self) -> int:
        """M N."""
        return self.delta_MN.numel()

    def apply(self, x_TN: Tensor) -> Tensor:
        """x ΔWᵀ, [..., M]."""
        return x_TN @ self.delta_MN.T

    def dense(self) -> Tensor:
        """The matrix itself, no copy."""
        return self.delta_MN

    def cpu(self) -> "Dense":
        """The same update on the CPU."""
        return Dense(self.delta_MN.cpu())

    def rows(self, start: int, stop: int) -> "Dense":
        """What those rows of W take."""
        return Dense(self.delta_MN[start:stop])

    def turned(self) -> "Dense":
        """ΔWᵀ, for a weight that is stored as [N, M]."""
        return Dense(self.delta_MN.T)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [M, K], S [K], Vᵀ [K, N], K = min(M, N): a full decomposition, O(M N K)."""
        u, s, vt = torch.linalg.svd(self.delta_MN, full_matrices=False)
        return u, s, vt

    def truncate(self, rank: int | None = None, energy: float | None = None) -> LowRank:
        """The best LoRA of a rank, or of the least rank that keeps `energy` of ‖ΔW‖²_F; √S in both factors, scale 1."""
        return _truncated(self.svd(), rank, energy)


@dataclass(frozen=True, eq=False)
class DoRA:
    """m ∘ V / ‖V‖ with V = W + ΔV, ΔV = `low`, m [M] in its dtype. Raises ValueError when m is no vector of M."""

    low: LowRank
    magnitude_M: Tensor

    def __post_init__(self) -> None:
        if self.magnitude_M.shape != self.low.shape[:1]:
            raise ValueError(f"magnitudes {tuple(self.magnitude_M.shape)} are not those of {self.low.shape[0]} rows")

    @property
    def rank(self) -> int:
        """R of the low-rank part; ΔW's own is not limited by it."""
        return self.low.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return self.low.shape

    @property
    def scale(self) -> float:
        return self.low.scale

    @property
    def parameters(self) -> int:
        """R (M + N) + M."""
        return self.low.parameters + self.magnitude_M.numel()

    def cpu(self) -> "DoRA":
        """The same update on the CPU."""
        return DoRA(self.low.cpu(), self.magnitude_M.cpu())

    def rows(self, start: int, stop: int) -> "DoRA":
        """What those rows of W take."""
        return DoRA(self.low.rows(start, stop), self.magnitude_M[start:stop])

    def relative_to(self, w_MN: Tensor) -> Dense:
        """ΔW [M, N] on the weight W [M, N], in the factors' dtype: exactly 0 for fresh factors. Costs M N numbers."""
        if tuple(w_MN.shape) != self.shape:
            raise ValueError(f"an update of {self.shape} on a weight of {tuple(w_MN.shape)}")
        w_MN = w_MN.to(self.low.a_RN.dtype)
        gain_M = over_norms(self.magnitude_M, row_norms(w_MN, squared_norms(w_MN), self.low))
        return Dense(gain_M[:, None] * (w_MN + self.low.dense()) - w_MN)


Plain = LowRank | Dense  # ΔW is a matrix whatever W is
Update = Plain | DoRA


def as_plain(update: Update, w_MN: Tensor) -> Plain:
    """The update of W [M, N] as one that knows nothing of W: itself, or DoRA's ΔW as `Dense`."""
    return update.relative_to(w_MN) if isinstance(update, DoRA) else update


def squared_norms(w_MN: Tensor) -> Tensor:
    """‖wᵢ‖² [M], in W's dtype."""
    return w_MN.square().sum(1)


def row_norms(w_MN: Tensor, squares_M: Tensor, low: LowRank) -> Tensor:
    """‖wᵢ + scale bᵢA‖ [M] in the factors' dtype, of W, its ‖wᵢ‖² and the factors. W Aᵀ is a product in W's dtype."""
    return norms_of_sum(squares_M, w_MN @ low.a_RN.to(w_MN.dtype).T, low)


def norms_of_sum(squares_M: Tensor, c_MR: Tensor, low: LowRank) -> Tensor:
    """The same of C = W Aᵀ, for a weight that isn't a tensor."""
    a_RN, b_MR = low.a_RN, low.b_MR
    change_M = (b_MR * (2 * c_MR.to(a_RN.dtype) + low.scale * (b_MR @ (a_RN @ a_RN.T)))).sum(1)
    return (squares_M + low.scale * change_M).clamp(min=0).sqrt()


def over_norms(magnitude_M: Tensor, norms_M: Tensor) -> Tensor:
    """m / ‖V‖ [M]: what each row is multiplied by. A row of zeros has no direction and stays as it is."""
    return magnitude_M / torch.where(norms_M > 0, norms_M, 1)


def _truncated(usv: tuple[Tensor, Tensor, Tensor], rank: int | None, energy: float | None) -> LowRank:
    if (rank is None) == (energy is None):
        raise ValueError("give rank or energy, one of the two")
    u, s, vt = usv
    if energy is not None:
        rank = max(1, int(energy_rank(s, energy)))
    assert rank is not None
    if not 1 <= rank <= len(s):
        raise ValueError(f"rank must lie in 1..{len(s)}, got {rank}")
    root = s[:rank].sqrt()
    return LowRank(root[:, None] * vt[:rank], u[:, :rank] * root)
