"""`deltaw inspect` on an adapter of Llama 3.1 8B's shape, rank 16 on its 224 linear layers, without its base.

    python -m benchmarks.inspected [--record]

The factors are random: the work depends on their shapes alone. Timed is the whole command, from the process's start to
its end: reading the adapter, the SVD of every module from its factors, the page. `--record` notes the figures.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.figures import Measured, note
from benchmarks.scale import RANK, SHAPES
from deltaw.adapter.file import Adapter, BaseId
from deltaw.config import AdapterSpec
from deltaw.factors import LowRank
from deltaw.updates import Update

SECTION, MOST = "Looking at an adapter", 10.0
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip


def adapter_of(shape_name: str) -> Adapter:
    """Random factors for all linear layers of that shape."""
    shape, spec = next(shape for shape in SHAPES if shape.name == shape_name), AdapterSpec(rank=RANK)
    factors: dict[str, Update] = {}
    for layer in range(shape.layers):
        for name, (n, m) in zip(NAMES, shape.linears, strict=True):
            path = f"model.layers.{layer}.{name}"
            a_RN, b_MR = torch.randn(RANK, n) / n**0.5, 0.01 * torch.randn(m, RANK)
            factors[path] = LowRank(a_RN, b_MR, spec.scale(path))
    return Adapter(spec, factors, BaseId(f"random/{shape_name}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="note the figures")
    given = parser.parse_args()
    adapter = adapter_of("8B")
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "adapter")
        began = time.monotonic()
        command = [sys.executable, "-m", "deltaw", "inspect", f"{folder}/adapter"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, computing = used.ru_maxrss * 1024 / 1e9, used.ru_utime + used.ru_stime
    print(f"{len(adapter.factors)} modules, {adapter.parameters:,} parameters, load {os.getloadavg()[0]:.1f}")
    print(f"{seconds:.1f} s, of which the CPU computed {computing:.1f} s; at most {peak:.2f} GB")
    if given.record:
        what = f"an 8B adapter of {len(adapter.factors)} modules, without its base"
        note(Measured(SECTION, what, seconds, "s", MOST, at_most=True))
        note(Measured(SECTION, f"{what}: peak", peak, "GB"))


if __name__ == "__main__":
    main()
