"""The optimiser and its learning rate.

AdamW (Loshchilov & Hutter 2019) on the float32 factors. The learning rate is a pure function of the step, so a resumed
run has no scheduler state to restore or to lose. LoRA+ (Hayou et al. 2024) is one group more: B learns `lr_ratio_b`
times as fast as A.
"""

import math

import torch

from deltaw.adapter.inject import Attached
from deltaw.config import TrainConfig

WARMUP = 10  # updates, where the config leaves it open


def warmup_steps(total: int, config: TrainConfig) -> int:
    """Updates until the full rate: as many as were asked for; else `WARMUP`, of a short run at most a tenth, so that it
    still reaches its rate."""
    return min(WARMUP, total // 10) if config.warmup_steps is None else config.warmup_steps


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of update `step` (0-based) out of `total`: linear warm-up, then constant, linear or cosine to 0."""
    warmup = warmup_steps(total, config)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    left = 1 - (step - warmup) / max(1, total - warmup)
    return config.lr * (left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def make_optimizer(attached: Attached, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all that trains, B's group scaled by `lr_ratio_b`. `set_rate` gives it a rate each step."""
    trained = [item for layer in attached.layers.values() for item in layer.trained().items()]
    ratios = {"b": config.lr_ratio_b}
    groups = [
        {"params": [parameter for name, parameter in trained if ratios.get(name, 1.0) == ratio], "ratio": ratio}
        for ratio in dict.fromkeys([1.0, config.lr_ratio_b])
    ]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Set the step's learning rate in every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
