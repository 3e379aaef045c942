"""The optimiser and its learning rate.

AdamW (Loshchilov & Hutter 2019) on the float32 factors. The learning rate is a pure function of the step, so a resumed
run has no scheduler state to restore or to lose. LoRA+ (Hayou et al. 2024) adds a group: B learns `lr_ratio_b`
times as fast as A.

Weight decay pulls ΔW towards 0, the base: A and B of plain LoRA, and what an initialiser's factors have changed by
(layer.py). DoRA's magnitudes are the lengths of W's rows at first, and trained tokens and whole modules are rows of W;
decayed they would shrink W itself, so they aren't. A module that is trained whole learns at `WHOLE_SHARE` of the rate:
what suits a LoRA is ten times too much for a full matrix (Schulman et al. 2025, "LoRA Without Regret").

On a GPU the rate is a number there, and the count of updates too: an update that is captured (captured.py) reads them
each time it is replayed.
"""

import math

import torch
from torch import Tensor

from deltaw.adapter.attach import Attached
from deltaw.config import TrainConfig

WHOLE_SHARE = 0.1
ABSOLUTE = ("magnitude", "rows", "weight")  # what isn't a part of ΔW
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
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for layer in attached.layers.values():
        for name, parameter in layer.trained().items():
            ratio = config.lr_ratio_b if name == "b" else WHOLE_SHARE if name == "weight" else 1.0
            decay = 0.0 if name in ABSOLUTE else config.weight_decay
            groups.setdefault((ratio, decay), []).append(parameter)
    device = next(iter(groups.values()))[0].device
    return torch.optim.AdamW(
        [
            {"params": params, "ratio": ratio, "weight_decay": decay, "lr": _rate_on(device, config.lr)}
            for (ratio, decay), params in groups.items()
        ],
        lr=config.lr,
        fused=True,
        capturable=device.type == "cuda",
    )


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Set the step's learning rate in every group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["ratio"])
        else:
            group["lr"] = rate * group["ratio"]


def _rate_on(device: torch.device, rate: float) -> float | Tensor:
    """One for each group: they are written to."""
    return torch.tensor(rate, device=device) if device.type == "cuda" else rate
