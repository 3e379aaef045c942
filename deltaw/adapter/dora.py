"""DoRA: rows of a learnt length in a learnt direction (Liu et al. 2024, "Weight-Decomposed Low-Rank Adaptation", §4).

    y = m ∘ (V x) / ‖V‖ + bias,   V = W + s B A      ‖·‖ the norm of each row of V, m [M] = ‖W‖ at first

In the backward ‖V‖ is a constant (§4.3, to save memory). So with g = m / ‖V‖ [M], z = x Vᵀ and G = ∂L/∂y,

    ∂L/∂z = g ∘ G        ∂L/∂mᵢ = Σ Gᵢ zᵢ / ‖vᵢ‖   (over all rows of x)

and everything below z is LoRA's own backward: the layer is `lora_linears` and a factor for each output,

    y = (z + bias) + (g − 1) ∘ z

written this way, as in PEFT, so that a fresh layer has the base's bits: m and ‖V‖ are then one number computed once
(factors.py), g is 1 and B A is 0. With dropout p the input of both differs from the base's, x̃ = dropout(x):
y = W x + bias + (g − 1) ∘ W x̃ + g ∘ s B A x̃, PEFT's formula again.

The norms of V are computed again in each pass without the sum W + s B A (factors.py): M N R multiplications, next to
nothing in a training step of T ≫ R tokens, but as much as the layer itself where a single token is computed. They
are not kept from one pass to the next, since only the optimiser's way of changing A and B could be noticed;
`fuse()` is the way to a layer that is fast on single tokens.

A, B and m are float32 whatever the base's dtype. On a bfloat16 base W Aᵀ is a bfloat16 product; its rounding reaches g
with the share that 2 s B·C has in ‖V‖² (factors.py), below the rounding of y itself while the update is small beside
the weight. PEFT makes the whole norm in bfloat16. The fused attention and MLP don't know this layer and leave its block
to the model's own code.

Letters: N inputs, M outputs, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapter.layer_update import LayerUpdate
from deltaw.base.frozen import FrozenLinear
from deltaw.factors import LowRank
from deltaw.kernels.lora import Factors, Projection, lora_linears
from deltaw.kinds import DoRA
from deltaw.linalg.row_norms import norms_of_sum, over_norms


class DoRAUpdate(LayerUpdate):
    """m ∘ (W + scale · B A) x / ‖W + scale · B A‖ + bias. `lora_a`, `lora_b` and `magnitude` [M] train, float32."""

    squares_M: Tensor

    def __init__(self, base: FrozenLinear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base)
        (m, n), device = base.weight.shape, base.weight.device
        self.scale = scale
        self.dropout = dropout
        self.lora_a = nn.Parameter(torch.zeros(rank, n, device=device))
        self.lora_b = nn.Parameter(torch.zeros(m, rank, device=device))
        squares_M = base.weight.squares().detach()
        self.register_buffer("squares_M", squares_M, persistent=False)
        self.magnitude = nn.Parameter(squares_M.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        weight, bias_M = self.base.weight, self.base.bias_M
        gain_M = self.gain()
        more_M = (gain_M - 1).to(x.dtype)  # before it is rounded: near 1 half precision keeps nothing of it
        if self.dropout and self.training:
            x, base_y = F.dropout(x, self.dropout), self.base(x)
            low = F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
            return base_y + more_M * lora_linears(x, [Projection(weight)])[0] + (self.scale * gain_M).to(x.dtype) * low
        y = lora_linears(x, [Projection(weight, bias_M, {0: Factors(self.lora_a, self.lora_b, self.scale)})])[0]
        return y + more_M * (y if bias_M is None else y - bias_M)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """‖W + scale · B A‖ [M] of the rows, float32."""
        weight, a_RN = self.base.weight, self.lora_a
        return norms_of_sum(self.squares_M, weight.times(a_RN.to(weight.dtype).T), a_RN, self.lora_b, self.scale)

    def gain(self) -> Tensor:
        """g = m / ‖W + scale · B A‖ [M], float32; only m gets a gradient."""
        return over_norms(self.magnitude, self._norms())

    def trained(self) -> dict[str, nn.Parameter]:
        return {"a": self.lora_a, "b": self.lora_b, "magnitude": self.magnitude}

    @torch.no_grad()
    def start(self, a_RN: Tensor, b_MR: Tensor) -> None:
        """Begin at A [R, N] and B = 0 [M, R]; m is ‖W‖ as it is. Raises ValueError for another B: ΔW would not be 0."""
        if b_MR.any():
            raise ValueError("a DoRA layer begins at B = 0")
        self.lora_a.copy_(a_RN)

    def factors(self) -> DoRA:
        low = LowRank(self.lora_a.detach().clone(), self.lora_b.detach().clone(), self.scale)
        return DoRA(low, self.magnitude.detach().clone())

    @torch.no_grad()
    def set_factors(self, update: DoRA) -> None:
        """Take an update's factors, magnitudes and scale. Raises ValueError when it is of another kind or shape."""
        if not isinstance(update, DoRA):
            raise ValueError(f"a {type(update).__name__} update does not fit a DoRA layer")
        if update.low.a_RN.shape != self.lora_a.shape or update.low.b_MR.shape != self.lora_b.shape:
            raise ValueError(f"update is {update.shape} of rank {update.rank}, layer takes {self.extra_repr()}")
        self.lora_a.copy_(update.low.a_RN)
        self.lora_b.copy_(update.low.b_MR)
        self.magnitude.copy_(update.magnitude_M)
        self.scale = update.scale

    def extra_repr(self) -> str:
        return f"rank={self.lora_a.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}, magnitude"
