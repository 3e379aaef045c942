"""The demo on packed bases: what the held-out loss becomes beside the dense base's.

    python -m benchmarks.packed_demo [--weights keep nf4 int8] [--out runs]

Each is `deltaw train recipes/demo.yaml` with `base_weights`, five to six minutes on two cores; a finished run that
stands in `--out` already isn't repeated. A ratio above 1 is worse than the dense base.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.figures import Measured, note

DENSE, WANTED = "auto", 1.01


def loss_of(weights: str, folder: Path) -> float:
    """Held-out loss in nats after the demo on a base of these weights."""
    if not (folder / "result.json").exists():
        own = [] if weights == DENSE else [f"base_weights={weights}"]
        command = [sys.executable, "-m", "deltaw", "train", "recipes/demo.yaml", f"output={folder}", *own]
        subprocess.run([*command, "train.dtype=float32"], check=True)
    loss: float = json.loads((folder / "result.json").read_text())["eval"]["after"]["loss"]
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["keep", "nf4", "int8"])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/performance.md")
    asked = parser.parse_args()
    dense = loss_of(DENSE, asked.out / "demo")
    print(f"dense     {dense:.4f} nats")
    for weights in asked.weights:
        loss = loss_of(weights, asked.out / f"demo-{weights}")
        print(f"{weights:9} {loss:.4f} nats, {loss / dense:.4f} of dense", flush=True)
        if asked.record:
            name = f"held-out loss after the demo under {weights}, of the dense base's"
            command = "python -m benchmarks.packed_demo"
            note(Measured("When it doesn't fit", name, loss / dense, bound=WANTED, at_most=True, command=command))


if __name__ == "__main__":
    main()
