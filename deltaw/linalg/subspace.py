"""Subspaces: how much of one lies in another.

A subspace is given by an orthonormal basis, the columns of U. For U [D, I] and V [D, J] the singular values of UᵀV are
the cosines of their principal angles (Björck & Golub 1973), and

    φ(i, j) = ‖U_iᵀ V_j‖²_F / min(i, j)      (LoRA §7.2, eq. 4)

is the share of the smaller one of the first i and the first j directions that lies in the other: 1 when inside, 0 when
orthogonal. Two random subspaces have φ = max(i, j) / D on average, which is not small where D isn't large;
a similarity means something only beside that.

Letters: D the space, I and J directions; "..." any batch.
"""

import torch
from torch import Tensor

from deltaw.linalg.rank import checked, tolerance


def range_basis(x_MN: Tensor) -> Tensor:
    """[M, R]: an orthonormal basis of X's columns, R the numerical rank."""
    u_MK, sigma_K, _ = torch.linalg.svd(checked(x_MN), full_matrices=False)
    return u_MK[:, sigma_K > tolerance(sigma_K, *x_MN.shape)]


def project(x_MN: Tensor, basis_MR: Tensor) -> Tensor:
    """The part of X's columns in the subspace of an orthonormal basis."""
    return basis_MR @ (basis_MR.mT @ x_MN)


def principal_angles(u_DI: Tensor, v_DJ: Tensor) -> Tensor:
    """[..., min(I, J)] in radians, ascending, of two orthonormal bases.

    A small angle's cosine is 1 to rounding, so below 45° the angle is taken from its sine.
    """
    if u_DI.shape[-1] < v_DJ.shape[-1]:
        u_DI, v_DJ = v_DJ, u_DI
    across_IJ = u_DI.mT @ v_DJ
    cosines = torch.linalg.svdvals(across_IJ).clamp(max=1)
    sines = torch.linalg.svdvals(v_DJ - u_DI @ across_IJ).flip(-1)[..., : cosines.shape[-1]].clamp(max=1)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def similarity(u_DI: Tensor, v_DJ: Tensor) -> Tensor:
    """φ [..., I, J]: entry (i − 1, j − 1) compares the first i columns of U with the first j of V."""
    shares_IJ = (u_DI.mT @ v_DJ).square().cumsum(-2).cumsum(-1)
    i, j = (torch.arange(1, n + 1, device=u_DI.device) for n in shares_IJ.shape[-2:])
    return shares_IJ / torch.minimum(i[:, None], j)


def random_similarity(i: int, j: int, d: int) -> Tensor:
    """[i, j]: what `similarity` gives on average for random subspaces of D = d dimensions."""
    return torch.maximum(torch.arange(1, i + 1)[:, None], torch.arange(1, j + 1)) / d
