"""Where training starts: A random, B zero, so that ΔW = 0 and the fresh model is exactly the base.

A is uniform in ±1/√N: Kaiming's bound with a = √5, what nn.Linear, the LoRA authors' code and PEFT use. The draw is
made on the CPU in float32 from the caller's generator, so a seed gives one adapter on every device and dtype.
"""

import torch
from torch import Tensor


def fresh_factors(rank: int, out_features: int, in_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(A [R, N] uniform in ±1/√N, B [M, R] zero), float32."""
    bound = in_features**-0.5
    a_RN = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    return a_RN, torch.zeros(out_features, rank)
