"""What recomputed layers save and cost (base/recompute.py): the builtin with an adapter of rank 16, long batches.

    python -m benchmarks.checkpointing [--tokens 4096] [--length 512] [--passes 3] [--dtype bfloat16]

Each way is tried in a process of its own: `passes` forward and backward over documents of `length` random tokens, all
trained, and one before them that isn't timed. Printed are the peak of the process, what of it came after the base and
the adapter were there, tokens/s, and a hash of the gradient, which is the same for all ways on a CPU.
"""

import argparse
import hashlib
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.figures import Measured, note
from deltaw.adapter.attach import attach
from deltaw.base.batch import Batch
from deltaw.base.forward import plan_forward
from deltaw.base.load import open_base
from deltaw.base.recompute import Recompute, blocks_of
from deltaw.config import AdapterSpec
from deltaw.files.output import gib
from deltaw.show.progress import Display
from deltaw.training.memory import bound_caches, few_holes, held_memory, window

CPU = torch.device("cpu")


def measure(way: str, tokens: int, length: int, passes: int, dtype: str) -> str:
    """A line of figures."""
    bound_caches()
    base = open_base("builtin:smollm2-135m", dtype=dtype, device="cpu", display=Display(quiet=True))
    forward, attached = plan_forward(base.model), attach(base.model, AdapterSpec(rank=16, alpha=32))
    if way == "blocks":
        few_holes(CPU)
        Recompute(base.model, blocks_of(base.model, attached.paths), draws=False)
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(49152, (tokens,), generator=generator)
    batch = Batch.of(ids_T, [*range(0, tokens, length), tokens], ids_T.roll(-1))
    held, seconds = held_memory(CPU), list[float]()
    with window(CPU) as seen:
        for _ in range(1 + passes):
            for parameter in attached.parameters:
                parameter.grad = None
            began = time.perf_counter()
            forward.loss(batch)[0].backward()
            seconds.append(time.perf_counter() - began)
    gradient = b"".join(p.grad.numpy().tobytes() for p in attached.parameters if p.grad is not None)
    speed = tokens / statistics.median(seconds[1:])
    hashed = hashlib.sha256(gradient).hexdigest()[:12]
    return f"{way:8} {gib(seen.peak):>9} {gib(seen.peak - held):>9} {speed:8.0f} tokens/s   gradient {hashed}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--way", choices=("none", "blocks"))
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/performance.md")
    given = parser.parse_args()
    if given.way:
        print(measure(given.way, given.tokens, given.length, given.passes, given.dtype))
        return
    print(f"{given.tokens:,} tokens in documents of {given.length}, {given.dtype}, {torch.get_num_threads()} threads")
    lines = {}
    for way in ("none", "blocks"):
        command = [sys.executable, "-m", "benchmarks.checkpointing", *sys.argv[1:], "--way", way]
        lines[way] = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(lines[way], end="", flush=True)
    if given.record:
        (kept, slow), (again, fast) = ((float(line.split()[3]), float(line.split()[5])) for line in lines.values())
        what = f"layers recomputed, {given.tokens:,} tokens"
        section = "When it doesn't fit"
        note(Measured(section, f"{what}: memory beyond the base, of that with layers kept", again / kept))
        note(Measured(section, f"{what}: speed, of that with layers kept", fast / slow))


if __name__ == "__main__":
    main()
