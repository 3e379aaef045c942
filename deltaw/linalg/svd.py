"""Singular value decompositions: of a product from its factors, the first k terms, and the first k terms fast.

The SVD of a product P = B A (B [M, R], A [R, N]) needs only thin matrices. With QR factorisations B = Q_b R_b and
Aᵀ = Q_a R_a, P = Q_b (R_b R_aᵀ) Q_aᵀ, so the R x R core's SVD rotated by the two orthonormal bases is the SVD of P:
O((M + N) R² + R³) instead of O(M N min(M, N)), exact to rounding.

`truncated_svd` keeps the first k terms of the full SVD: the best approximation of rank k in both norms, with errors
σ_{k+1} and √(σ²_{k+1} + …) (Eckart & Young 1936, Mirsky 1960). `randomised_svd` finds them from products with a thin
random matrix Ω of k + oversample columns: an orthonormal Q for the block Krylov space (Musco & Musco 2015)

    [XΩ, (X Xᵀ) XΩ, …, (X Xᵀ)^power XΩ],    each block orthonormalised before the next product,

and the SVD of the small XᵀQ. O(M N k) instead of O(M N min(M, N)). Halko, Martinsson & Tropp (2011, algorithm 4.4) keep
the last block alone; all of them cost the same products and miss by much less (2048 x 2048, σᵢ = i^-½, k = 64, power 3:
a 2-norm of 1.000 times the best instead of 1.058), so only what would fill half of the smaller side is left out.
Both norms of the error are taken of what is left: the Frobenius norm exactly, the 2-norm as the largest singular
value of what a Krylov space of one vector has of it, which approaches it from below (Lanczos; Kuczyński & Woźniakowski
1992).

Letters: M rows, N columns, R inner dimension, K singular values; "..." any batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.linalg.rank import checked

OVERSAMPLE, POWER = 10, 3  # 5 to 10 columns more than wanted; the third power is the last that pays
NORM_POWER = 20  # for an error's 2-norm


@dataclass(frozen=True, eq=False)
class Approximation:
    """U diag(S) Vᵀ, and by how much it misses. U [..., M, K], S [..., K] descending, Vᵀ [..., K, N], errors [...]."""

    u_MK: Tensor
    s_K: Tensor
    vt_KN: Tensor
    error_frobenius: Tensor
    error_two: Tensor

    def dense(self) -> Tensor:
        """[..., M, N]."""
        return (self.u_MK * self.s_K[..., None, :]) @ self.vt_KN


def product_svd(b_MR: Tensor, a_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [..., M, K], S [..., K] (descending), Vᵀ [..., K, N] with U diag(S) Vᵀ = B A, K = min(M, N, R).

    In the inputs' dtype (float32 or float64). Raises ValueError when the inner dimensions differ.
    """
    _fit(b_MR, a_RN)
    q_b, r_b = torch.linalg.qr(b_MR)
    q_a, r_a = torch.linalg.qr(a_RN.mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ u, s, vt @ q_a.mT


def product_singular_values(b_MR: Tensor, a_RN: Tensor) -> Tensor:
    """S [..., K] of B A, descending, K = min(M, N, R): the same without U and V."""
    _fit(b_MR, a_RN)
    r_b, r_a = (torch.linalg.qr(x, mode="r").R for x in (b_MR, a_RN.mT))
    return torch.linalg.svdvals(r_b @ r_a.mT)


def truncated_svd(x_MN: Tensor, k: int) -> Approximation:
    """The best approximation of rank k, 1 ≤ k ≤ min(M, N), else ValueError. Costs a full SVD."""
    _rank(checked(x_MN), k)
    u, s, vt = torch.linalg.svd(x_MN, full_matrices=False)
    rest = s[..., k:]
    # Relative to the largest, so that no square overflows.
    top = rest[..., :1] if rest.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    shares = rest / torch.where(top > 0, top, 1)
    frobenius = top.squeeze(-1) * shares.square().sum(-1).sqrt()
    return Approximation(u[..., :k], s[..., :k], vt[..., :k, :], frobenius, top.squeeze(-1))


def randomised_svd(
    x_MN: Tensor, k: int, *, power: int = POWER, oversample: int = OVERSAMPLE, generator: torch.Generator | None = None
) -> Approximation:
    """Nearly the best approximation of rank k, 1 ≤ k ≤ min(M, N), else ValueError; `error_two` is an estimate."""
    _rank(checked(x_MN), k)
    q_ML = _krylov(x_MN, min(k + oversample, *x_MN.shape[-2:]), power, generator)
    v, s, ut = torch.linalg.svd(x_MN.mT @ q_ML, full_matrices=False)  # LAPACK is twice as fast on tall as on wide
    u, s, vt = q_ML @ ut[..., :k, :].mT, s[..., :k], v[..., :k].mT.contiguous()
    left_MN = ((u * s[..., None, :]) @ vt).sub_(x_MN)
    two = two_norm(left_MN, generator)
    return Approximation(u, s, vt, _frobenius(left_MN, s[..., 0]), two)


def two_norm(x_MN: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """[...]: an estimate of the largest singular value, from below and mostly within a percent, in O(M N)."""
    return torch.linalg.svdvals(x_MN.mT @ _krylov(x_MN, 1, NORM_POWER, generator))[..., 0]


def _frobenius(x_MN: Tensor, size: Tensor) -> Tensor:
    """[...]: divided by about its size first, so that no square overflows; x is overwritten.

    By rows, since PyTorch's sum over all of a float32 matrix of 4096 x 4096 is 6e-4 too small.
    """
    size = torch.where(size > 0, size, 1)
    x_MN.div_(size[..., None, None])
    return size * torch.linalg.vector_norm(torch.linalg.vector_norm(x_MN, dim=-1), dim=-1)


def _krylov(x_MN: Tensor, width: int, power: int, generator: torch.Generator | None) -> Tensor:
    """[..., M, L]: an orthonormal basis of the last blocks, of `width` columns each, that fit half of the matrix."""
    m, n = x_MN.shape[-2:]
    block = torch.randn(*x_MN.shape[:-2], n, width, dtype=x_MN.dtype, device=x_MN.device, generator=generator)
    blocks = [torch.linalg.qr(x_MN @ block).Q]
    for _ in range(power):
        block = torch.linalg.qr(x_MN.mT @ blocks[-1]).Q
        blocks.append(torch.linalg.qr(x_MN @ block).Q)
    last = max(1, min(m, n) // (2 * width))
    return torch.linalg.qr(torch.cat(blocks[-last:], dim=-1)).Q


def _fit(b_MR: Tensor, a_RN: Tensor) -> None:
    if b_MR.shape[-1] != a_RN.shape[-2]:
        raise ValueError(f"inner dimensions differ: B is {tuple(b_MR.shape)}, A is {tuple(a_RN.shape)}")


def _rank(x_MN: Tensor, k: int) -> None:
    if not 1 <= k <= min(x_MN.shape[-2:]):
        raise ValueError(f"rank must lie in 1..{min(x_MN.shape[-2:])} for a matrix of {tuple(x_MN.shape)}, got {k}")
