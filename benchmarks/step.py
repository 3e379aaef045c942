"""Training steps of the demo on this machine: tokens/s, idle and with one core taken by another program.

    python -m benchmarks.step [--busy]         OMP_WAIT_POLICY=passive python -m benchmarks.step --busy

For settings of the machine (docs/log.md); the comparison with other trainers is `make bench`.
"""

import itertools
import multiprocessing
import statistics
import sys
import time

import torch

from deltaw.adapter.attach import attach
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.load import open_base
from deltaw.commands.demo import demo_config
from deltaw.config import RunConfig, parse_config
from deltaw.data.loader import Loader
from deltaw.data.opening import open_dataset
from deltaw.show.progress import Display
from deltaw.training.optim import make_optimizer

STEPS, WARM = 15, 3


def spin() -> None:
    while True:
        pass


def gemm_gigaflops(rows: int) -> float:
    """The bf16 rate of a product of the model's shape, the bound of everything else here."""
    x_TN, w_MN = torch.randn(rows, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    torch.nn.functional.linear(x_TN, w_MN)
    began = time.perf_counter()
    for _ in range(200):
        torch.nn.functional.linear(x_TN, w_MN)
    return 200 * 2 * rows * 576 * 1536 / (time.perf_counter() - began) / 1e9


def demo_steps(count: int) -> tuple[RunConfig, Forward, list[list[Batch]]]:
    """The demo's settings, its base ready to run, and the batches of its first `count` steps."""
    raw = demo_config().model_dump(mode="json", by_alias=True)
    sections = {"data": {**raw["data"], "limit": 2000, "eval": None}, "train": {**raw["train"], "sample_every": None}}
    config = parse_config({**raw, **sections, "evaluate": {}})
    _, _, dataset = open_dataset(config, Display(quiet=True))
    sizes = config.train
    loader = Loader(dataset.train, sizes.tokens_per_step, sizes.tokens_per_batch, 0)
    return (
        config,
        plan_forward(open_base(config.base).model),
        [batches for batches, _ in itertools.islice(loader, count)],
    )


def take(forward: Forward, batches: list[Batch], optimizer: torch.optim.Optimizer) -> float:
    """One step: its seconds."""
    began = time.perf_counter()
    for batch in batches:
        loss, count = forward.loss(batch)
        (loss / count).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def main() -> None:
    config, forward, steps = demo_steps(WARM + STEPS)
    optimizer = make_optimizer(attach(forward.model, config.adapter), config.train)
    other = multiprocessing.Process(target=spin, daemon=True)
    if "--busy" in sys.argv:
        other.start()
    seconds = [take(forward, batches, optimizer) for batches in steps]
    counts = [sum(len(batch.tokens_T) for batch in batches) for batches in steps]
    rates = [count / taken for count, taken in zip(counts[WARM:], seconds[WARM:], strict=True)]
    low, middle, high = statistics.quantiles(rates, n=4)
    rate = gemm_gigaflops(config.train.step_tokens)
    print(f"{middle:.0f} tokens/s (quartiles {low:.0f}, {high:.0f}) over {STEPS} steps; {forward.describe()}")
    print(f"bf16 products alone: {rate:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
