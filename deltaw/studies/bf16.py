"""bf16: factors kept in bfloat16 stand still at a small learning rate, float32 masters move.

bfloat16 keeps 8 binary digits, so next to x its numbers lie between |x| / 256 and |x| / 128 apart, and adding less
than half of that gives x again. Adam's steps are about as long as the learning rate η, whatever the gradient, so an
entry can move only if

    |x| ≲ 256 η … 512 η

A begins uniform in ±1/√N. At η = 1e-5 and N = 576 only the entries below about 0.004 of 0.042 can move, a tenth; at
1e-4 most can. That is why the rule asks for four fifths to stand still and not for all. B begins at zero, where numbers
are dense enough: it moves until it reaches some hundred η. So such an adapter does learn, through B and up to a point,
and a falling loss doesn't show that all is well.

The loop is as plain as possible (torch's AdamW, one rate, no warm-up), since its arithmetic is what is measured. The
share is nearly the same for every seed: what could vary is drawn by the million.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import Tensor

from deltaw.adapter.attach import attach, discard
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.base.forward import Forward
from deltaw.config import AdapterSpec
from deltaw.data.example import Example
from deltaw.data.loader import Loader
from deltaw.evaluation.held_out import held_out_loss
from deltaw.files.atomic import write_text_atomic
from deltaw.studies.bench import NEW_TASK, lora
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import Criterion, Estimate, Paired
from deltaw.studies.study import Outcome, Rule

RATES, STEPS, TOKENS = (1e-5, 1e-4, 1e-3), 20, 1024
STILL, MOVED = 0.2, 0.95  # shares of A's entries that changed: less than the one, more than the other
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHANGED = "share of A's entries that changed, {}, lr {:g}"

RULE = Rule(
    name="bf16",
    title="Do adapters in bfloat16 move?",
    claim="Kept in bfloat16 and trained with Adam at a small learning rate, A stands still; float32 masters move.",
    source="keras-hub issue 2629: LoRA of Qwen2.5-7B in bfloat16 under Adam, where each epoch's loss is the last's. "
    "That is about Adam's second moment; that A's entries are too coarse for small steps follows from the format",
    definition=f"Rank 16, alpha 32, {STEPS} steps of {TOKENS} tokens with AdamW at {RATES[0]:g}, {RATES[1]:g} and "
    f"{RATES[2]:g}, from one start, factors and moments once in float32 and once in bfloat16; counted are the entries "
    "that changed",
    criteria=(
        Criterion(CHANGED.format("bfloat16", RATES[0]), below=STILL),
        Criterion(CHANGED.format("float32", RATES[0]), above=MOVED),
    ),
    void="no entry of B changed",
    change="a wider layer, whose A begins nearer to zero; stochastic rounding; a higher rate, which is shown",
    design={"rates": RATES, "steps": STEPS, "tokens": TOKENS, "rank": 16, "alpha": 32},
)


@dataclass(frozen=True)
class Moved:
    """What training changed: shares of the entries, ‖A − A₀‖ / ‖A₀‖, ‖B‖, and the held-out loss in nats per token."""

    a_changed: float
    b_changed: float
    a_relative: float
    b_norm: float
    loss: float


def run(lab: Lab) -> Outcome:
    moved = {
        (dtype, rate): [of_seed(lab, dtype, rate, seed) for seed in RULE.seeds] for rate in RATES for dtype in DTYPES
    }
    estimates: dict[str, Estimate] = {}
    for (dtype, rate), each in moved.items():
        estimates[CHANGED.format(dtype, rate)] = Paired(tuple(one.a_changed for one in each))
        estimates[f"share of B's, {dtype}, lr {rate:g}"] = Paired(tuple(one.b_changed for one in each))
    for rate in RATES:
        losses = [[one.loss for one in moved[dtype, rate]] for dtype in DTYPES]
        apart = tuple(a - b for a, b in zip(*losses, strict=True))
        estimates[f"held-out loss of bfloat16 − float32, lr {rate:g}"] = Paired(apart)
    void = None if all(one.b_changed for each in moved.values() for one in each) else "B didn't move"
    rows: list[list[Cell]] = []
    for (dtype, rate), each in moved.items():
        columns = zip(*(asdict(one).values() for one in each), strict=True)
        rows.append([f"{dtype}, lr {rate:g}", *(sum(column) / len(column) for column in columns)])
    head = ["", "A's entries changed", "B's entries changed", "‖A − A₀‖ / ‖A₀‖", "‖B‖", "held-out loss"]
    picture = Picture(
        pictures.bars(
            [f"lr {rate:g}" for rate in RATES],
            {
                f"{side}, {dtype}": [_mean(moved[dtype, rate], side) for rate in RATES]
                for side in "AB"
                for dtype in DTYPES
            },
            y_label="share of the entries that changed",
        ),
        "The share of A's and B's entries that training changed at all.",
        "A group of bars for each learning rate; in each, A and B in float32 and in bfloat16",
        Table(head, rows, "Means of the seeds. Shares are fractions of 1; intervals are narrower than a bar's edge"),
    )
    return Outcome(estimates, [picture], {"moved": rows}, {}, void)


def of_seed(lab: Lab, dtype: str, rate: float, seed: int) -> Moved:
    """Trained once, and read again."""
    file = lab.folder / "bf16" / f"{RULE.hash}-{dtype}-{rate:g}-{seed}.json"
    if not file.is_file():
        lab.display.say(f"training {dtype}, lr {rate:g}, seed {seed}")
        moved = train(
            lab.bench.forward, lab.bench.rows(NEW_TASK), lab.bench.held_out(NEW_TASK), DTYPES[dtype], rate, seed
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, json.dumps(asdict(moved)))
    return Moved(**json.loads(file.read_text(encoding="utf-8")))


def train(
    forward: Forward, rows: Sequence[Example], held_out: Sequence[Example], dtype: torch.dtype, rate: float, seed: int
) -> Moved:
    """Attach a fresh adapter with factors of `dtype`, train it, measure it and take it off again."""
    attached = attach(forward.model, AdapterSpec(**lora(16)), generator=torch.Generator().manual_seed(seed))
    for parameter in attached.parameters:
        parameter.data = parameter.data.to(dtype)
    device = attached.parameters[0].device
    before = [layer.trained()["a"].detach().clone() for layer in attached.layers.values()]
    optimizer = torch.optim.AdamW(attached.parameters, lr=rate, weight_decay=0.0)
    for batches, _ in islice(Loader(rows, TOKENS, TOKENS, seed), STEPS):
        for batch in (batch.to(device) for batch in batches):
            loss, count = forward.loss(batch)
            (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    a = [layer.trained()["a"].detach() for layer in attached.layers.values()]
    b = [layer.trained()["b"].detach() for layer in attached.layers.values()]
    loss_after, _ = held_out_loss(forward, held_out)
    moved = Moved(
        a_changed=_share([x != old for x, old in zip(a, before, strict=True)]),
        b_changed=_share([x != 0 for x in b]),
        a_relative=_norm([x.float() - old.float() for x, old in zip(a, before, strict=True)]) / _norm(before),
        b_norm=_norm(b),
        loss=loss_after,
    )
    discard(attached)
    return moved


def _mean(each: Sequence[Moved], side: str) -> float:
    return sum(one.a_changed if side == "A" else one.b_changed for one in each) / len(each)


def _share(masks: list[Tensor]) -> float:
    """The share of all entries."""
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def _norm(parts: list[Tensor]) -> float:
    return sum(float(part.float().norm()) ** 2 for part in parts) ** 0.5
