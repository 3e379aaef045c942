"""How fast this machine's cores multiply, and whether they are this process's alone. Measured, in about a second.

    rates       GFLOP/s of a linear layer of SmolLM2's shape in bfloat16 and float32: the same race by which `dtype:
                auto` chooses (base/dtype.py), so what is shown is why it chose
    obtained    CPU time of this process by the clock's time and the threads, while all of them multiply. OpenMP's
                threads spin where they wait, so without other programs it is close to 1

Rejected: the load average (it counts what waits for a disk, and is a minute old) and a table of CPUs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from deltaw.base.dtype import RACE_SHAPE, fast_dtype, race
from deltaw.files.forked import usable_cores

ROWS, SECONDS = 512, 0.3
BUSY = 0.6  # seconds of work on all threads
CONTESTED = 0.85  # less than this of the cores' time: others take the rest


@dataclass(frozen=True)
class Cores:
    """What the cores do. `rates`: GFLOP/s by dtype; `obtained`: the share of the threads' time that was had."""

    dtype: str
    rates: dict[str, float]
    threads: int
    cores: int
    obtained: float

    @property
    def contested(self) -> bool:
        return self.obtained < CONTESTED


def measure_cores(said: Callable[[], None] = lambda: None) -> Cores:
    """`said` is called once the rates are known."""
    dtype = fast_dtype("cpu")
    width, height = RACE_SHAPE
    # bfloat16 without hardware is hundreds of times slower: fast_dtype found that out on a small product.
    rows = ROWS if dtype is torch.bfloat16 or not _crawls() else 8
    work = 2 * rows * width * height
    rates = {str(kind)[6:]: work / seconds / 1e9 for kind, seconds in race(rows, SECONDS).items()}
    said()
    return Cores(str(dtype)[6:], rates, torch.get_num_threads(), usable_cores(), _obtained())


def _crawls() -> bool:
    times = race(8, 0.01)
    return times[torch.bfloat16] > 8 * times[torch.float32]


def _obtained() -> float:
    x_TN, w_MN = torch.ones(ROWS, RACE_SHAPE[0]), torch.ones(RACE_SHAPE[1], RACE_SHAPE[0])
    nn.functional.linear(x_TN, w_MN)  # the threads are there
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < BUSY:
        nn.functional.linear(x_TN, w_MN)
    wall = time.perf_counter() - began
    return min(1.0, (time.process_time() - used) / (wall * torch.get_num_threads()))
