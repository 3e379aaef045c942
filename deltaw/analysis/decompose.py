"""What a matrix is made of: its rank, counted in every useful way, its spectrum, and three factorisations.

    full rank        X = P Qᵀ, lossless, R columns each. P is columns of X (linalg/rank.py), for a small matrix of
                     integers also in fractions, without rounding (linalg/exact.py); then the rank is exact, too,
                     which no singular value can be. Picking R columns is R steps of O(M N): where that takes minutes, P
                     and Q come from the SVD, cut at the numerical rank. Entries that were rounded to fewer digits than
                     they are computed with have a rank of their own only above that rounding, and X = P Qᵀ but for it
    truncated SVD    its first k terms. No matrix of rank k is nearer; what is missed is σ_{k+1} in the 2-norm and
                     √(σ²_{k+1} + …) in the Frobenius norm (Eckart & Young 1936, Mirsky 1960)
    randomised SVD   nearly that, from products with a thin random matrix (linalg/svd.py)

Every error is measured on what is left, X − P Qᵀ, and relative to the norm of X; for a large matrix the 2-norm of what
is left is an estimate from below (`two_norm`).

Letters: M rows, N columns, K = min(M, N), R a rank, k the rank of an approximation.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor

from deltaw.analysis.matrix import EXACT, EXACT_SIDE, INTEGERS
from deltaw.errors import InputError
from deltaw.linalg import rank as ranks
from deltaw.linalg.exact import exact_factorisation
from deltaw.linalg.rounding import Rounding
from deltaw.linalg.svd import randomised_svd, two_norm
from deltaw.show.chart import EIGHTHS, columns
from deltaw.show.table import table

DEFAULT_RANK = 8
PIVOT_WORK = 2e9  # R M N of picking columns, some ten seconds
LONG_WORK = 1e8  # R M N that takes a second; an SVD does ten times as much in that time
DENSE_SIDE = 512  # the 2-norm of an error of at most as many rows or columns isn't an estimate
SHOWN_SIDE = 6  # factors of a matrix of at most 6 x 6 are shown

UNROUNDED = Rounding()

Say = Callable[[str], None]
Cells = tuple[tuple[str, ...], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Factorisation:
    """Two thin matrices in place of X: what they cost and by how much they miss, relative to the norms of X."""

    rank: int
    numbers: int  # R (M + N)
    share: float  # of M N
    error_frobenius: float
    error_two: float
    seconds: float


@dataclass(frozen=True)
class Decomposition:
    """`column_rank` and `row_rank`, by picking them, are None where that would take minutes."""

    rows: int
    columns: int
    dtype: str
    stored: str  # what the entries were rounded to before they became that: bfloat16, 3 decimals
    rank: int  # of integers the exact one, else the numerical one
    numerical_rank: int  # how many σ are above the tolerance
    tolerance: float
    column_rank: int | None
    row_rank: int | None
    stable_rank: float
    effective_rank: float
    rank_at_90: int  # percent of ‖X‖²_F
    rank_at_99: int
    condition: float  # σ₁ / σ_K, infinite unless the numerical rank is full
    singular_values: tuple[float, ...]
    full_rank: Factorisation
    exact: bool  # the full-rank factorisation is in fractions
    factors: tuple[Cells, Cells] | None  # P and Qᵀ of a matrix that is at most 6 x 6
    truncated: Factorisation
    randomised: Factorisation
    best_frobenius: float  # what no matrix of rank k gets below, relative
    best_two: float

    @property
    def entries(self) -> int:
        """M N."""
        return self.rows * self.columns

    @property
    def saves_below(self) -> float:
        """R (M + N) < M N for every R below it."""
        return self.entries / (self.rows + self.columns)

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite condition number is null."""
        condition = self.condition if math.isfinite(self.condition) else None
        return {**asdict(self), "condition": condition, "entries": self.entries, "saves_below": self.saves_below}


def decompose(
    x_MN: Tensor,
    *,
    rank: int | None = None,
    say: Say = lambda line: None,
    rounding: Rounding = UNROUNDED,
    integers: list[list[int]] | None = None,
) -> Decomposition:
    """All of it for one float32 or float64 matrix; `rank` is k, else 8 or the matrix's rank if that is less.
    `rounding`: of the entries, before they were float32 or float64. `integers`: the entries, if they are.

    `say` gets a line before what takes long. Raises InputError unless 1 ≤ `rank` ≤ K, ValueError for what isn't a
    matrix of finite numbers.
    """
    (m, n), dtype = ranks.checked(x_MN).shape, str(x_MN.dtype).removeprefix("torch.")
    if rank is not None and not 1 <= rank <= min(m, n):
        raise InputError(f"rank {rank}: a {m} x {n} matrix has approximations of rank 1 to {min(m, n)}")
    (u_MK, sigma_K, vt_KN), svd_seconds = _timed(lambda: _svd(x_MN, say))
    top = float(sigma_K[0]) or 1.0
    tolerance = max(float(ranks.tolerance(sigma_K, m, n)), rounding.error(x_MN))
    numerical = int((sigma_K > tolerance).sum())
    of_svd = (u_MK[:, :numerical] * sigma_K[:numerical], vt_KN[:numerical])
    full = _lossless(x_MN, of_svd, svd_seconds, say, integers, picks=numerical if rounding.error(x_MN) else None)
    k = rank or max(1, min(DEFAULT_RANK, len(full.qt)))
    relative_K = sigma_K.double() / top  # so that no square overflows
    norm = float(relative_K.norm()) or 1.0

    def measured(r: int, left_MN: Tensor, seconds: float) -> Factorisation:
        errors = float((left_MN / top).norm()) / norm, _two_norm(left_MN / top)
        return Factorisation(r, r * (m + n), r * (m + n) / (m * n), *errors, seconds)

    near, seconds = _timed(lambda: randomised_svd(x_MN, k, generator=torch.Generator().manual_seed(0)))
    return Decomposition(
        rows=m,
        columns=n,
        dtype=dtype,
        stored=rounding.name or dtype,
        rank=len(full.qt) if full.exact else numerical,
        numerical_rank=numerical,
        tolerance=tolerance,
        column_rank=full.picked[0],
        row_rank=full.picked[1],
        stable_rank=float(ranks.stable_rank(sigma_K)),
        effective_rank=float(ranks.effective_rank(sigma_K)),
        rank_at_90=int(ranks.energy_rank(sigma_K, 0.9)),
        rank_at_99=int(ranks.energy_rank(sigma_K, 0.99)),
        condition=float(1 / relative_K[-1]) if numerical == min(m, n) else math.inf,
        singular_values=tuple(sigma_K.tolist()),
        full_rank=measured(len(full.qt), full.left_MN, full.seconds),
        exact=full.exact,
        factors=(_cells(full.p), _cells(full.qt)) if max(m, n) <= SHOWN_SIDE else None,
        truncated=measured(k, _left(x_MN, u_MK[:, :k] * sigma_K[:k], vt_KN[:k]), svd_seconds),
        randomised=measured(k, _left(x_MN, near.u_MK * near.s_K, near.vt_KN), seconds),
        best_frobenius=float(relative_K[k:].norm()) / norm,
        best_two=float(relative_K[k]) if k < min(m, n) else 0.0,
    )


def _svd(x_MN: Tensor, say: Say) -> tuple[Tensor, Tensor, Tensor]:
    m, n = x_MN.shape
    if m * n * min(m, n) > 10 * LONG_WORK:
        say(f"full SVD of {m:,} x {n:,}, which takes O(M N min(M, N))")
    u_MK, sigma_K, vt_KN = torch.linalg.svd(x_MN, full_matrices=False)
    if not math.isfinite(float(sigma_K[0])):
        dtype = str(x_MN.dtype).removeprefix("torch.")
        raise InputError(f"the largest singular value is beyond {dtype}", fix="scale the matrix down")
    return u_MK, sigma_K, vt_KN


def describe(d: Decomposition, source: str) -> str:
    """For people; `source` is what the matrix is."""
    stored = "" if d.stored == d.dtype else f", stored as {d.stored}"
    parts = [f"{source}: {d.rows:,} x {d.columns:,} = {d.entries:,} entries, {d.dtype}{stored}", _ranks(d)]
    if sure := d.numerical_rank:
        several = f"σ₁ … σ{_sub(sure)}" if sure > 1 else "σ₁"
        others = f"; the other {noise} are rounding" if (noise := len(d.singular_values) - sure) else ""
        parts.append(f"singular values {several}, log scale{others}\n{spectrum(d.singular_values[:sure])}")
    parts += [_table(d), _remarks(d)]
    if d.factors and d.rank:
        parts.append(f"P Qᵀ{', exactly' if d.exact else ', to four digits'}\n{_beside(*d.factors)}")
    return "\n\n".join(parts)


def spectrum(sigma: Sequence[float], width: int = 64, height: int = 8) -> str:
    """Positive values in descending order as bars on a log scale; of more than `width`, evenly chosen ones."""
    count = min(width, len(sigma))
    shown = [sigma[round(i * (len(sigma) - 1) / max(1, count - 1))] for i in range(count)]
    low, high = math.log(shown[-1]), math.log(shown[0])
    shares = [(math.log(value) - low) / (high - low) if high > low else 1.0 for value in shown]
    return columns(
        [round(1 + (EIGHTHS * height - 1) * share) for share in shares], rows=height, width=min(4, width // count),
        top=f"{shown[0]:>9.2e}", bottom=f"{shown[-1]:>9.2e}", first="1", last=str(len(sigma)) if len(sigma) > 1 else "",
    )  # fmt: skip


def _ranks(d: Decomposition) -> str:
    picked = f"column rank {d.column_rank}, row rank {d.row_rank}, picked down to ε max(M, N) times the longest"
    if d.column_rank is None:
        picked = "columns and rows weren't picked one by one, which would take minutes"
    if d.exact:
        picked = f"column rank {d.column_rank}, row rank {d.row_rank}"
    elif d.stored not in (d.dtype, INTEGERS) and d.column_rank is not None:
        picked = f"column rank {d.column_rank}, row rank {d.row_rank}, of which no more than the rank were picked"
    unknown = "infinite" if d.rank < min(d.rows, d.columns) else "beyond rounding"
    condition = f"{d.condition:.3g}" if math.isfinite(d.condition) else unknown
    above = f"σ above {d.tolerance:.2e} = ε max(M, N) σ₁, ε of {d.dtype}"
    if d.tolerance > torch.finfo(getattr(torch, d.dtype)).eps * max(d.rows, d.columns) * d.singular_values[0]:
        above = f"σ above {d.tolerance:.2e}, the most that rounding to {d.stored} makes of a zero"
    if d.exact:
        above = f"exactly, by elimination in fractions; {d.numerical_rank} {above}"
    lines = [
        ("rank", f"{d.rank}", above),
        ("", "", picked),
        ("stable rank", f"{d.stable_rank:.4g}", "‖X‖²_F / ‖X‖²₂"),
        ("effective rank", f"{d.effective_rank:.4g}", "exp of the entropy of σ / Σσ"),
        ("rank at 90 %", f"{d.rank_at_90}", "of the energy ‖X‖²_F"),
        ("rank at 99 %", f"{d.rank_at_99}", ""),
        ("condition", condition, f"σ₁ / σ{_sub(min(d.rows, d.columns))}"),
    ]
    return table(lines)


def _table(d: Decomposition) -> str:
    rows = []
    for name, one in (
        ("full rank, P Qᵀ", d.full_rank),
        ("truncated SVD", d.truncated),
        ("randomised SVD", d.randomised),
    ):
        errors = [f"{error:.3g}" for error in (one.error_frobenius, one.error_two)]
        if d.exact and one is d.full_rank:
            errors = ["exactly 0"] * 2
        rows.append(
            [name, f"{one.rank}", f"{one.numbers:,}", f"{100 * one.share:.3g} %", *errors, f"{one.seconds:.3f}"]
        )
    head = ("", "rank", "numbers", "of M N", "error (F)", "error (2)", "seconds")
    errors_are = "errors: the Frobenius and the 2-norm of X − P Qᵀ, measured, relative to those of X"
    return f"{table(rows, head, align='lr')}\n{errors_are}"


def _remarks(d: Decomposition) -> str:
    k, noise = d.truncated.rank, d.tolerance / (d.singular_values[0] or 1.0)
    saves = "stores fewer" if d.full_rank.share < 1 else "saves none"
    lines = [f"R (M + N) numbers are fewer than M N for R below M N / (M + N) = {d.saves_below:.4g}: here P Qᵀ {saves}"]
    if d.best_frobenius <= noise:
        lines.append(f"rank {k} leaves nothing but rounding")
    else:
        best = f"{d.best_frobenius:.4g} (F), and {d.best_two:.4g} = σ{_sub(k + 1)} / σ₁ (2)"
        lines.append(f"no matrix of rank {k} has errors below {best} (Eckart-Young-Mirsky)")
        ratio = d.randomised.error_frobenius / d.best_frobenius, d.randomised.error_two / d.best_two
        fast = f"{d.randomised.seconds:.3f} s against {d.truncated.seconds:.3f} s"
        lines.append(f"the randomised SVD has {ratio[0]:.4f} (F) and {ratio[1]:.4f} (2) times those, in {fast}")
    return "\n".join(lines)


def _beside(p: Cells, qt: Cells) -> str:
    """Two small matrices side by side."""

    left, right = ([f"│  {line}  │" for line in table(cells, align="r").split("\n")] for cells in (p, qt))
    return "\n".join(f"{a:{len(left[0])}}   {b}".rstrip() for a, b in zip_longest(left, right, fillvalue=""))


def _sub(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


@dataclass(frozen=True, eq=False)
class _Lossless:
    p: Any  # [M, R], a tensor or rows of fractions
    qt: Any  # [R, N]
    left_MN: Tensor  # X − P Qᵀ
    exact: bool
    picked: tuple[int | None, int | None]
    seconds: float


def _lossless(
    x_MN: Tensor,
    of_svd: tuple[Tensor, Tensor],
    svd_seconds: float,
    say: Say,
    integers: list[list[int]] | None,
    picks: int | None,
) -> _Lossless:
    """The full-rank factorisation in the best way that the matrix allows, of at most `picks` columns."""
    rank = of_svd[1].shape[0]
    if (work := rank * x_MN.numel()) > PIVOT_WORK:
        return _Lossless(*of_svd, _left(x_MN, *of_svd), False, (None, None), svd_seconds)
    if work > LONG_WORK:
        say(f"picking {rank} independent columns, then rows")
    (p_MR, q_NR), seconds = _timed(lambda: ranks.full_rank_factorisation(x_MN, picks))
    picked = p_MR.shape[1], ranks.row_rank(x_MN, picks)
    rows = integers or _integers(x_MN, picks)
    if rows is None:
        return _Lossless(p_MR, q_NR.T, _left(x_MN, p_MR, q_NR.T), False, picked, seconds)
    (p, qt), seconds = _timed(lambda: exact_factorisation(rows))
    picked = len(qt), len(qt)
    # Python's own integers and fractions, so that the product isn't rounded either.
    factors = (
        numpy.array(p, dtype=object).reshape(len(rows), len(qt)),
        numpy.array(qt, dtype=object).reshape(len(qt), x_MN.shape[1]),
    )
    left = (numpy.array(rows, dtype=object) - factors[0] @ factors[1]).astype(float)
    return _Lossless(p, qt, torch.from_numpy(left), True, picked, seconds)


def _integers(x_MN: Tensor, picks: int | None) -> list[list[int]] | None:
    """The entries of a small matrix of integers that are those that were written."""
    small = picks is None and max(x_MN.shape) <= EXACT_SIDE and float(x_MN.abs().max()) < EXACT
    return [[int(value) for value in row] for row in x_MN.tolist()] if small and (x_MN == x_MN.round()).all() else None


def _left(x_MN: Tensor, p_MR: Tensor, qt_RN: Tensor) -> Tensor:
    """In float64, so that what is measured is the factors' error and not the product's."""
    return x_MN.double() - p_MR.double() @ qt_RN.double()


def _two_norm(left_MN: Tensor) -> float:
    if min(left_MN.shape) > DENSE_SIDE:
        return float(two_norm(left_MN, torch.Generator().manual_seed(0)))
    return float(torch.linalg.svdvals(left_MN)[0])


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def _cells(rows: Any) -> Cells:
    rows = rows.tolist() if isinstance(rows, Tensor) else rows
    return tuple(
        tuple(f"{value + 0.0:.4g}" if isinstance(value, float) else str(value) for value in row) for row in rows
    )
