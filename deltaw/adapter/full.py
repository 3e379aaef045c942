"""Full fine-tuning as LoRA's baseline: ΔW itself is trained, a float32 matrix of the weight's size, and W is kept.

    y = x (W + ΔW)ᵀ + bias        ∂L/∂ΔW = Gᵀ x,   G = ∂L/∂y

The sum is formed in float32 and rounded once to W's dtype, so that ΔW keeps what bfloat16 weights could not take
(a step of 1e-5 on a weight of 0.1 is below their rounding). Keeping ΔW apart rather than W + ΔW costs one matrix more
than the usual way, and gives what this is for: the update as a value that can be looked at, compared with a LoRA's and
extracted into one. It is a reference, not a fast path: attention and MLP run by the model's own code.

On disk `delta.safetensors` holds `<module path>` -> ΔW [M, N], float32, beside the `deltaw.json` of every adapter; no
other tool has a form for it.

Letters: N inputs, M outputs.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from deltaw.adapter.layer import AdaptedLinear
from deltaw.base.frozen import FrozenLinear
from deltaw.errors import InputError, listed
from deltaw.factors import Dense
from deltaw.files.safetensors import load_safetensors

DELTAS = "delta.safetensors"


class FullLinear(AdaptedLinear):
    """x (W + ΔW)ᵀ + bias. Only `delta` [M, N] trains, float32, zero at first."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__(base)
        self.delta = nn.Parameter(torch.zeros(base.weight_MN.shape, device=base.weight_MN.device))
        self._kept: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] -> [..., M] in x's dtype."""
        if not self.enabled:
            return self.base(x)
        # The base's own code with another weight, so that a fresh layer has the base's bits.
        y: Tensor = functional_call(self.base.module, {"weight": self._sum()}, (x,))
        return y

    def _sum(self) -> Tensor:
        """W + ΔW as the base stores W; kept until ΔW changes where no gradient is wanted: each token asks for it."""
        version = self.delta._version
        if torch.is_grad_enabled():
            self._kept = None  # a step follows, and fused AdamW does not count itself as a version
        if self._kept is None or self._kept[0] != version:
            total_MN = (self.base.weight_MN.to(self.delta.dtype) + self.delta).to(self.base.weight_MN.dtype)
            total = total_MN.T if isinstance(self.base.module, Conv1D) else total_MN
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


def load_deltas(directory: Path) -> dict[str, Dense]:
    """Read delta.safetensors. Raises InputError for what is no finite float32 matrix."""
    tensors = load_safetensors(directory / DELTAS)
    bad = [n for n, t in tensors.items() if t.ndim != 2 or t.dtype != torch.float32 or not torch.isfinite(t).all()]
    if bad or not tensors:
        raise InputError(f"{directory / DELTAS}: not finite float32 matrices:\n{listed(bad or ['it is empty'])}")
    return {path: Dense(tensor) for path, tensor in tensors.items()}
