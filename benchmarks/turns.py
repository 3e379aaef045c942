"""Training steps by two trees in turns: how many times as long this one takes.

    python benchmarks/turns.py --old ../before [--workloads dense words chats train] [--steps 10]

Each side is a process of its own, which opens the builtin with the same factors and takes the next step when it is told
to, one after the other, so that a machine that others share slows both. The first losses are compared, too. `train` is
25 steps of the demo by `deltaw.train` itself, loader, watchdog and log included, a process after the other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]
SIDE = """
import json, sys, time
from pathlib import Path
from benchmarks import loops, workloads
from deltaw.base.dtype import fast_dtype
name, factors, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
chosen, loop = workloads.workload(name, steps), loops.deltaw_loop(factors, fast_dtype())
print("ready", flush=True)
for step, _ in zip(chosen, sys.stdin):
    began = time.perf_counter()
    loss = loop.step(step)
    print(json.dumps([time.perf_counter() - began, loss]), flush=True)
"""

TRAIN = """
import json, sys
from pathlib import Path
import deltaw
settings = [f"output={sys.argv[1]}", "data.limit=3000", "data.eval=null", "train.steps=25", "train.sample_every=null",
            "train.eval_every=null", "evaluate.metrics=[]", "evaluate.general=null", "evaluate.report=false"]
deltaw.train(deltaw.load_config("recipes/demo.yaml", settings))
records = [json.loads(line) for line in (Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()]
first, last = records[4], records[-1]
print((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))
"""


def trained(tree: Path, output: Path) -> float:
    """Seconds per step of a short run by a tree."""
    command = [sys.executable, "-c", TRAIN, str(output)]
    done = subprocess.run(command, cwd=tree, env=environment(tree), stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def environment(tree: Path) -> dict[str, str]:
    """What makes a process run a tree's code."""
    return {**os.environ, "PYTHONPATH": str(tree)}


def side(tree: Path, workload: str, factors: Path, steps: int) -> "subprocess.Popen[str]":
    """A tree's process, ready to take steps."""
    process = subprocess.Popen(
        [sys.executable, "-c", SIDE, workload, str(factors), str(steps)],
        cwd=tree,
        env=environment(tree),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def step(process: "subprocess.Popen[str]") -> tuple[float, float]:
    """(seconds, loss) of its next step."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    seconds, loss = json.loads(process.stdout.readline())
    return seconds, loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps by two trees in turns.")
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the tree to compare with")
    parser.add_argument("--workloads", nargs="+", default=["dense", "words", "chats", "train"])
    parser.add_argument("--steps", type=int, default=10, help="of each side; the first two aren't counted")
    asked = parser.parse_args()
    from benchmarks.loops import save_factors

    with tempfile.TemporaryDirectory() as folder:
        factors = save_factors(Path(folder) / "factors")
        for workload in asked.workloads:
            if workload == "train":
                trees = [tree.resolve() for tree in (asked.old, HERE)]
                turns = [[trained(tree, Path(folder) / f"{n}-{at}") for at, tree in enumerate(trees)] for n in range(2)]
                for old, new in turns:
                    print(f"train: old {old:.2f} s per step, new {new:.2f} s, new/old {new / old:.3f}")
                continue
            sides = [side(tree.resolve(), workload, factors, asked.steps) for tree in (asked.old, HERE)]
            pairs = [[step(process) for process in sides] for _ in range(asked.steps)]
            for process in sides:
                process.communicate()
            ratios = [new[0] / old[0] for old, new in pairs[2:]]
            low, middle, high = statistics.quantiles(ratios, n=4)
            old, new = (statistics.median(pair[n][0] for pair in pairs[2:]) for n in (0, 1))
            losses = f"first loss {pairs[0][0][1]:.6f} and {pairs[0][1][1]:.6f}"
            print(
                f"{workload}: old {old:.2f} s, new {new:.2f} s, new/old {middle:.3f} ({low:.3f}-{high:.3f}); {losses}"
            )


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
