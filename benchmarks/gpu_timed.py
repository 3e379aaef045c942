"""What a process of gpu.py does: steps timed on the device's own clock, and rows of what they came to."""

import collections
import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_arms import ARMS
from benchmarks.gpu_gate import gate, gate_batch
from benchmarks.gpu_models import (
    SHAPES,
    Batch,
    Effort,
    Row,
    batches,
    fill_factors,
    flops_per_token,
    free_memory,
    products,
)


class Clock:
    """Marks on the device's own time line, and its memory."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def gaps(self, marks: Sequence[Any]) -> list[float]:
        """Seconds from each mark to the next."""
        if not self.cuda:
            return [after - before for before, after in itertools.pairwise(marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> Row:
        if not self.cuda:
            return {}
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"allocated_gib": round(allocated / 2**30, 3), "reserved_gib": round(reserved / 2**30, 3)}


def median_seconds(run: Callable[[int], Any], clock: Clock, effort: Effort) -> tuple[float, int]:
    """(median of the calls run(0), run(1), ..., how many). The host is not made to wait between them."""
    for number in range(effort.warm):
        run(number)
    clock.forget_peak()
    until = time.monotonic() + effort.seconds
    marks = [clock.mark()]
    for number in range(effort.steps):
        if number >= 3 and time.monotonic() > until:
            break
        run(number)
        marks.append(clock.mark())
    gaps = clock.gaps(marks)
    return statistics.median(gaps), len(gaps)


def run_gemm(models: Sequence[str], effort: Effort, device: str) -> Iterator[Row]:
    """The square's row carries "rate", FLOP/s. A model's products: of up to four layers and the head, both ways."""
    clock, n = Clock(device), effort.square
    pairs = [[torch.randn(n, n, device=device).bfloat16() for _ in range(2)] for _ in range(2)]
    seconds, _ = median_seconds(lambda i: torch.mm(*pairs[i % 2]), clock, effort)
    rate = 2 * n**3 / seconds
    yield {"model": f"{n}^3", "tokens": n, "rate": rate, "note": f"{rate / 1e12:.4g} TFLOP/s"}
    pairs.clear()
    for model in models:
        layers = min(SHAPES[model]["layers"], 4)
        for size in effort.sizes:
            sizes = [*(products(model) * layers), (SHAPES[model]["vocabulary"], SHAPES[model]["hidden"])]
            w = [torch.randn(rows, columns, device=device).bfloat16() for rows, columns in sizes]
            x = {k: torch.randn(size, k, device=device).bfloat16() for pair in sizes[:-1] for k in pair}
            # The head a slice at a time: its output is never held for a whole batch
            part = max(1, size // 8)
            g = torch.randn(part, len(w[-1]), device=device).bfloat16()

            def run(_: int, w: list[Tensor] = w, x: dict[int, Tensor] = x, part: int = part, g: Tensor = g) -> None:
                for weight in w[:-1]:
                    torch.mm(x[weight.shape[1]], weight.T)
                    torch.mm(x[weight.shape[0]], weight)
                for start in range(0, len(x[w[-1].shape[1]]), part):
                    torch.mm(x[w[-1].shape[1]][start : start + part], w[-1].T)
                    torch.mm(g, w[-1])

            seconds, _ = median_seconds(run, clock, effort)
            numbers = [rows * columns for rows, columns in sizes]
            seconds *= flops_per_token(model) / (4 * sum(numbers))  # four layers stand for all
            yield {"model": model, "tokens": size, "tokens_per_s": size / seconds, "note": "its products alone"}
            del w, x, g, run
            free_memory()


def run_arm(arm: str, shape: str, effort: Effort, device: str, truth: str | None) -> Iterator[Row]:
    """Rows of one arm on one model: its gate, if there is a truth, then one row per size. Errors are rows."""
    where: Row = {"arm": arm, "model": shape}
    free_memory()  # of the model before
    try:
        make, way = ARMS[arm]
        made = make(shape, device, way)
        if truth:
            from safetensors.torch import load_file

            passed, text = gate(made, gate_batch(shape, device), load_file(truth))
            yield {**where, "note": text, "passed": passed}
            if not passed:
                return
    except Exception as error:
        yield {**where, **_failed(error)}
        return
    clock = Clock(device)
    for size in effort.sizes:
        if size < 2 * SHAPES[shape].get("shortest", 0):
            continue
        free_memory()
        try:
            some = batches(shape, size, 4, device)
            clock.forget_peak()
            made.prepare(some)
            recording = clock.peak()
            fill_factors(made.parameters)
            losses: list[Tensor | float] = []

            def step(number: int, some: list[Batch] = some, losses: list[Tensor | float] = losses) -> None:
                losses.append(made.step(some[number % len(some)], some[(number + 1) % len(some)]))

            seconds, count = median_seconds(step, clock, effort)
            first, last = float(losses[0]), float(losses[-1])
            note = f"{made.note}; median of {count} steps; loss {first:.5f} at first"
            if made.pads:
                note += f"; padding {statistics.mean(batch.ids_BL.numel() / size for batch in some) - 1:.0%} more"
            if not math.isfinite(last):
                raise FloatingPointError(f"the loss became {last}")
            row = {**where, "tokens": size, "tokens_per_s": size / seconds, "first_loss": first, "note": note}
            # A replay asks the allocator for nothing: what its tensors take shows while it is recorded.
            taken = {name: max(value, recording[name]) for name, value in clock.peak().items()}
            yield row | taken
            if arm == "deltaw":
                yield {"arm": "profile", "model": shape, "tokens": size, **profiled(step, clock, seconds)}
        except Exception as error:
            made.forget()
            yield {**where, "tokens": size, **_failed(error)}


def profiled(step: Callable[[int], Any], clock: Clock, seconds: float, steps: int = 3) -> Row:
    """What so many steps are made of. `seconds`: of one by the clock, when nobody looked."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if clock.cuda else activity.CPU]) as profile:
        for number in range(steps):
            step(number)
        clock.forget_peak()  # waits
    return made_of(profile, clock.cuda, seconds, steps)


def made_of(profile: Any, cuda: bool, seconds: float, steps: int) -> Row:
    """The row of a profile of so many steps; "kernels": lines on the largest, for whoever watches."""
    kinds: dict[str, list[float]] = collections.defaultdict(list)
    for event in profile.events():
        if not cuda:
            kinds[event.name].append(event.self_cpu_time_total / 1000)
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            kinds[event.name].append(event.device_time / 1000)
    largest = sorted(kinds.items(), key=lambda kind: -sum(kind[1]))[:10]
    busy, launches = sum(map(sum, kinds.values())) / steps, sum(map(len, kinds.values())) // steps
    return {
        "note": f"per step {busy:.1f} ms of kernels in {launches} launches; {1000 * seconds:.1f} ms by the clock",
        "kernels": [f"{sum(ms) / steps:8.2f} ms {len(ms) // steps:6d}  {name[:80]}" for name, ms in largest],
    }


def _failed(error: Exception) -> Row:
    traceback.print_exc()
    lines = str(error).strip().splitlines()
    name = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"error: {type(error).__name__}"
    return {"note": f"{name}: {lines[0] if lines else ''}"[:300], "passed": False}
