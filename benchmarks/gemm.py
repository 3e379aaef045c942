"""The bare matrix products of a step: what the machine could do if there were nothing else.

Every linear layer of the model and its head, forward (x Wᵀ) and backward to the input (G W), at the workload's count of
tokens, the head at the count of supervised ones: 4 (N_blocks + f N_head) FLOPs per token, f the supervised share. No
dW, since the base is frozen; no low-rank products, which a perfect trainer would hide. A layer's shape is timed once
and counts as often as the model has it.

Letters: T tokens, N inputs, M outputs.
"""

import statistics
import time
from collections import Counter

import torch
from torch import Tensor

from benchmarks.workloads import BASE, Step, batches, supervised, tokens
from deltaw.adapter.targets import linear_paths
from deltaw.base.frozen import FrozenLinear
from deltaw.base.load import open_skeleton
from deltaw.base.source import find_base

REPEATS = 10


def shapes() -> tuple[Counter[tuple[int, int]], tuple[int, int]]:
    """(how often each (M, N) stands in the blocks, the head's (M, N))."""
    skeleton = open_skeleton(find_base(BASE))
    layers = [FrozenLinear(skeleton.get_submodule(path)) for path in linear_paths(skeleton)]
    head = FrozenLinear(skeleton.get_output_embeddings())  # type: ignore[operator]
    blocks = Counter((layer.out_features, layer.in_features) for layer in layers)
    return blocks, (head.out_features, head.in_features)


def flops_per_token(share: float) -> float:
    """4 (N_blocks + f N_head), f the share of supervised tokens."""
    blocks, head = shapes()
    return 4 * (sum(m * n * count for (m, n), count in blocks.items()) + share * head[0] * head[1])


def measure(steps: list[Step], dtype: torch.dtype, rounds: int) -> tuple[list[float], float]:
    """(rate in FLOP/s, one per round; supervised share) at the mean batch of `steps`."""
    count = sum(len(batches(step)) for step in steps)
    rows, labels = sum(map(tokens, steps)) // count, sum(map(supervised, steps)) // count
    blocks, head = shapes()
    rates = []
    for _ in range(rounds):
        seconds = sum(number * _seconds(rows, *shape, dtype, REPEATS) for shape, number in blocks.items())
        seconds += _seconds(labels, *head, dtype, 1)
        rates.append(rows * flops_per_token(labels / rows) / seconds)
    return rates, sum(map(supervised, steps)) / sum(map(tokens, steps))


def _seconds(rows: int, m: int, n: int, dtype: torch.dtype, repeats: int) -> float:
    """Median time of a layer's two products."""
    x_TN, w_MN, g_TM = (torch.randn(shape).to(dtype) for shape in ((rows, n), (m, n), (rows, m)))
    _products(x_TN, w_MN, g_TM)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        _products(x_TN, w_MN, g_TM)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _products(x_TN: Tensor, w_MN: Tensor, g_TM: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.linear(x_TN, w_MN), g_TM @ w_MN
