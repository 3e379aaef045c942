"""Subspaces: how much of one lies in another.

A subspace is given by an orthonormal basis, the columns of U. For U [D, I] and V [D, J] the singular values of UᵀV are
the cosines of their principal angles (Björck & Golub 1973), and

    φ(i, j) = ‖U_iᵀ V_j‖²_F / min(i, j)      (LoRA §7.2, eq. 4)

is the share of the smaller one of the first i and the first j directions that lies in the other: 1 when inside, 0 when
orthogonal. Two random subspaces have φ = max(i, j) / D on average, which is not small where D isn't large;
a similarity means something only beside that. Likewise for what a matrix has in directions, ‖UᵀW V‖_F: random ones
have k ‖W‖_F / √(M N) in the root mean square, but less in the median (at k = 1 about 0.65 of it).

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


def random_overlap(sigma_K: Tensor, shape: tuple[int, int], size: float, k: int, draws: int, seed: int) -> Tensor:
    """[draws, k]: ‖UᵀW V‖_F for the first 1, 2, … k of random directions, of a W [M, N] = `shape` with ‖W‖_F = `size`.

    W's singular vectors turn a random U into one that is as random, so only its singular values are needed: UᵀΣ V. Of
    `sigma_K` they are the first; what is left of `size`² is spread over the others evenly.
    """
    generator = torch.Generator(sigma_K.device).manual_seed(seed)
    others = min(shape) - len(sigma_K)
    rest = (max(0.0, size**2 - float(sigma_K.norm()) ** 2) / max(1, others)) ** 0.5
    every_K = torch.cat([sigma_K, sigma_K.new_full((others,), rest)])
    drawn = (torch.randn(draws, side, k, generator=generator).to(sigma_K) for side in shape)
    u_DKk, v_DKk = (torch.linalg.qr(x).Q[:, : len(every_K)] for x in drawn)
    squares_Dkk = (u_DKk.mT @ (every_K[:, None] * v_DKk)).square().cumsum(-1).cumsum(-2)
    return squares_Dkk.diagonal(dim1=-2, dim2=-1).sqrt()
