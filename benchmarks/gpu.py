"""LoRA training on one GPU: deltaw, its peers and the bare matrix product, in one CSV.

    benchmarks/gpu.sh                                             all of it
    python -m benchmarks.gpu --arms deltaw,peft --models 1b --sizes 2048
    python -m benchmarks.gpu --device cpu --toy                   the same code on a tiny model

Models have the shapes of SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B and random weights, the same for every arm;
nothing is fetched. Text is the language reference that ships with Python, a token a word or sign and its id by
frequency, in documents at their real lengths up to 2048 (a longer one in pieces of random lengths), those of like
length together, as transformers' `group_by_length` does (gpu_models.py). `8b-4k` is 8B on documents of exactly 4,096,
for deltaw alone: what others publish is measured on packed sequences of that length.
Batches have exactly so many real tokens; padding is never counted. Rank 16 on all linear layers, float32 factors, no
checkpointing, clip at 1, AdamW (fused).

Arms (gpu_arms.py), each in processes of its own, one for the smaller models and one for 8B:

    gemm              8192³ in bf16: the rate that the shares are of; and a model's own products, back to back
    deltaw            packed documents; passes, clip and update recorded and replayed, as `deltaw train` does; a step
                      waits for the device once. `profile` beside each size says what three of its steps are made of
    unsloth           its own loader and trainer-free loop
    peft-liger        peft with Liger's kernels, its fused head and loss among them
    peft              right padding and no mask (causal attention needs none), SDPA, autocast, input casting off
    deltaw-uncaptured deltaw's passes, each operation launched by itself
    peft-bf16         factors in bf16 and no autocast: less exact, and PEFT's fastest; only where it is asked for

Correctness first (gpu_gate.py): an arm's loss at step 0 must be within 1e-3 of a float32 run of plain autograd over
single documents, and its dA and dB must have a cosine above 0.999 with that run's, at the 135M shape. An arm that fails
is not timed. Its loss on the first batch of each size is in its row, too, and marked where it differs from the first
arm's. What cannot run has a row that says why. A share is tokens/s · 4 (N_blocks + N_head) / rate.
"""

import argparse
import csv
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu_gate import LOSS_GATE, gate_batch, save_truth
from benchmarks.gpu_models import SHAPES, TOY, Effort, Row, flops_per_token
from benchmarks.gpu_timed import run_arm, run_gemm

ROOT = str(Path(__file__).parents[1])
BUDGET = 220  # seconds for everything
LEAST = 20  # seconds that must be left to start a process
LONGEST_RUN = 150  # seconds that a process may take
GATED = "135m"

NEEDS = {  # arm: the package without which it is skipped
    "deltaw": "deltaw",
    "unsloth": "unsloth",
    "peft-liger": "liger_kernel",
    "peft": "peft",
    "deltaw-uncaptured": "deltaw",
    "peft-bf16": "peft",
}  # in the order in which they run, should time run out
USUAL = tuple(arm for arm in NEEDS if arm != "peft-bf16")
LARGE = ("8b", "8b-4k")
ALONE = {"8b-4k": ("deltaw",)}  # shapes for these arms only
COLUMNS = ("date", "gpu", "torch", "cuda", "arm", "model", "tokens", "tokens_per_s", "share_of_gemm")
COLUMNS += ("allocated_gib", "reserved_gib", "note")


def child(options: argparse.Namespace) -> Iterator[Row]:
    effort, shapes = _effort(options), options.models
    if options.arm == "gemm":
        yield from run_gemm([shape for shape in shapes if shape not in ALONE], effort, options.device)
        gated = _gated(options)
        save_truth(gated, gate_batch(gated, options.device), options.device, options.truth)
        yield {"arm": "truth", "passed": True}
        return
    gated = [_gated(options)] if options.truth else []
    for shape in dict.fromkeys([*gated, *shapes]):
        some = effort if shape in shapes else replace(effort, sizes=())  # its gate alone: it wasn't asked for
        for row in run_arm(options.arm, shape, some, options.device, options.truth if shape in gated else None):
            yield row
            if not row.get("passed", True) and "tokens" not in row and shape in gated:
                return


def _gated(options: argparse.Namespace) -> str:
    return "toy" if options.toy else GATED


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
    end = time.monotonic() + options.budget
    common = ["--device", options.device, *(["--toy"] if options.toy else [])]
    common += ["--sizes", ",".join(map(str, _effort(options).sizes))]

    def started(*arguments: str) -> tuple[list[Row], str]:
        left = end - time.monotonic()
        if left < min(LEAST, options.budget):
            return [], "skip: out of time"
        return run([*arguments, *common], min(left, LONGEST_RUN))

    with tempfile.TemporaryDirectory() as folder:
        truth = str(Path(folder) / "truth.safetensors")
        rows, problem = started("--arm", "gemm", "--models", ",".join(options.models), "--truth", truth)
        rate = next((row["rate"] for row in rows if "rate" in row), None)
        for row in rows:
            if row.get("arm") != "truth":
                write({"arm": "gemm", **row, "share": _share(row, rate)})
        if not any(row.get("arm") == "truth" for row in rows):
            write({"arm": "truth", "model": _gated(options), "note": problem or "error: nothing came back"})
            return
        passed: dict[str, bool] = {}
        losses: dict[tuple[str, int], tuple[str, float]] = {}
        for arm, shapes in in_order(options.arms, options.models):
            if importlib.util.find_spec(NEEDS[arm]) is None:
                for shape in shapes:
                    write({"arm": arm, "model": shape, "note": f"skip: {NEEDS[arm]} is not installed"})
                continue
            if not passed.get(arm, True):
                for shape in shapes:
                    write({"arm": arm, "model": shape, "note": "skip: its gate was not passed"})
                continue
            proof = [] if arm in passed else ["--truth", truth]
            rows, problem = started("--arm", arm, "--models", ",".join(shapes), *proof)
            for row in rows:
                if proof and "tokens" not in row:
                    passed.setdefault(arm, bool(row.get("passed")))
                write({**_compared(row, losses), "share": _share(row, rate)})
            if problem:
                write({"arm": arm, "model": shapes[0], "note": problem})


def in_order(arms: Sequence[str], shapes: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(an arm, the models of one process), what matters most first: the large models of other arms come last."""
    large = [shape for shape in shapes if shape in LARGE]
    groups = [[shape for shape in shapes if shape not in LARGE], large]
    ours = [(arm, group) for arm in arms for group in groups if arm == "deltaw"]
    for arm, group in ours + [(arm, group) for group in groups for arm in arms if arm != "deltaw"]:
        if some := [shape for shape in group if arm in ALONE.get(shape, (arm,))]:
            yield arm, some


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
    return effort if options.sizes is None else replace(effort, sizes=options.sizes)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    def names(text: str) -> tuple[str, ...]:
        return tuple(filter(None, text.split(",")))

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arms", type=names, default=USUAL, help=f"of {', '.join(NEEDS)}")
    parser.add_argument("--models", type=names, help=f"of {', '.join(SHAPES)}; all but toy")
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, names(text))), help="real tokens of a batch")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--toy", action="store_true", help="a tiny model: tests this script, measures nothing")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # in this process, rows to stdout
    parser.add_argument("--truth", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.models = options.models or (("toy",) if options.toy else ("135m", "1b", *LARGE))
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
            head = f"{row['arm']:17} {row.get('model', ''):7} {row.get('tokens', ''):>6}"
            print(f"{head}  {speed}{memory}{'  ' if speed else ''}{row.get('note', '')}", flush=True)
            print(*(f"    {line}\n" for line in row.get("kernels", ())), sep="", end="", flush=True)

        run_all(options, write, run)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
