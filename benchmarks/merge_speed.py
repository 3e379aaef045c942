"""`deltaw merge` beside a copy of the same files: both end when the bytes are on the disk.

    python benchmarks/merge_speed.py RUN_OR_ADAPTER [--output FOLDER] [--rounds 7]

Copying is what the system does fastest, shutil.copyfile and an fsync of each file; merging is the plan applied, with
the figures of what survives. The plan itself (a skeleton of the model, headers) is timed apart: it doesn't grow with
the weights. In turns, so that a busy machine is busy for both; the median of the rounds' ratios is the figure.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from deltaw.files.atomic import fsync
from deltaw.shipping.merge.plan import MergePlan, plan_merge
from deltaw.shipping.merge.rewrite import rewrite
from deltaw.shipping.trained import open_trained


def seconds(write: Callable[[Path], object], folder: Path) -> float:
    """Of writing into an empty folder, the bytes on the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began = time.perf_counter()
    write(folder)
    for file in folder.iterdir():
        fsync(file)
    fsync(folder)
    taken = time.perf_counter() - began
    shutil.rmtree(folder)
    return taken


def copied(plan: MergePlan, folder: Path) -> None:
    for file in plan.by_file:
        shutil.copyfile(file, folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--output", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    trained = open_trained(given.adapter)
    began = time.perf_counter()
    plan = plan_merge(trained)
    planned = time.perf_counter() - began
    size = sum(file.stat().st_size for file in plan.by_file)
    print(f"{size / 1e6:,.0f} MB, planned in {planned:.2f} s, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    ratios = []
    with tempfile.TemporaryDirectory(dir=given.output) as scratch:
        folder = Path(scratch) / "merged"
        for _ in range(given.rounds):
            copy, merge = seconds(lambda to: copied(plan, to), folder), seconds(lambda to: rewrite(plan, to), folder)
            ratios.append(copy / merge)
            print(
                f"copy {copy:.3f} s, {size / copy / 1e6:,.0f} MB/s; merge {merge:.3f} s, {size / merge / 1e6:,.0f} MB/s"
            )
    print(f"merging has {statistics.median(ratios):.0%} of the speed of copying ({min(ratios):.0%}-{max(ratios):.0%})")


if __name__ == "__main__":
    main()
