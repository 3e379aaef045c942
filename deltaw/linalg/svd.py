"""Singular value decompositions: of a product from its factors, the first k terms, and the first k terms fast.

The SVD of a product P = B A (B [M, R], A [R, N]) needs only thin matrices. With QR factorisations B = Q_b R_b and
Aᵀ = Q_a R_a, P = Q_b (R_b R_aᵀ) Q_aᵀ, so the R x R core's SVD rotated by the two orthonormal bases is the SVD of P:
O((M + N) R² + R³) instead of O(M N min(M, N)), exact to rounding.

`truncated_svd` keeps the first k terms of the full SVD: the best approximation of rank k in both norms, with errors
σ_{k+1} and √(σ²_{k+1} + …) (Eckart & Young 1936, Mirsky 1960). `randomised_svd` finds them from products with a thin
random matrix Ω (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1): an orthonormal Q of k + oversample columns for
the range of (X Xᵀ)^power X Ω, orthonormalised between the products, and the SVD of the small QᵀX. O(M N k) instead of
O(M N min(M, N)). Both norms of its error are taken of what is left: the Frobenius norm exactly, the 2-norm by power
steps, which approach it from below.

Letters: M rows, N columns, R inner dimension, K singular values; "..." any batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.linalg.rank import checked

OVERSAMPLE, POWER = 10, 2  # Halko et al.: 5 to 10 more than wanted, one or two power steps
NORM_STEPS = 20  # of the power method for an error's 2-norm


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
    scale = x_MN.abs().amax((-2, -1), keepdim=True)
    scaled_MN = x_MN / torch.where(scale > 0, scale, 1)
    width = min(k + oversample, *x_MN.shape[-2:])
    omega_NL = torch.randn(
        *x_MN.shape[:-2], x_MN.shape[-1], width, dtype=x_MN.dtype, device=x_MN.device, generator=generator
    )
    q_ML = torch.linalg.qr(scaled_MN @ omega_NL).Q
    for _ in range(power):
        q_NL = torch.linalg.qr(scaled_MN.mT @ q_ML).Q
        q_ML = torch.linalg.qr(scaled_MN @ q_NL).Q
    u, s, vt = torch.linalg.svd(q_ML.mT @ scaled_MN, full_matrices=False)
    u, s, vt = q_ML @ u[..., :k], s[..., :k], vt[..., :k, :]
    left_MN = scaled_MN - (u * s[..., None, :]) @ vt
    scale = scale.squeeze(-1)
    errors = (norm[..., None] * scale for norm in (torch.linalg.matrix_norm(left_MN), _two_norm(left_MN, generator)))
    frobenius, two = (error.squeeze(-1) for error in errors)
    return Approximation(u, s * scale, vt, frobenius, two)


def _two_norm(x_MN: Tensor, generator: torch.Generator | None) -> Tensor:
    """[...]: an estimate from below, by the power method on XᵀX."""
    v_N1 = torch.randn(*x_MN.shape[:-2], x_MN.shape[-1], 1, dtype=x_MN.dtype, device=x_MN.device, generator=generator)
    for _ in range(NORM_STEPS):
        v_N1 = x_MN.mT @ (x_MN @ v_N1)
        size = torch.linalg.vector_norm(v_N1, dim=(-2, -1), keepdim=True)
        v_N1 = v_N1 / torch.where(size > 0, size, 1)
    return torch.linalg.vector_norm(x_MN @ v_N1, dim=(-2, -1))


def _fit(b_MR: Tensor, a_RN: Tensor) -> None:
    if b_MR.shape[-1] != a_RN.shape[-2]:
        raise ValueError(f"inner dimensions differ: B is {tuple(b_MR.shape)}, A is {tuple(a_RN.shape)}")


def _rank(x_MN: Tensor, k: int) -> None:
    if not 1 <= k <= min(x_MN.shape[-2:]):
        raise ValueError(f"rank must lie in 1..{min(x_MN.shape[-2:])} for a matrix of {tuple(x_MN.shape)}, got {k}")
