"""Eight learners in one sweep beside eight runs, one after the other: whole commands, and their steps alone.

    python -m benchmarks.sweep [--tokens 64 128 512] [--steps 25] [--learners 8] [--repeat 1] [--record]

The runs differ in their rate: SmolLM2-135M (builtin), rank 16 on all linear layers, pronunciations of some 17 tokens
each, so many tokens in each learner's step. Each run is evaluated on 100 held-out rows before and after; nothing is
answered and no report is written, which costs a run the same in either arm. Both arms are command lines in processes of
their own, in turns, so that a machine that others share slows both. Shown are seconds by the clock and of the
processors: where other programs run beside, only the latter say something.

The steps' times are those that the runs themselves keep (`seconds` in metrics.jsonl: forward, backward and update), so
what an adapter loses by rows that others take is in it. Losses of both arms are compared before anything is shown.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.figures import Measured, note

ROOT = Path(__file__).parents[1]
WHOLE, STEPS = {64: 2.5, 128: 2.0, 512: 1.4}, {64: 1.8, 128: 1.4, 512: 1.15}  # what is wanted, by tokens
RATES = [round(1e-4 * 1.4**n, 7) for n in range(64)]


@dataclass(frozen=True)
class Arm:
    """What an arm took: seconds by the clock, of processors, and of its steps; peak in bytes; losses by rate."""

    wall: float
    cpu: float
    steps: float
    peak: int
    losses: list[float]


def run_file(folder: Path, tokens: int, steps: int) -> Path:
    train = {"steps": steps, "lr": 1e-3, "tokens_per_step": tokens, "save_every": 1000}
    fields = {
        "base": "builtin:smollm2-135m",
        "data": {"train": "builtin:cmudict", "limit": 5000, "eval": 100},
        "train": train,
        "evaluate": {"samples": 0, "general": None, "report": False},
        "output": str(folder / "output"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def command(*words: str) -> tuple[float, float]:
    """Seconds by the clock and of processors, of one command line."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "deltaw", *words],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seen(folders: list[Path]) -> tuple[float, int, list[float]]:
    """Of finished runs: their steps' seconds, their largest peak, their last losses."""
    results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in folders]
    lines = [(folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for folder in folders]
    # The first step of a process compiles its products.
    seconds = sum(json.loads(one[-1])["seconds"] - json.loads(one[0])["seconds"] for one in lines)
    return seconds, max(r["peak_memory_bytes"] for r in results), [json.loads(one[-1])["loss"] for one in lines]


def sweep(folder: Path, run: Path, rates: list[float]) -> Arm:
    """All learners in one command."""
    output = folder / "sweep"
    wall, cpu = command("sweep", str(run), f"output={output}", "train.lr=" + ",".join(map(str, rates)))
    steps, peak, losses = seen([output / f"lr-{rate}" for rate in rates])
    return Arm(wall, cpu, steps, peak, losses)


def alone(folder: Path, run: Path, rates: list[float]) -> Arm:
    """A command for each."""
    times = [command("train", str(run), f"output={folder / f'alone-{rate}'}", f"train.lr={rate}") for rate in rates]
    steps, peak, losses = seen([folder / f"alone-{rate}" for rate in rates])
    return Arm(sum(wall for wall, _ in times), sum(cpu for _, cpu in times), steps, peak, losses)


def measured(tokens: int, steps: int, learners: int) -> tuple[Arm, Arm]:
    with tempfile.TemporaryDirectory() as made:
        folder, rates = Path(made), RATES[:learners]
        run = run_file(folder, tokens, steps)
        pair = sweep(folder, run, rates), alone(folder, run, rates)
    for one, other in zip(pair[0].losses, pair[1].losses, strict=True):
        assert abs(one - other) < 0.02 * max(1.0, other), (one, other)
    return pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=sorted(WHOLE))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--learners", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1, help="turns, of which the best of each arm is taken")
    parser.add_argument("--record", action="store_true", help="note the figures in benchmarks/figures.csv")
    options = parser.parse_args()
    for tokens in options.tokens:
        pairs = [measured(tokens, options.steps, options.learners) for _ in range(options.repeat)]
        one, other = (min((pair[side] for pair in pairs), key=lambda arm: arm.wall) for side in (0, 1))
        for name, arm in (("sweep", one), ("alone", other)):
            times = f"{arm.wall:6.1f} s, {arm.cpu:6.1f} s of processors, steps {arm.steps:6.1f} s"
            print(f"{tokens:4} tokens  {name}: {times}, {arm.peak / 2**30:.2f} GiB", flush=True)
        whole = f"whole commands {other.wall / one.wall:.2f} x ({other.cpu / one.cpu:.2f} of processors)"
        print(f"{tokens:4} tokens  {whole}, steps {other.steps / one.steps:.2f} x", flush=True)
        if options.record:
            name = f"{options.learners} learners at {tokens} tokens each"
            note(Measured("Sweeps", f"{name}, whole command", other.wall / one.wall, bound=WHOLE.get(tokens)))
            note(Measured("Sweeps", f"{name}, steps alone", other.steps / one.steps, bound=STEPS.get(tokens)))


if __name__ == "__main__":
    main()
