"""Rank: how many directions a matrix has, counted in several useful ways, and factors of exactly that width.

Column rank and row rank are one number (`docs/math.md` §1). In floating point a singular value below the rounding of
the entries can't be told from zero, so what is counted is

    numerical rank   #{ σᵢ > ε · max(M, N) · σ₁ },   ε of the type that the entries have

the rule of NumPy and PyTorch (Golub & Van Loan §5.4.1), *strictly* greater, or the zero matrix would have a rank. That
is meant for entries rounded to the type that is computed in. Where they were rounded to a coarser one before, to
bfloat16, say, or to three decimals, rounding.py says what may have been added.

A trained matrix has full numerical rank almost always; three measures say how many directions matter:

    stable rank      ‖X‖²_F / ‖X‖²₂                                   (Rudelson & Vershynin 2007)
    effective rank   exp(−Σ pᵢ ln pᵢ),  pᵢ = σᵢ / Σσ                  (Roy & Vetterli 2007)
    energy rank      the least k with σ₁² + … + σ_k² ≥ share · ‖X‖²_F

All of them are functions of the singular values, so each takes σ (which a product gives without its dense matrix,
svd.py), in any batch shape; only ratios to σ₁ are squared, so no scale overflows. The zero matrix is 0 in all of them.

`full_rank_factorisation`: X = P Qᵀ, both of full column rank r. P is r columns of X itself, found by QR with column
pivoting (Businger & Golub 1965): the column with the most left over is taken, and taken out of the others. Two passes
of Gram-Schmidt keep the basis orthonormal to rounding ("twice is enough", Giraud et al. 2005). Exact factors of a
matrix of integers are in exact.py.

Letters: M rows, N columns, K = min(M, N), R the rank; "..." any batch.
"""

import torch
from torch import Tensor


def checked(x: Tensor) -> Tensor:
    """x, if it is a non-empty matrix (or a batch) of finite float32 or float64 numbers. Raises ValueError if not."""
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"not a matrix with at least one entry: shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a matrix of {x.dtype}; give float32 or float64")
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(x)):  # NaN is handed on; one pass, no copy
        raise ValueError(f"the matrix has {int((~torch.isfinite(x)).sum())} entries that are NaN or infinite")
    return x


def tolerance(sigma_K: Tensor, rows: int, columns: int) -> Tensor:
    """[...]: below it a singular value can't be told from zero. `sigma_K` [..., K] in the type of the entries."""
    return torch.finfo(sigma_K.dtype).eps * max(rows, columns) * sigma_K[..., 0]


def numerical_rank(x_MN: Tensor) -> Tensor:
    """[...] int64 of [..., M, N]."""
    sigma_K = torch.linalg.svdvals(checked(x_MN))
    return (sigma_K > tolerance(sigma_K, *x_MN.shape[-2:])[..., None]).sum(-1)


def column_rank(x_MN: Tensor, most: int | None = None) -> int:
    """How many columns are independent, found by picking at most `most`: no singular values are computed."""
    return len(independent_columns(x_MN, most))


def row_rank(x_MN: Tensor, most: int | None = None) -> int:
    """How many rows are independent."""
    return column_rank(x_MN.mT, most)


def stable_rank(sigma_K: Tensor) -> Tensor:
    """[...] of singular values [..., K] in descending order."""
    return _relative(sigma_K).square().sum(-1)


def effective_rank(sigma_K: Tensor) -> Tensor:
    """[...] of singular values [..., K] in descending order."""
    relative_K = _relative(sigma_K)
    total = relative_K.sum(-1, keepdim=True)
    p_K = relative_K / total.clamp(min=1)  # the largest is 1, or all are 0
    return torch.where(total.squeeze(-1) > 0, torch.special.entr(p_K).sum(-1).exp(), 0)


def energy_rank(sigma_K: Tensor, share: float) -> Tensor:
    """[...] int64 of singular values [..., K] in descending order; `share` in (0, 1], else ValueError."""
    if not 0 < share <= 1:
        raise ValueError(f"energy is a share in (0, 1], got {share}")
    kept_K = _relative(sigma_K).square().cumsum(-1)
    wanted = share * kept_K[..., -1:] * (1 - 1e-12)  # all of it must not need what rounding added last
    return torch.where(kept_K[..., -1] > 0, (kept_K < wanted).sum(-1) + 1, 0)


def independent_columns(x_MN: Tensor, most: int | None = None) -> list[int]:
    """The numbers of R columns that span all of them, the largest first; of at most `most`. One matrix, not a batch."""
    if checked(x_MN).ndim != 2:
        raise ValueError(f"expected one matrix, not a batch: shape {tuple(x_MN.shape)}")
    rest_MN = x_MN.double() / (x_MN.abs().max().double() or 1)
    basis_MR = rest_MN.new_empty(len(rest_MN), 0)
    chosen: list[int] = []
    limit = 0.0
    while len(chosen) < min(*x_MN.shape, min(x_MN.shape) if most is None else most):
        norms_N = rest_MN.norm(dim=0)
        norms_N[chosen] = -1.0
        best = int(norms_N.argmax())
        limit = limit or torch.finfo(x_MN.dtype).eps * max(x_MN.shape) * float(norms_N[best])
        if float(norms_N[best]) <= limit:
            break
        chosen.append(best)
        new_M = rest_MN[:, best] - basis_MR @ (basis_MR.T @ rest_MN[:, best])
        basis_MR = torch.cat([basis_MR, (new_M / new_M.norm())[:, None]], 1)
        rest_MN = rest_MN - torch.outer(basis_MR[:, -1], basis_MR[:, -1] @ rest_MN)
    return chosen


def full_rank_factorisation(x_MN: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """P [M, R] and Q [N, R] with X = P Qᵀ to rounding, R the column rank, at most `most`; P is columns of X.

    The zero matrix gives two matrices without columns.
    """
    p_MR = x_MN[:, independent_columns(x_MN, most)]
    if not p_MR.shape[1]:
        return p_MR, x_MN.new_zeros(x_MN.shape[1], 0)
    scale = p_MR.abs().max()
    q_RN = torch.linalg.lstsq((p_MR / scale).double(), (x_MN / scale).double()).solution
    return p_MR, q_RN.T.to(x_MN.dtype)


def _relative(sigma_K: Tensor) -> Tensor:
    """σ / σ₁ in float64; zeros stay zeros."""
    wide_K = sigma_K.double()
    return wide_K / torch.where(wide_K[..., :1] > 0, wide_K[..., :1], 1)
