"""Decoding on one GPU: steps recorded and replayed (generate/captured.py), and each operation launched by itself.

    PARTS=decode benchmarks/gpu.sh
    python benchmarks/gpu_decode.py --models 135m --new 64
    python benchmarks/gpu_decode.py --device cpu --toy         the same code on a tiny model, which measures nothing

Models of gpu.py's shapes with random weights and an adapter of rank 16 on all linear layers; 1 row, 16 rows, and 16
rows of 16 adapters, greedy, from prompts of 64 tokens. Rows of the table (arm, model, rows in the column of tokens, new
tokens per second):

    decode             recorded: the second time that the engine decodes these rows. The note says what the first took,
                       recordings included, and how many rows get the tokens that they get unrecorded
    decode-uncaptured  not recorded

A GPU's roundings depend on how many places are read together, so two tokens that nearly tie may change places, and all
that follow with them; with random weights many nearly tie.
"""

import argparse
import csv
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import COLUMNS, conditions
from benchmarks.gpu_models import SHAPES, build_model, free_memory
from deltaw.adapter.attach import attach
from deltaw.base.forward import plan_forward
from deltaw.config import AdapterSpec
from deltaw.generate import engine as engines
from deltaw.generate.engine import Engine
from deltaw.generate.sampling import Sampling

Row = dict[str, Any]
PROMPT, ADAPTERS = 64, 16
CASES = ((1, 1), (16, 1), (16, 16))  # rows, adapters


@torch.no_grad()
def put_on(model: nn.Module, seed: int) -> int:
    """One more adapter that matters; its number."""
    attached = attach(model, AdapterSpec(rank=16, targets="all-linear"))
    generator = torch.Generator(attached.parameters[0].device).manual_seed(seed)
    for parameter in attached.parameters:
        parameter.normal_(std=0.02, generator=generator)
    return attached.number


def again(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """What stands for a recording where there is no GPU: the work itself."""
    place = work().clone()
    return lambda: place.copy_(work()), place


def decoded(engine: Engine, prompts: Sequence[list[int]], updates: Sequence[int], new: int) -> tuple[Any, float]:
    """The rows' tokens, and the seconds from their first tokens to their last."""
    sampling = Sampling(max_new_tokens=new)
    ids = [engine.add(prompt, sampling, update=update) for prompt, update in zip(prompts, updates, strict=True)]
    got: dict[int, list[int]] = {id: [] for id in ids}
    began = 0.0
    while engine.busy:
        for event in engine.step():
            if event.token is not None:
                got[event.id].append(event.token)
        began = began or time.perf_counter()
    return [got[id] for id in ids], time.perf_counter() - began


def compared(model: nn.Module, rows: int, updates: Sequence[int], new: int) -> Iterator[tuple[str, Row]]:
    """(arm, row) of both arms for so many rows, which take the updates in turn."""
    device, size = next(model.parameters()).device, model.config.vocab_size  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(rows)
    prompts = torch.randint(3, size, (rows, PROMPT), generator=generator).tolist()
    taken = [updates[row % len(updates)] for row in range(rows)]
    counted, tokens = rows * (new - 1), {}
    recorder_on = engines.recorder_on
    for arm in ("decode-uncaptured", "decode"):
        free_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        captured = arm == "decode"
        setattr(engines, "recorder_on", recorder_on if captured else lambda device: None)  # noqa: B010
        try:
            engine = Engine(model, batch_size=rows, record=again if captured and device.type == "cpu" else None)
        finally:
            setattr(engines, "recorder_on", recorder_on)  # noqa: B010
        assert engine._slots is not None, "its rows aren't in slots"
        first, first_seconds = decoded(engine, prompts, taken, new)
        tokens[arm], seconds = decoded(engine, prompts, taken, new)
        note = f"{len(updates)} adapter{'s' * (len(updates) > 1)}, {1000 * seconds / (new - 1):.2f} ms per step"
        note += f"; {counted / first_seconds:.0f} tokens/s the first time"
        if captured:
            steps, other = engine._slots.captured, tokens["decode-uncaptured"]
            note += f"; {len(steps.graphs) if steps else 0} recorded"
            note += f"; NOT CAPTURED: {steps.why_not}" if steps and steps.why_not else ""
            same = sum(mine == its for mine, its in zip(tokens[arm], other, strict=True))
            begun = sum(map(_common, tokens[arm], other))
            note += f"; {same} of {rows} rows agree, {begun / (rows * new):.0%} of tokens before the first that doesn't"
        note += "" if first == tokens[arm] else "; NOT THE SAME the second time"
        row: Row = {"tokens": rows, "tokens_per_s": counted / seconds, "note": note}
        if device.type == "cuda":
            row["allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
            row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        engine.close()
        del engine
        yield arm, row


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many equal tokens they begin."""
    return next((at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


def rows_of(shape: str, new: int, device: str, left: Callable[[], float]) -> Iterator[tuple[str, Row]]:
    """(arm, row) of everything about one shape, as long as time is left."""
    model = build_model(shape, device).eval()
    plan_forward(model)
    updates = [put_on(model, 0)]
    for rows, adapters in CASES:
        if left() < (15 if adapters > 1 else 5):
            yield "decode", {"tokens": rows, "note": f"skip: {adapters} adapters, out of time"}
            continue
        updates += [put_on(model, seed) for seed in range(len(updates), adapters)]
        yield from compared(model, rows, updates, new)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=lambda text: text.split(","), default=None, help="135m,1b")
    parser.add_argument("--new", type=int, default=None, help="new tokens of a row; 128")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--toy", action="store_true", help="a tiny model: tests this script, measures nothing")
    parser.add_argument("--budget", type=float, default=60, help="seconds for everything")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured (--device cpu --toy tests the script)", file=sys.stderr)
        return 2
    end, failed = time.monotonic() + options.budget, 0
    models, new = (
        options.models or (["toy"] if options.toy else ["135m", "1b"]),
        options.new or (8, 128)[not options.toy],
    )
    assert set(models) <= set(SHAPES), f"--models: of {', '.join(SHAPES)}"
    path = Path(os.environ.get("OUT") or Path(__file__).parent) / "gpu.csv"
    empty, fixed = not path.exists(), conditions(options.device)
    with path.open("a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        if empty:
            table.writeheader()
        for shape in models:
            try:
                for arm, row in rows_of(shape, new, options.device, lambda: end - time.monotonic()):
                    speed = row.get("tokens_per_s")
                    shown = {"tokens_per_s": "" if speed is None else f"{speed:.1f}"}
                    table.writerow({**row, **fixed, "arm": arm, "model": shape, **shown})
                    file.flush()
                    rate = "" if speed is None else f"{speed:,.0f} tokens/s  "
                    print(f"{arm:17} {shape:5} {row['tokens']:>4}  {rate}{row['note']}", flush=True)
            except Exception as error:
                failed = 1
                traceback.print_exc()
                table.writerow({**fixed, "arm": "decode", "model": shape, "note": f"error: {error!s:.200}"})
            free_memory()
    return failed


if __name__ == "__main__":
    sys.exit(main())
