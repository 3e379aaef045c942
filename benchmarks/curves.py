"""Learning, not only the first step: deltaw's loss curve inside the band of PEFT's over three seeds.

    python -m benchmarks.curves [--steps 200]        (make bench-curves; some ten minutes; exits 1 on a curve outside)

A seed draws the first factors and the order of the data (7 words a step). PEFT runs with seeds 0, 1 and 2, deltaw with
the same three; losses are smoothed by a running mean over 20 steps. At every step deltaw's three curves must lie in

    [lowest PEFT curve − tol, highest PEFT curve + tol],    tol = the median width of that band over the run

that is, deltaw may differ from PEFT by as much as PEFT differs from itself. The distance to PEFT's curve of the same
seed is printed, too: it is the sharper figure, since data and factors are the same and only rounding differs.
All losses go to benchmarks/curves.csv.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaw.progress import Display

HERE = Path(__file__).parent
SEEDS, WINDOW = (0, 1, 2), 20
Curve = list[float]


@dataclass(frozen=True)
class Verdict:
    """`outside`: steps at which a curve left the band; `distance`: the largest to PEFT's of the same seed."""

    tolerance: float
    outside: int
    distance: float


def smooth(losses: Sequence[float], window: int = WINDOW) -> Curve:
    """The mean of the last `window` losses, at every step that has as many."""
    return [statistics.fmean(losses[end - window : end]) for end in range(window, len(losses) + 1)]


def judge(peft: Sequence[Sequence[float]], deltaw: Sequence[Sequence[float]]) -> Verdict:
    """Hold deltaw's curves to the band of PEFT's: raw losses, one curve a seed, seeds in the same order."""
    reference, ours = [smooth(curve) for curve in peft], [smooth(curve) for curve in deltaw]
    band = [(min(step), max(step)) for step in zip(*reference, strict=True)]
    tolerance = statistics.median(high - low for low, high in band)
    outside = sum(
        not low - tolerance <= value <= high + tolerance
        for curve in ours
        for value, (low, high) in zip(curve, band, strict=True)
    )
    pairs = zip(reference, ours, strict=True)
    distance = max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))
    return Verdict(tolerance, outside, distance)


def curve(arm: str, seed: int, steps: int, dtype: str) -> Curve:
    """The losses of one run, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.arms", arm, "few", "--warm", "0", "--steps", str(steps)]
    command += ["--seed", str(seed), "--dtype", dtype, "--json"]
    out = subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True).stdout
    losses: Curve = json.loads(out.splitlines()[-1])["losses"]
    return losses


def write(path: Path, curves: dict[tuple[str, int], Curve]) -> None:
    """A row a step, a column a run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["step", *(f"{arm} seed {seed}" for arm, seed in curves)])
        for step, losses in enumerate(zip(*curves.values(), strict=True), 1):
            table.writerow([step, *(f"{loss:.5f}" for loss in losses)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description="Loss curves against PEFT's.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="the one deltaw chooses here without it")
    parser.add_argument("--out", type=Path, default=HERE / "curves.csv")
    asked = parser.parse_args()
    if asked.steps < 2 * WINDOW:
        parser.error(f"--steps must be at least {2 * WINDOW}: the curves are means over {WINDOW}")
    from deltaw.base.load import fast_dtype

    dtype = asked.dtype or str(fast_dtype()).removeprefix("torch.")
    runs = [(arm, seed) for seed in SEEDS for arm in ("peft", "deltaw")]
    curves = {}
    with Display().task("loss curves", len(runs)) as update:
        for number, (arm, seed) in enumerate(runs):
            update(number, f"{arm}, seed {seed}")
            curves[arm, seed] = curve(arm, seed, asked.steps, dtype)
        update(len(runs))
    write(asked.out, curves)
    verdict = judge(*([curves[arm, seed] for seed in SEEDS] for arm in ("peft", "deltaw")))
    said = "inside the band" if not verdict.outside else f"OUTSIDE the band at {verdict.outside} points"
    band = f"of PEFT's three seeds ± {verdict.tolerance:.3f}"
    print(f"{asked.steps} steps, {dtype}: deltaw's three curves are {said} {band}")
    print(f"largest distance to PEFT's curve of the same seed: {verdict.distance:.4f} nats; {asked.out}")
    raise SystemExit(bool(verdict.outside))


if __name__ == "__main__":
    main()
