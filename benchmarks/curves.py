"""Learning, not only the first step: deltaw's loss curve inside the band of PEFT's over three seeds.

    python -m benchmarks.curves [--steps 200]        (make bench-curves; some ten minutes; exits 1 on curves outside)
    python -m benchmarks.curves --read curves.csv    judge curves that are there

A seed draws the first factors and the order of the data (7 words per step). PEFT runs with seeds 0, 1 and 2, deltaw
with the same three; losses are smoothed by a running mean over 20 steps. At every step deltaw's three curves must lie
in
    [lowest PEFT curve − tol, highest PEFT curve + tol],    tol = the median width of that band over the run

that is, deltaw may differ from PEFT by as much as PEFT differs from itself. Three curves make a poor band: a fourth
seed of PEFT's would leave it, too. So the points outside are held to how often PEFT's own curves are outside, each
against the band of the other two, made in the same way. The distance to PEFT's curve of the same seed is printed, too:
the sharper figure, since data and factors are the same and only rounding differs.
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

from deltaw.show.progress import Display

HERE = Path(__file__).parent
SEEDS, WINDOW = (0, 1, 2), 20
Curve = list[float]


@dataclass(frozen=True)
class Verdict:
    """Steps at which a curve of deltaw's left the band, and how many of PEFT's own leave that of its other seeds;
    `distance`: the largest to PEFT's curve of the same seed."""

    tolerance: float
    outside: int
    own: int
    points: int
    distance: float

    @property
    def inside(self) -> bool:
        return self.outside <= self.own


def smooth(losses: Sequence[float], window: int = WINDOW) -> Curve:
    """The mean of the last `window` losses, at every step that has as many."""
    return [statistics.fmean(losses[end - window : end]) for end in range(window, len(losses) + 1)]


def leaving(band_of: Sequence[Curve], curves: Sequence[Curve]) -> tuple[int, float]:
    """(points of `curves` outside the band of `band_of`, the band's tolerance)."""
    band = [(min(step), max(step)) for step in zip(*band_of, strict=True)]
    tolerance = statistics.median(high - low for low, high in band)
    points = ((value, *edges) for curve in curves for value, edges in zip(curve, band, strict=True))
    return sum(not low - tolerance <= value <= high + tolerance for value, low, high in points), tolerance


def judge(peft: Sequence[Sequence[float]], deltaw: Sequence[Sequence[float]]) -> Verdict:
    """Hold deltaw's curves to the band of PEFT's: raw losses, one curve per seed, seeds in the same order."""
    reference, ours = [smooth(curve) for curve in peft], [smooth(curve) for curve in deltaw]
    outside, tolerance = leaving(reference, ours)
    own = sum(leaving([*reference[:n], *reference[n + 1 :]], [curve])[0] for n, curve in enumerate(reference))
    pairs = zip(reference, ours, strict=True)
    distance = max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))
    return Verdict(tolerance, outside, own, sum(map(len, ours)), distance)


def curve(arm: str, seed: int, steps: int, dtype: str) -> Curve:
    """The losses of one run, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.arms", arm, "few", "--warm", "0", "--steps", str(steps)]
    command += ["--seed", str(seed), "--dtype", dtype, "--json"]
    out = subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True).stdout
    losses: Curve = json.loads(out.splitlines()[-1])["losses"]
    return losses


def write(path: Path, curves: dict[tuple[str, int], Curve]) -> None:
    """One row per step, one column per run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["step", *(f"{arm} seed {seed}" for arm, seed in curves)])
        for step, losses in enumerate(zip(*curves.values(), strict=True), 1):
            table.writerow([step, *(f"{loss:.5f}" for loss in losses)])


def read(path: Path) -> dict[tuple[str, int], Curve]:
    """What `write` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    arms = {(arm, seed): f"{arm} seed {seed}" for seed in SEEDS for arm in ("peft", "deltaw")}
    return {key: [float(row[name]) for row in rows] for key, name in arms.items()}


def make(steps: int, dtype: str | None) -> dict[tuple[str, int], Curve]:
    """All six curves, one process at a time."""
    from deltaw.base.dtype import fast_dtype

    dtype = dtype or str(fast_dtype()).removeprefix("torch.")
    runs = [(arm, seed) for seed in SEEDS for arm in ("peft", "deltaw")]
    curves = {}
    with Display().task("loss curves", len(runs)) as progress:
        for number, (arm, seed) in enumerate(runs):
            progress(number, f"{arm}, seed {seed}")
            curves[arm, seed] = curve(arm, seed, steps, dtype)
        progress(len(runs))
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description="Loss curves against PEFT's.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="the one deltaw chooses here without it")
    parser.add_argument("--out", type=Path, default=HERE / "curves.csv")
    parser.add_argument("--read", type=Path, help="judge the curves of this file instead of making them")
    asked = parser.parse_args()
    if asked.steps < 2 * WINDOW:
        parser.error(f"--steps must be at least {2 * WINDOW}: the curves are means over {WINDOW}")
    curves = read(asked.read) if asked.read else make(asked.steps, asked.dtype)
    if not asked.read:
        write(asked.out, curves)
    verdict = judge(*([curves[arm, seed] for seed in SEEDS] for arm in ("peft", "deltaw")))
    left = f"{verdict.outside} of {verdict.points} points"
    said = f"outside the band of PEFT's three seeds ± {verdict.tolerance:.3f} at {left}"
    steps = len(curves["peft", 0])
    print(f"{steps} steps: deltaw's three curves are {said}; PEFT's own, each against its others, at {verdict.own}")
    print(f"largest distance to PEFT's curve of the same seed: {verdict.distance:.4f} nats; {asked.read or asked.out}")
    raise SystemExit(not verdict.inside)


if __name__ == "__main__":
    main()
