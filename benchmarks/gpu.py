"""LoRA training on one GPU: deltaw, its peers and the bare matrix product, in one CSV.

    benchmarks/gpu.sh                                             all of it, at most nine minutes
    python -m benchmarks.gpu --arms deltaw,peft --models 1b --sizes 2048
    python -m benchmarks.gpu --device cpu --toy                   the same code on a tiny model

Models have the shapes of SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B and random weights, the same for every arm;
nothing is fetched. Text is the language reference that ships with Python, a token a word or sign and its id by
frequency, in documents at their real lengths up to 2048 (a longer one in pieces of random lengths), those of like
length together, as transformers' `group_by_length` does (gpu_models.py).
Batches have exactly so many real tokens; padding is never counted. Rank 16 on all linear layers, float32 factors, no
checkpointing, clip at 1, AdamW (fused).

Arms (gpu_arms.py), each in a process of its own:

    gemm            8192³ in bf16: the rate that the shares are of; and a model's own products, back to back
    deltaw          packed documents
    deltaw-graph    its body (not head, loss and optimiser) replayed as CUDA graphs; one set of document lengths
    deltaw-compile  its decoder layers under torch.compile
    peft            right padding and no mask (causal attention needs none), SDPA, autocast, input casting off
    peft-bf16       factors in bf16 and no autocast: less exact, and PEFT's fastest
    peft-liger      peft with Liger's kernels, its fused head and loss among them
    unsloth         its own loader and trainer-free loop

Correctness first (gpu_gate.py): an arm's loss at step 0 must be within 1e-3 of a float32 run of plain autograd over
single documents, and its dA and dB must have a cosine above 0.999 with that run's, at the 135M shape. An arm that fails
is not timed. Its loss on the first batch of each size is in its row, too, and marked where it differs from the first
arm's. What cannot run has a row that says why. A share is tokens/s · 4 (N_blocks + N_head) / rate.
"""

import argparse
import csv
import datetime
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.gpu_gate import LOSS_GATE, gate_batch, save_truth
from benchmarks.gpu_models import SHAPES, TOY, Effort, Row, flops_per_token
from benchmarks.gpu_timed import run_arm, run_gemm

ROOT = str(Path(__file__).parents[1])
BUDGET = 530  # seconds for everything
LEAST = 20  # seconds that must be left to start a process
LONGEST_RUN = 150  # seconds that a process may take

NEEDS = {  # arm: the package without which it is skipped
    "deltaw": "deltaw",
    "peft": "peft",
    "unsloth": "unsloth",
    "peft-liger": "liger_kernel",
    "deltaw-graph": "deltaw",
    "peft-bf16": "peft",
    "deltaw-compile": "deltaw",
}  # in the order in which they run, should time run out
SMALL = {"deltaw-graph": ("135m", "toy"), "deltaw-compile": ("135m", "1b", "toy")}  # arms for these models only
COLUMNS = ("date", "gpu", "torch", "cuda", "arm", "model", "tokens", "tokens_per_s", "share_of_gemm")
COLUMNS += ("allocated_gib", "reserved_gib", "note")


def child(options: argparse.Namespace) -> Iterator[Row]:
    effort = _effort(options)
    if options.arm == "gemm":
        yield from run_gemm(options.models, effort, options.device)
    elif options.arm == "truth":
        shape = options.models[0]
        save_truth(shape, gate_batch(shape, options.device), options.device, options.truth)
        yield {"passed": True}
    else:
        yield from run_arm(options.arm, options.models[0], effort, options.device, options.truth)


# The whole


Spawn = Callable[[list[str], float], tuple[list[Row], str]]


def spawn(arguments: list[str], seconds: float) -> tuple[list[Row], str]:
    """(the rows a process printed, why it ended early or "")."""
    command, known = [sys.executable, __file__, *arguments], os.environ.get("PYTHONPATH", "")
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, known]))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=paths)
        out, problem = done.stdout, ""
        if done.returncode:
            said = done.stderr.strip().splitlines()
            problem = f"error: {said[-1] if said else f'exit status {done.returncode}'}"[:300]
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        problem = f"stopped after {seconds:.0f} s"
    return [json.loads(line[4:]) for line in out.splitlines() if line.startswith("ROW ")], problem


def run_all(options: argparse.Namespace, write: Callable[[Row], None], run: Spawn = spawn) -> None:
    """Every arm on every model, as long as time lasts; `write` gets each row at once."""
    end, gated = time.monotonic() + options.budget, "toy" if options.toy else "135m"
    common = ["--device", options.device, *(["--toy"] if options.toy else [])]
    sizes = ["--sizes", ",".join(map(str, _effort(options).sizes))]

    def started(*arguments: str) -> tuple[list[Row], str]:
        left = end - time.monotonic()
        if left < min(LEAST, options.budget):
            return [], "skip: out of time"
        return run([*arguments, *common], min(left, LONGEST_RUN))

    rate = None
    rows, problem = started("--arm", "gemm", "--models", ",".join(options.models), *sizes)
    for row in rows:
        rate = row.get("rate", rate)
        write({"arm": "gemm", **row, "share": _share(row, rate)})
    if problem:
        write({"arm": "gemm", "note": problem})
    with tempfile.TemporaryDirectory() as folder:
        truth = str(Path(folder) / "truth.safetensors")
        rows, problem = started("--arm", "truth", "--models", gated, "--truth", truth, *sizes)
        if problem or not rows:
            write({"arm": "truth", "model": gated, "note": problem or "error: nothing came back"})
            return
        passed: dict[str, bool] = {}
        losses: dict[tuple[str, int], tuple[str, float]] = {}
        shapes = [gated, *(shape for shape in options.models if shape != gated)]
        for arm, shape in itertools.product(options.arms, shapes):
            where = {"arm": arm, "model": shape}
            if importlib.util.find_spec(NEEDS[arm]) is None:
                if shape in options.models:
                    write({**where, "note": f"skip: {NEEDS[arm]} is not installed"})
                continue
            if shape not in SMALL.get(arm, (shape,)):
                continue
            if shape != gated and not passed.get(arm):
                write({**where, "note": "skip: its gate was not passed"})
                continue
            timed = sizes if shape in options.models else ["--sizes", ""]
            proof = ["--truth", truth] if shape == gated else []
            rows, problem = started("--arm", arm, "--models", shape, *timed, *proof)
            for row in rows:
                if proof and "tokens" not in row:
                    passed[arm] = bool(row.get("passed"))
                write({**_compared(row, losses), "share": _share(row, rate)})
            if problem:
                write({**where, "note": problem})


def _compared(row: Row, losses: dict[tuple[str, int], tuple[str, float]]) -> Row:
    """The row, its note in front of all else saying so if its first loss is not the first arm's on that batch."""
    if "first_loss" not in row:
        return row
    arm, wanted = losses.setdefault((row["model"], row["tokens"]), (row["arm"], row["first_loss"]))
    if abs(row["first_loss"] - wanted) <= LOSS_GATE:
        return row
    return {**row, "note": f"LOSS DIFFERS from {arm}'s {wanted:.5f}: {row['note']}"}


def _share(row: Row, rate: float | None) -> float | None:
    if not rate or "tokens_per_s" not in row:
        return None
    return row["tokens_per_s"] * flops_per_token(row["model"]) / rate


def _effort(options: argparse.Namespace) -> Effort:
    effort = TOY if options.toy else Effort()
    sizes = effort.sizes if options.sizes is None else options.sizes
    return Effort(sizes, effort.warm, effort.steps, effort.seconds, effort.square)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    def names(text: str) -> tuple[str, ...]:
        return tuple(filter(None, text.split(",")))

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arms", type=names, default=tuple(NEEDS), help=f"of {', '.join(NEEDS)}")
    parser.add_argument("--models", type=names, help=f"of {', '.join(SHAPES)}; all but toy")
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, names(text))), help="real tokens of a batch")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--toy", action="store_true", help="a tiny model: tests this script, measures nothing")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # in this process, rows to stdout
    parser.add_argument("--truth", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.models = options.models or (("toy",) if options.toy else ("135m", "1b", "8b"))
    unknown = sorted({*options.arms} - {*NEEDS}) + sorted({*options.models} - {*SHAPES})
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    return options


def conditions(device: str) -> Row:
    """The columns that say when and on what: the same in every row of a run."""
    cuda = device == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name() if cuda else f"none ({platform.machine()})",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else "",
    }


def main(arguments: Sequence[str] | None = None, run: Spawn = spawn) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured (--device cpu --toy tests the script)", file=sys.stderr)
        return 2
    if options.arm:
        for row in child(options):
            print("ROW " + json.dumps(row), flush=True)
        return 0
    fixed = conditions(options.device)
    path = Path(os.environ.get("OUT") or Path(__file__).parent) / "gpu.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        table.writeheader()

        def write(row: Row) -> None:
            share, rate = row.get("share"), row.get("tokens_per_s")
            shown = {"share_of_gemm": "" if share is None else f"{share:.4f}"}
            shown["tokens_per_s"] = "" if rate is None else f"{rate:.1f}"
            table.writerow({**row, **fixed, **shown})
            file.flush()
            speed = "" if rate is None else f"{rate:,.0f} tokens/s" + (f", {share:.1%} of the rate" if share else "")
            memory = f", {row['allocated_gib']} GiB" if "allocated_gib" in row else ""
            head = f"{row['arm']:14} {row.get('model', ''):7} {row.get('tokens', ''):>6}"
            print(f"{head}  {speed}{memory}{'  ' if speed else ''}{row.get('note', '')}", flush=True)

        run_all(options, write, run)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
