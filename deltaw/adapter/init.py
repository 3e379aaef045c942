"""Where training starts: A and B at random, or from the weight, the layer's inputs or the weight's gradient.

    lora      A uniform in ±1/√N, B = 0                                   Hu et al. 2021
    pissa     s B A = the R leading terms of W's SVD, √(S/s) in each      Meng et al. 2024
    olora     B = Q, A = R of W's QR decomposition, the first R of them   Büyükakyüz 2024
    eva       A = the R leading principal directions of the inputs, B = 0 Paischer et al. 2024
    lora-ga   A = ζ V[:R]ᵀ, B = ζ U[R:2R] of ∂L/∂W = U S Vᵀ               Wang et al. 2024

Where B A ≠ 0 the authors take s B A off the base's weight. Here it comes off the update (layer.py), so that ΔW = 0 at
first in all of them, the base is as it was, and what is saved is a plain LoRA.

`lora`: ±1/√N is Kaiming's bound with a = √5, what nn.Linear, the LoRA authors' code and PEFT use. The draw is made on
the CPU in float32 from the caller's generator, so a seed gives one adapter on every device and dtype.

`olora`: the first R columns of Q depend on W's first R columns alone, and A = QᵀW, so the rest is not decomposed:
O(M N R) instead of O(M N min(M, N)).

`eva`: the layer's inputs are centred, as in the authors' and PEFT's incremental SVD. Every module gets the rank that
the spec says: EVA's moving of rank from one module to another (ρ > 1) would make the size of the adapter depend on
the data. Where fewer tokens were seen than R, the last directions are arbitrary.

`lora-ga`: direction "ArB2r" and scale "stable" of the authors' code, ζ = M^¼ / √γ with γ = 16, in both factors. PEFT
0.21 has ζ in B alone and multiplies B by S as well, so that its start depends on the loss's scale; that isn't the
paper's algorithm and isn't followed. A's and B's directions are not a pair (u₁ goes with v₁), so their signs relative
to each other are arbitrary, there as here.

The singular vectors come from the eigenvectors of the smaller Gram matrix in float64, whose rounding is below that of a
float32 matrix's own SVD for all but its smallest singular values, in a third to a half of the time. A randomised SVD is
faster still and is not offered: it gives other factors where the spectrum is flat, as weights' spectra are.

Letters: N inputs, M outputs, R rank, T tokens, s the update's scale.
"""

import torch
from torch import Tensor

from deltaw.linalg.rank import tolerance

GAMMA = 16  # of LoRA-GA's stable scale


def fresh_factors(rank: int, out_features: int, in_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(A [R, N] uniform in ±1/√N, B [M, R] zero), float32."""
    bound = in_features**-0.5
    a_RN = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    return a_RN, torch.zeros(out_features, rank)


def pissa_factors(w_MN: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A [R, N], B [M, R]) with scale · B A the best approximation of W in that rank; float32, on W's device."""
    u_MR, s_R, vt_RN = leading(w_MN, rank)
    root_R = (s_R / scale).sqrt()
    return (root_R[:, None] * vt_RN).float(), (u_MR * root_R).float()


def olora_factors(w_MN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [R, N], B [M, R]) with B's columns orthonormal and A = BᵀW; float32, on W's device."""
    w_MN = w_MN.float()
    q_MR = torch.linalg.qr(w_MN[:, :rank]).Q
    return q_MR.T @ w_MN, q_MR


def eva_directions(scatter_NN: Tensor, rank: int) -> Tensor:
    """A [R, N] orthonormal, float32, of Σ (x − μ)(x − μ)ᵀ [N, N] in float64."""
    _, vectors_NN = torch.linalg.eigh(scatter_NN)
    return vectors_NN[:, -rank:].flip(1).T.float()


def lora_ga_factors(gradient_MN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [R, N], B [M, R]) of ∂L/∂W, whose own scale doesn't matter; float32. 2 R ≤ min(M, N)."""
    u_MK, _, vt_KN = leading(gradient_MN, 2 * rank)
    zeta = len(gradient_MN) ** 0.25 / GAMMA**0.5
    return (zeta * vt_KN[:rank]).float(), (zeta * u_MK[:, rank:]).float()


def leading(x_MN: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [M, K], S [K], Vᵀ [K, N], float64: X's k largest singular values, descending, and their vectors.

    Vectors of a singular value that is 0 to the rounding of float32 are zero on the longer side.
    """
    x_MN = x_MN.double()
    if x_MN.shape[0] > x_MN.shape[1]:
        v_NK, s_K, ut_KM = leading(x_MN.T, k)
        return ut_KM.T, s_K, v_NK.T
    squares_M, vectors_MM = torch.linalg.eigh(x_MN @ x_MN.T)
    s_K, u_MK = squares_M[-k:].flip(0).clamp(min=0).sqrt(), vectors_MM[:, -k:].flip(1)
    real_K = s_K > tolerance(s_K.float(), *x_MN.shape)
    return u_MK, s_K, torch.where(real_K, 1 / s_K, 0)[:, None] * (u_MK.T @ x_MN)
