"""A frozen linear layer with an update beside it: `LoRALinear`, and `AdaptedLinear`, what it shares with other kinds.

The base stays the object it was and is never written to; what trains is a float32 master whatever the base's dtype
(an update smaller than bfloat16's rounding would otherwise be lost). `factors()` hands the update out as a value and
`fuse()` returns a new plain layer with the sum rounded once, so both ways back are new objects.

Dropout acts on the update's input alone (LoRA §4, as in PEFT); while it is on, autograd takes over from the
hand-written backward, since the update no longer sees the input that the base sees.

Some initialisers (init.py) begin at factors with B₀A₀ ≠ 0, and their authors take s B₀A₀ off the base's weight, so that
what they save belongs to a base nobody else has. Here the base keeps its weight and the update is the difference

    ΔW = s (B A − B₀A₀) = s [B₀ + E, E] [D; A₀],      A = A₀ + D,  B = B₀ + E

a plain LoRA of rank 2R on the original base. A₀ and B₀ are constants of the layer; D and E are what trains, zero at
first. Their gradients are those of A and B, so AdamW's steps are those of A and B, too (weight decay pulls towards the
start, that is towards ΔW = 0, as it does in plain LoRA). The kernels take the stacked factors like any others, and
autograd adds up what comes back. Rejected: [A; A₀] and [B, −B₀], the same ΔW as the small difference of two large
products: a fresh layer would be the base up to rounding only, and in bfloat16 the rounding of A and B (2⁻⁹ of B₀A₀)
would drown the first steps. This way it is the base to the bit, and the factors that are rounded are small.

Letters: N inputs, M outputs, R rank.
"""

import abc
import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.base.frozen import FrozenLinear
from deltaw.factors import LowRank
from deltaw.kernels.lora import Projection, lora_linears


@dataclass(frozen=True)
class Stored:
    """A weight's description. No tensor, so that using it past its layer, and the update, is an error (products with a
    tensor on the meta device, for one, give whatever lies in memory)."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size


class AdaptedLinear(nn.Module, abc.ABC):
    """A frozen layer and its update; `enabled = False` is the layer alone."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        self.base = base
        self.enabled = True

    @property
    def weight(self) -> "Stored":
        """What a model may ask of a weight that it doesn't use: how the base stores it."""
        w_MN = self.base.weight_MN
        shape = w_MN.T.shape if isinstance(self.base.module, Conv1D) else w_MN.shape
        return Stored(w_MN.dtype, w_MN.device, shape)

    @abc.abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by the names that checkpoints use."""

    def constants(self) -> dict[str, Tensor]:
        """What an initialiser left that doesn't train, by the names that checkpoints use."""
        return {}

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
        w_MN = self.base.weight_MN
        total_MN = w_MN.float() + self.factors().relative_to(w_MN).dense()
        fused.weight.copy_(total_MN.T if isinstance(fused, Conv1D) else total_MN)  # type: ignore[operator]
        return fused


class LoRALinear(AdaptedLinear):
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ. Only `lora_a` [R, N] and `lora_b` [M, R] train, both float32.

    With `moves` they are the changes D and E from `initial_a` A₀ and `initial_b` B₀, which `start` sets.
    """

    initial_a: Tensor | None
    initial_b: Tensor | None

    def __init__(
        self, base: FrozenLinear, rank: int, scale: float, dropout: float = 0.0, *, moves: bool = False
    ) -> None:
        super().__init__(base)
        device = base.weight_MN.device
        self.scale = scale
        self.dropout = dropout
        self.lora_a = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.register_buffer("initial_a", torch.zeros_like(self.lora_a, requires_grad=False) if moves else None)
        self.register_buffer("initial_b", torch.zeros_like(self.lora_b, requires_grad=False) if moves else None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] -> [..., M] in x's dtype."""
        if not self.enabled:
            return self.base(x)
        if self.dropout and self.training:
            a_KN, b_MK = self._acting()
            low = F.linear(F.dropout(x, self.dropout), a_KN.to(x.dtype))
            y = self.base(x) + self.scale * F.linear(low, b_MK.to(x.dtype))
            return y
        (y,) = lora_linears(x, [self.projection()])
        return y

    def projection(self) -> Projection:
        """The layer as the kernels take it; without its update where that is switched off. Dropout is not in it."""
        if not self.enabled:
            return Projection(self.base.weight_MN, self.base.bias_M)
        return Projection(self.base.weight_MN, self.base.bias_M, *self._acting(), self.scale)

    def _acting(self) -> tuple[Tensor, Tensor]:
        """The factors of ΔW: A [R, N] and B [M, R], or the stacked ones of rank 2R."""
        if self.initial_a is None or self.initial_b is None:
            return self.lora_a, self.lora_b
        a_KN = torch.cat([self.lora_a, self.initial_a])
        return a_KN, torch.cat([self.initial_b + self.lora_b, self.lora_b], dim=1)

    def trained(self) -> dict[str, nn.Parameter]:
        return {"a": self.lora_a, "b": self.lora_b}

    def constants(self) -> dict[str, Tensor]:
        if self.initial_a is None or self.initial_b is None:
            return {}
        return {"initial_a": self.initial_a, "initial_b": self.initial_b}

    @torch.no_grad()
    def start(self, a_RN: Tensor, b_MR: Tensor) -> None:
        """Begin at these factors, with ΔW = 0: B is zero, or the layer `moves` and keeps them as A₀ and B₀."""
        if self.initial_a is None or self.initial_b is None:
            self.lora_a.copy_(a_RN)
            self.lora_b.copy_(b_MR)
            return
        self.initial_a.copy_(a_RN)
        self.initial_b.copy_(b_MR)
        self.lora_a.zero_()
        self.lora_b.zero_()

    @torch.no_grad()
    def factors(self) -> LowRank:
        a_KN, b_MK = self._acting()
        return LowRank(a_KN.clone(), b_MK.clone(), self.scale)

    @torch.no_grad()
    def set_factors(self, update: LowRank) -> None:
        """Take an update's factors and scale. Raises ValueError when its shape or rank is another, or its A₀ and B₀."""
        if not isinstance(update, LowRank):
            raise ValueError(f"a {type(update).__name__} update does not fit a LoRA layer")
        a, b = (factor.to(self.lora_a) for factor in (update.a_RN, update.b_MR))
        now_a, now_b = self._acting()
        if a.shape != now_a.shape or b.shape != now_b.shape:
            raise ValueError(f"update is {update.shape} of rank {update.rank}, layer takes {self.extra_repr()}")
        if self.initial_a is not None and self.initial_b is not None:
            rank = len(self.lora_a)
            a, initial_a, sum_b, b = a[:rank], a[rank:], b[:, :rank], b[:, rank:]
            if not (torch.equal(initial_a, self.initial_a) and torch.equal(sum_b, self.initial_b + b)):
                raise ValueError("the update began at other factors than this layer")
        self.lora_a.copy_(a)
        self.lora_b.copy_(b)
        self.scale = update.scale

    def extra_repr(self) -> str:
        return f"rank={self._acting()[0].shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"
