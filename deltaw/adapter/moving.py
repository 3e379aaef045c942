"""`MovingUpdate`: LoRA that begins at factors with B₀A₀ ≠ 0, as some initialisers want it (init.py).

Their authors take s B₀A₀ off the base's weight, so that what they save belongs to a base nobody else has. Here the base
keeps its weight and the update is the difference

    ΔW = s (B A − B₀A₀) = s [B₀ + E, E] [D; A₀],      A = A₀ + D,  B = B₀ + E

a plain LoRA of rank 2R on the original base. A₀ and B₀ are constants of the layer; D and E are what trains, zero at
first. Their gradients are those of A and B, so AdamW's steps are those of A and B, too (weight decay pulls towards the
start, that is towards ΔW = 0, as it does in plain LoRA). The kernels take the stacked factors like any others, and
autograd adds up what comes back. Rejected: [A; A₀] and [B, −B₀], the same ΔW as the small difference of two large
products: a fresh layer would be the base up to rounding only, and in bfloat16 the rounding of A and B (2⁻⁹ of B₀A₀)
would drown the first steps. This way it is the base to the bit, and the factors that are rounded are small.

Letters: N inputs, M outputs, R rank, K = 2R.
"""

import torch
from torch import Tensor

from deltaw.adapter.layer import LowRankUpdate
from deltaw.base.frozen import FrozenLinear


class MovingUpdate(LowRankUpdate):
    """`lora_a` and `lora_b` are the changes D and E from `initial_a` A₀ and `initial_b` B₀, which `start` sets."""

    initial_a: Tensor
    initial_b: Tensor

    def __init__(self, base: FrozenLinear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scale, dropout)
        self.register_buffer("initial_a", torch.zeros_like(self.lora_a, requires_grad=False))
        self.register_buffer("initial_b", torch.zeros_like(self.lora_b, requires_grad=False))

    def acting(self) -> tuple[Tensor, Tensor]:
        a_KN = torch.cat([self.lora_a, self.initial_a])
        return a_KN, torch.cat([self.initial_b + self.lora_b, self.lora_b], dim=1)

    def constants(self) -> dict[str, Tensor]:
        return {"initial_a": self.initial_a, "initial_b": self.initial_b}

    @torch.no_grad()
    def start(self, a_RN: Tensor, b_MR: Tensor) -> None:
        self.initial_a.copy_(a_RN)
        self.initial_b.copy_(b_MR)
        self.lora_a.zero_()
        self.lora_b.zero_()

    @torch.no_grad()
    def take(self, a_KN: Tensor, b_MK: Tensor) -> None:
        rank = len(self.lora_a)
        a_RN, initial_a, sum_b, b_MR = a_KN[:rank], a_KN[rank:], b_MK[:, :rank], b_MK[:, rank:]
        if not (torch.equal(initial_a, self.initial_a) and torch.equal(sum_b, self.initial_b + b_MR)):
            raise ValueError("the update began at other factors than this layer")
        self.lora_a.copy_(a_RN)
        self.lora_b.copy_(b_MR)
