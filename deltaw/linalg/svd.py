"""Singular value decompositions that never form the dense matrix.

The SVD of a product P = B A (B [M, R], A [R, N]) needs only thin matrices. With QR factorisations B = Q_b R_b and
Aᵀ = Q_a R_a, P = Q_b (R_b R_aᵀ) Q_aᵀ, so the R x R core's SVD rotated by the two orthonormal bases is the SVD of P:
O((M + N) R² + R³) instead of O(M N min(M, N)), exact to rounding.

Letters: M rows, N columns, R inner dimension, K = min(M, N, R) singular values.
"""

import torch
from torch import Tensor


def product_svd(b_MR: Tensor, a_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [M, K], S [K] (descending), Vᵀ [K, N] with U diag(S) Vᵀ = B A, in the inputs' dtype (float32 or float64).

    Raises ValueError when the inner dimensions differ.
    """
    if b_MR.shape[1] != a_RN.shape[0]:
        raise ValueError(f"inner dimensions differ: B is {tuple(b_MR.shape)}, A is {tuple(a_RN.shape)}")
    q_b, r_b = torch.linalg.qr(b_MR)
    q_a, r_a = torch.linalg.qr(a_RN.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T
