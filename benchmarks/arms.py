"""One process, one arm, one workload: the figures of its steps as one JSON object on the last line.

    python -m benchmarks.arms ARM WORKLOAD [--dtype bfloat16] [--steps 3] [--warm 1] [--without TECHNIQUE] --json

    peft            PEFT in a bare eager loop          trl             TRL's SFTTrainer + PEFT, made strong
    peft-compile    the same under torch.compile       trl-free        the same, padding-free
    peft-trainer    PEFT in transformers' Trainer      gemm            the matrix products alone (gemm.py)
    deltaw          deltaw, or deltaw --without packing | loss | norm | attention | mlp

A fresh process each, because memory is the process's high-water mark (VmHWM) and because start-up is part of what a
user waits for: `first_step_s` counts from the start of the process, imports included, to the end of its first step.
Tokens are real ones; padding counts as none. Compiling is in `first_step_s` and, beside it, in `compile_s` (what the
first step took beyond a later one); the warm steps are left out of the rates alone.

With `--without`, the whole deltaw takes every step, too, in turns in the same process (`beside_s`): what a technique
brings is a few percent, less than what one process of a shared machine differs from the next. The peak is then that of
the first step, before the second model is opened.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LOOPS = ("peft", "peft-compile", "deltaw")
TRAINERS = ("peft-trainer", "trl", "trl-free")
ARMS = (*LOOPS, *TRAINERS, "gemm")
PACKAGES = ("torch", "transformers", "peft", "trl", "deltaw")


class Gauge:
    """What the process has used: memory and time, read off /proc."""

    def __init__(self) -> None:
        self.rss_before = 0
        self.first_step_s = 0.0

    def before(self) -> None:
        """To be called before the first step."""
        self.rss_before = memory("VmRSS")

    def after(self) -> None:
        """To be called after the first step."""
        self.first_step_s = process_age()


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def process_age() -> float:
    """Seconds since the process was started."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def measure(arm: str, name: str, dtype: str, steps: int, warm: int, without: str | None, seed: int) -> dict[str, Any]:
    """Run the arm; its figures, plain values. ValueError on what doesn't go together."""
    import torch

    from benchmarks import workloads

    chosen, number = workloads.workload(name, warm + steps, seed), getattr(torch, dtype)
    figures: dict[str, Any] = {"arm": arm, "workload": name, "dtype": dtype, "without": without, "seed": seed}
    figures |= {"warm": warm, "tokens": [*map(workloads.tokens, chosen)]}
    figures |= {"supervised": [*map(workloads.supervised, chosen)]}
    if arm == "gemm":
        from benchmarks import gemm

        rates, share = gemm.measure(chosen[warm:], number, steps)
        figures |= {"gflops": statistics.median(rates) / 1e9, "path": "matrix products alone"}
        figures |= {"tokens_per_s": [rate / gemm.flops_per_token(share) for rate in rates]}
    else:
        with tempfile.TemporaryDirectory() as folder:
            figures |= _train(arm, Path(folder), number, chosen, without, seed)
        timed = zip(figures["tokens"][warm:], figures["seconds"][warm:], strict=True)
        figures["tokens_per_s"] = [count / seconds for count, seconds in timed]
        pairs = zip(figures["beside_s"][warm:], figures["seconds"][warm:], strict=False)
        figures["of_whole"] = [whole / seconds for whole, seconds in pairs]
    figures |= {"threads": torch.get_num_threads(), "python": platform.python_version()}
    return figures | {package: importlib.metadata.version(package) for package in PACKAGES}


def _train(arm: str, folder: Path, dtype: Any, steps: list[Any], without: str | None, seed: int) -> dict[str, Any]:
    from benchmarks import loops

    gauge, factors = Gauge(), loops.save_factors(folder, seed)
    seconds: list[float] = []
    losses: list[float] = []
    beside: list[float] = []
    peak = 0
    if arm in TRAINERS:
        from benchmarks import trainers

        clock = trainers.Clock(gauge.before, gauge.after)
        losses.append(trainers.train(arm, factors, dtype, steps, clock))
        seconds, path = clock.seconds, ("padding-free" if arm == "trl-free" else "padded batches") + ", sdpa"
    else:
        compiled = arm == "peft-compile"
        loop = (
            loops.deltaw_loop(factors, dtype, without=without)
            if arm == "deltaw"
            else loops.peft_loop(factors, dtype, compiled=compiled)
        )
        gauge.before()
        for step in steps:
            losses.append(_timed(loop.step, step, seconds))
            if len(seconds) == 1:
                gauge.after()
                if without:
                    peak, whole = memory("VmHWM"), loops.deltaw_loop(factors, dtype)
            if without:
                _timed(whole.step, step, beside)
        path = loop.path
    compile_s = seconds[0] - statistics.median(seconds[1:]) if arm == "peft-compile" and len(seconds) > 1 else 0.0
    peak = peak or memory("VmHWM")
    return {
        "seconds": seconds,
        "beside_s": beside,
        "losses": losses,
        "first_step_s": gauge.first_step_s,
        "compile_s": compile_s,
        "peak_bytes": peak,
        "grown_bytes": peak - gauge.rss_before,
        "path": path,
    }


def _timed(call: Callable[[Any], float], step: Any, seconds: list[float]) -> float:
    """What the call gives; how long it took is added to `seconds`."""
    began = time.perf_counter()
    given = call(step)
    seconds.append(time.perf_counter() - began)
    return given


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message on what doesn't go together."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arms", description="One arm on one workload.")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("workload", choices=("dense", "words", "chats", "long", "few"))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--warm", type=int, default=1, help="steps before them")
    parser.add_argument("--without", choices=("packing", "loss", "norm", "attention", "mlp"))
    parser.add_argument("--seed", type=int, default=0, help="of the data's order and the first factors")
    parser.add_argument("--json", action="store_true", help="the figures as JSON on the last line")
    asked = parser.parse_args(arguments)
    if asked.without and asked.arm != "deltaw":
        parser.error("--without takes a technique of deltaw's away: the arm must be deltaw")
    if asked.steps < 1 or asked.warm < 0:
        parser.error("--steps must be at least 1, --warm at least 0")
    if asked.arm in TRAINERS and asked.workload == "long":
        parser.error("a trainer takes steps of one number of rows; long has steps of several")
    if asked.arm == "peft-compile" and asked.workload != "dense":
        parser.error("torch.compile compiles again for every new shape, minutes each; only dense has a single one")
    return asked


def main() -> None:
    asked = parse()
    figures = measure(asked.arm, asked.workload, asked.dtype, asked.steps, asked.warm, asked.without, asked.seed)
    if asked.json:
        print(json.dumps(figures), flush=True)
    else:
        rate = statistics.median(figures["tokens_per_s"])
        print(f"{asked.arm} on {asked.workload}: {rate:.0f} tokens/s; {figures['path']}", file=sys.stderr)


if __name__ == "__main__":
    main()
