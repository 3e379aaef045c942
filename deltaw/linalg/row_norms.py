"""The 2-norm of each row of V = W + s B A, which DoRA divides by, without forming the sum:

    ‖vᵢ‖² = ‖wᵢ‖² + s bᵢ·(2 cᵢ + s K bᵢ),   C = W Aᵀ [M, R],   K = A Aᵀ [R, R]

in O(M R²), given ‖wᵢ‖² and C, a product with W as any weight has it (O(M N R)). It is a difference where the update
takes a row nearly away: the relative error of ‖vᵢ‖ is a few roundings times (‖wᵢ‖² + ‖s bᵢA‖²) / ‖vᵢ‖². With factors
in float32 that matters below ‖vᵢ‖ ≈ ‖wᵢ‖ / 1000, where no training goes; with factors in bfloat16 it would matter
everywhere, so they are float32 or float64.

Letters: M rows, N columns, R rank.
"""

import torch
from torch import Tensor


def squared_norms(w_MN: Tensor) -> Tensor:
    """‖wᵢ‖² [M], in W's dtype."""
    return w_MN.square().sum(1)


def norms_of_sum(squares_M: Tensor, c_MR: Tensor, a_RN: Tensor, b_MR: Tensor, scale: float) -> Tensor:
    """‖wᵢ + scale bᵢA‖ [M] in the factors' dtype, of ‖wᵢ‖², C = W Aᵀ and the factors."""
    change_M = (b_MR * (2 * c_MR.to(a_RN.dtype) + scale * (b_MR @ (a_RN @ a_RN.T)))).sum(1)
    return (squares_M + scale * change_M).clamp(min=0).sqrt()


def over_norms(magnitude_M: Tensor, norms_M: Tensor) -> Tensor:
    """m / ‖V‖ [M]: what each row is multiplied by. A row of zeros has no direction and stays as it is."""
    return magnitude_M / torch.where(norms_M > 0, norms_M, 1)
