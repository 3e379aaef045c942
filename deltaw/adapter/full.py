"""Full fine-tuning as LoRA's baseline: ΔW itself is trained, a float32 matrix of the weight's size, and W is kept.

    y = x (W + ΔW)ᵀ + bias        ∂L/∂ΔW = Gᵀ x,   G = ∂L/∂y

The sum is formed in float32 and rounded once to W's dtype, so that ΔW keeps what bfloat16 weights could not take
(a step of 1e-5 on a weight of 0.1 is below their rounding). Keeping ΔW apart rather than W + ΔW costs one matrix more
than the usual way, and gives what this is for: the update as a value that can be looked at, compared with a LoRA's and
extracted into one. A weight in another form (quantised) has no room for the sum: there x ΔWᵀ is added to the layer's
own product. It is a reference, not a fast path: attention and MLP run by the model's own code.

Letters: N inputs, M outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from deltaw.adapter.layer_update import LayerUpdate
from deltaw.base.frozen import FrozenLinear
from deltaw.kernels.lora import Projection, lora_linears
from deltaw.kinds import Dense


class FullUpdate(LayerUpdate):
    """x (W + ΔW)ᵀ + bias. Only `delta` [M, N] trains, float32, zero at first."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__(base)
        self.delta = nn.Parameter(torch.zeros(base.weight.shape, device=base.weight.device))
        self._kept: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        if self.base.brings_weight:
            base_y = lora_linears(x, [Projection(self.base.weight, self.base.bias_M)])[0]
            return base_y + F.linear(x, self.delta.to(x.dtype))
        # The base's own code with another weight, so that a fresh layer has the base's bits.
        y: Tensor = functional_call(self.base.module, {"weight": self._sum()}, (x,))
        return y

    def _sum(self) -> Tensor:
        """W + ΔW as the base stores W; kept until ΔW changes where no gradient is wanted: each token asks for it."""
        version = self.delta._version
        if torch.is_grad_enabled():
            self._kept = None  # a step follows, and fused AdamW does not count itself as a version
        if self._kept is None or self._kept[0] != version:
            w_MN = self.base.weight.dense()
            total_MN = (w_MN.to(self.delta.dtype) + self.delta).to(w_MN.dtype)
            total = total_MN.T if self.base.transposed else total_MN
            if torch.is_grad_enabled():
                return total
            self._kept = version, total
        return self._kept[1]

    def trained(self) -> dict[str, nn.Parameter]:
        return {"delta": self.delta}

    def factors(self) -> Dense:
        return Dense(self.delta.detach().clone())

    @torch.no_grad()
    def set_factors(self, update: Dense) -> None:
        if not isinstance(update, Dense) or update.shape != tuple(self.delta.shape):
            raise ValueError(
                f"a {type(update).__name__} of {update.shape} does not fit ΔW of {tuple(self.delta.shape)}"
            )
        self.delta.copy_(update.delta_MN)

    def extra_repr(self) -> str:
        return "full"
