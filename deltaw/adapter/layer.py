"""A frozen linear layer with an update beside it: `LoRALinear`, and `AdaptedLinear`, what it shares with other kinds.

The base stays the object it was and is never written to; what trains is a float32 master whatever the base's dtype
(an update smaller than bfloat16's rounding would otherwise be lost). `factors()` hands the update out as a value and
`fuse()` returns a new plain layer with the sum rounded once, so both ways back are new objects.

Dropout acts on the update's input alone (LoRA §4, as in PEFT); while it is on, autograd takes over from the
hand-written backward, since the update no longer sees the input that the base sees.

Letters: N inputs, M outputs, R rank.
"""

import abc
import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.base.frozen import FrozenLinear
from deltaw.factors import LowRank
from deltaw.kernels.lora import Projection, lora_linears


class AdaptedLinear(nn.Module, abc.ABC):
    """A frozen layer and its update; `enabled = False` is the layer alone."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        self.base = base
        self.enabled = True

    @abc.abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by the names that checkpoints use."""

    @abc.abstractmethod
    def factors(self) -> Any:
        """The update as a value (factors.py): copies, detached, on the layer's device."""

    @abc.abstractmethod
    def set_factors(self, update: Any) -> None:
        """Take an update's numbers. Raises ValueError when it is of another kind or shape."""

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """A new layer of the base's own kind whose weight is W + ΔW, summed in float32 and rounded once."""
        fused = copy.deepcopy(self.base.module)
        total_MN = self.base.weight_MN.float() + self.factors().dense()
        fused.weight.copy_(total_MN.T if isinstance(fused, Conv1D) else total_MN)  # type: ignore[operator]
        return fused


class LoRALinear(AdaptedLinear):
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ. Only `lora_a` [R, N] and `lora_b` [M, R] train, both float32."""

    def __init__(self, base: FrozenLinear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base)
        device = base.weight_MN.device
        self.scale = scale
        self.dropout = dropout
        self.lora_a = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] -> [..., M] in x's dtype."""
        if not self.enabled:
            return self.base(x)
        if self.dropout and self.training:
            low = F.linear(F.dropout(x, self.dropout), self.lora_a.to(x.dtype))
            y = self.base(x) + self.scale * F.linear(low, self.lora_b.to(x.dtype))
            return y
        (y,) = lora_linears(x, [self.projection()])
        return y

    def projection(self) -> Projection:
        """The layer as the kernels take it; without its update where that is switched off. Dropout is not in it."""
        if not self.enabled:
            return Projection(self.base.weight_MN, self.base.bias_M)
        return Projection(self.base.weight_MN, self.base.bias_M, self.lora_a, self.lora_b, self.scale)

    def trained(self) -> dict[str, nn.Parameter]:
        return {"a": self.lora_a, "b": self.lora_b}

    def factors(self) -> LowRank:
        return LowRank(self.lora_a.detach().clone(), self.lora_b.detach().clone(), self.scale)

    @torch.no_grad()
    def set_factors(self, update: LowRank) -> None:
        """Take an update's factors and scale. Raises ValueError when its shape or rank is another."""
        if not isinstance(update, LowRank):
            raise ValueError(f"a {type(update).__name__} update does not fit a LoRA layer")
        if update.a_RN.shape != self.lora_a.shape or update.b_MR.shape != self.lora_b.shape:
            raise ValueError(f"update is {update.shape} of rank {update.rank}, layer takes {self.extra_repr()}")
        self.lora_a.copy_(update.a_RN)
        self.lora_b.copy_(update.b_MR)
        self.scale = update.scale

    def extra_repr(self) -> str:
        return f"rank={self.lora_a.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"
