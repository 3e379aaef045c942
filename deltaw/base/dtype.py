"""dtype: auto is the faster of bfloat16 and float32 on this machine, found by a race of some milliseconds.

Not by a table of CPUs: bfloat16 without hardware support was measured up to 499 times slower. The winner is part of
what a run records, since it decides the last digits. float16 isn't in the race: it is for GPUs without bfloat16. A GPU
that emulates bfloat16 counts as one without.

Where the two are near each other, other programs decide who wins. So a race that was run undisturbed is remembered
($DELTAW_CACHE/dtype.json), by processor, PyTorch and number of threads: the same command has the same numbers again on
this machine, also while it is busy.
"""

import functools
import json
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from deltaw.base.source import cache_root
from deltaw.errors import DeltawError
from deltaw.files.atomic import write_text_atomic
from deltaw.files.strict_json import read_json

FILE = "dtype.json"
RACE_SHAPE = 576, 1536  # SmolLM2's: features in and out of a linear layer
ADVANTAGE = 1.2  # bfloat16 costs digits, so it must win clearly
UNDISTURBED = 0.9  # of the threads' time that the race must have had to be remembered


@functools.cache
def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where it is clearly faster than float32, else float32. About 0.12 s where it isn't known yet."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device != "cpu":
        return torch.float32
    known, machine = _remembered(), _machine()
    if known.get(machine) in ("bfloat16", "float32"):
        chosen: torch.dtype = getattr(torch, known[machine])
        return chosen
    began, used = time.perf_counter(), time.process_time()
    chosen = _raced()
    had = (time.process_time() - used) / ((time.perf_counter() - began) * torch.get_num_threads())
    if had >= UNDISTURBED:
        with suppress(DeltawError, OSError):  # a disk that is full or can't be written: it is raced again
            cache_root().mkdir(parents=True, exist_ok=True)
            write_text_atomic(cache_root() / FILE, json.dumps({**known, machine: str(chosen)[6:]}, indent=1) + "\n")
    return chosen


def race(rows: int, seconds: float) -> dict[torch.dtype, float]:
    """The best time, in seconds, of a linear layer of SmolLM2's shape in each dtype. Runs about `seconds`."""
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    pairs = {
        dtype: (torch.ones(rows, RACE_SHAPE[0], dtype=dtype), torch.ones(*RACE_SHAPE[::-1], dtype=dtype))
        for dtype in best
    }
    stop = time.perf_counter() + seconds
    while True:  # in turns, so that another process's load falls on both; the first round warms up
        for dtype, (x_TN, w_MN) in pairs.items():
            start = time.perf_counter()
            nn.functional.linear(x_TN, w_MN)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        if time.perf_counter() > stop:
            return best


def _raced() -> torch.dtype:
    # A tiny product first: where bfloat16 is emulated, the real one would take seconds.
    slow = race(rows=8, seconds=0.01)
    if slow[torch.bfloat16] > 8 * slow[torch.float32]:
        return torch.float32
    times = race(rows=512, seconds=0.1)
    return torch.bfloat16 if times[torch.bfloat16] * ADVANTAGE < times[torch.float32] else torch.float32


def _machine() -> str:
    """What decides the race."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _remembered() -> dict[str, str]:
    with suppress(DeltawError):
        known = read_json(cache_root() / FILE, max_bytes=100_000)
        return {name: value for name, value in known.items() if isinstance(value, str)}
    return {}
