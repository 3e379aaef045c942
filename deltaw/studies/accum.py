"""accum: gradient accumulation is the big batch, if sums are divided once.

A step of N batches has the loss Σ_b L_b / Σ_b K_b, L_b the sum over a batch's labelled tokens and K_b their count. A
loop that takes each batch's mean and averages those gives a token more weight the fewer labelled tokens its batch has:
the same only where all K_b are equal. Many tools did the latter (transformers and TRL until the autumn of 2024).

In float64 the difference between an identity and a near miss can't be missed: rounding is about 1e-16 of a gradient.
The masks are unequal as they are in practice: some batches hold long prompts with short answers, others whole texts.
What deltaw's own step does in float32 is reported beside it. Each seed has rows and factors of its own; there is no
chance in any of them, so nothing is averaged, and the worst of them counts.
"""

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deltaw.adapter.attach import Attached, attach, discard
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.config import AdapterSpec, TrainConfig
from deltaw.data.example import Example
from deltaw.data.loader import LoaderState
from deltaw.data.pack import pack
from deltaw.studies.bench import NEW_TASK
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import Criterion, Estimate, Exact
from deltaw.studies.study import Outcome, Rule
from deltaw.training.checkpoint import TrainState
from deltaw.training.learner import Learner
from deltaw.training.step import step

RANK, PARTS, ROWS = 16, 4, 12
SAME, APART = 1e-12, 1e-2
ONCE, MEANS = "‖g − g of the big batch‖ / ‖·‖, sums divided once", "‖g − g of the big batch‖ / ‖·‖, mean of the means"
EVEN = "the same, mean of the means, every batch with as many labels"
PRODUCT = "the same, deltaw's own step in float32"

RULE = Rule(
    name="accum",
    title="Does accumulation equal the big batch?",
    claim="Gradient accumulation equals the big batch if the losses are summed and divided once by all labels; "
    "averaging the batches' means does not.",
    source="trl#2175, transformers#37766: losses of accumulated and of big batches differed",
    definition=f"LoRA of rank {RANK} with B ≠ 0, float64, {PARTS} batches of {ROWS} rows, whose shares of labelled "
    "tokens differ; the gradient of all factors, accumulated in two ways, against that of one batch of all rows, as a "
    "share of its norm. Each seed has rows and factors of its own; the worst of them counts",
    criteria=(Criterion(ONCE, below=SAME), Criterion(MEANS, above=APART)),
    void="the batches have equally many labels, so that both ways are the same",
    change="nothing but an error in the arithmetic: the first is an identity. How far the second is off depends on "
    "the masks",
    design={"rank": RANK, "parts": PARTS, "rows": ROWS},
)  # fmt: skip


def run(lab: Lab) -> Outcome:
    tiny = lab.tiny
    forward = plan_forward(copy.deepcopy(tiny.forward.model).double())
    found: dict[str, dict[int, float]] = {name: {} for name in (ONCE, MEANS, EVEN, PRODUCT)}
    counts: dict[int, list[int]] = {}
    with lab.display.task("accumulating", len(RULE.seeds)) as progress:
        for seed in RULE.seeds:
            parts = unequal(tiny.rows(NEW_TASK), tiny.general, seed)
            counts[seed] = [pack(rows).supervised for rows in parts]
            for name, value in distances(forward, parts, seed).items():
                found[name][seed] = value
            found[PRODUCT][seed] = own_step(tiny.forward, parts, seed)
            progress(len(counts))
    worst = {name: (min if name == MEANS else max)(by_seed.values()) for name, by_seed in found.items()}
    rows: list[list[Cell]] = [
        [name, *(f"{by_seed[seed]:.1e}" for seed in RULE.seeds)] for name, by_seed in found.items()
    ]
    rows.append(["labelled tokens of the batches", *(", ".join(map(str, counts[seed])) for seed in RULE.seeds)])
    picture = Picture(
        pictures.bars(
            ["sums divided once", "mean of the means", "mean of the means, equal counts", "deltaw's step, float32"],
            {f"start {seed}": [max(by_seed[seed], 1e-17) for by_seed in found.values()] for seed in RULE.seeds},
            y_label="distance from the big batch's gradient, as a share",
            log_y=True,
        ),
        "How far accumulated gradients are from the big batch's.",
        "A bar for each way to accumulate and each start",
        Table(["", *(f"start {seed}" for seed in RULE.seeds)], rows, "By start, each with rows of its own"),
    )
    void = "the batches have equally many labels" if any(len(set(some)) == 1 for some in counts.values()) else None
    estimates: dict[str, Estimate] = {name: Exact(value) for name, value in worst.items()}
    return Outcome(estimates, [picture], {"labels": counts, "apart": found}, void=void)


def distances(forward: Forward, parts: Sequence[Sequence[Example]], seed: int) -> dict[str, float]:
    """Of each way to accumulate from the big batch."""
    attached = started(forward, seed)
    try:
        big = gradient(forward, attached, [pack([row for rows in parts for row in rows])], by_mean=False)
        once, means = (gradient(forward, attached, list(map(pack, parts)), by_mean=by) for by in (False, True))
        even = [pack(parts[0])] * len(parts)
        even_big, even_means = (gradient(forward, attached, even, by_mean=by) for by in (False, True))
    finally:
        discard(attached)
    return {ONCE: apart(once, big), MEANS: apart(means, big), EVEN: apart(even_means, even_big)}


def unequal(short: Sequence[Example], whole: Sequence[Example], seed: int) -> list[list[Example]]:
    """Batches of which every other one is of whole texts, the others of answers alone; other rows for each seed."""
    order = np.random.RandomState(seed).permutation(min(len(short), len(whole)))
    return [[(whole if n % 2 else short)[number] for number in order[n * ROWS : (n + 1) * ROWS]] for n in range(PARTS)]


def started(forward: Forward, seed: int) -> Attached:
    """LoRA on the model, in its dtype, somewhere on its way: at B = 0 A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    attached = attach(forward.model, AdapterSpec(rank=RANK), generator=generator)
    dtype = next(forward.model.parameters()).dtype
    for layer in attached.layers.values():
        for name, parameter in layer.trained().items():
            parameter.data = parameter.data.to(dtype)
            if name == "b":
                parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return attached


def gradient(forward: Forward, attached: Attached, batches: Sequence[Batch], *, by_mean: bool) -> list[Tensor]:
    """Of all factors: sums divided once by all labels, or the mean of the batches' means."""
    count = sum(batch.supervised for batch in batches)
    for batch in batches:
        loss, labels = forward.loss(batch)
        (loss / (labels * len(batches) if by_mean else count)).backward()
    return taken(attached)


def own_step(forward: Forward, parts: Sequence[Sequence[Example]], seed: int) -> float:
    """How far apart the gradients of training/step.py are, accumulated and of one batch, before its update."""
    found = []
    for batches in (list(map(pack, parts)), [pack([row for rows in parts for row in rows])]):
        attached = started(forward, seed)
        try:
            config = TrainConfig(lr=1e-9, clip=1e9, dtype="float32", device="cpu")
            learner = Watched(attached, config, 100, TrainState(), lambda line: None)
            step(forward, [learner], batches, LoaderState())
            found.append(learner.whole)
        finally:
            discard(attached)
    return apart(*found)


class Watched(Learner):
    """A learner that keeps its gradient when it is clipped, which is when it is whole."""

    whole: Sequence[Tensor] = ()

    def clip(self) -> float:
        self.whole = [parameter.grad.clone() for parameter in self.attached.parameters if parameter.grad is not None]
        return super().clip()


def taken(attached: Attached) -> list[Tensor]:
    """The gradients, which are gone afterwards."""
    gradients = [parameter.grad for parameter in attached.parameters if parameter.grad is not None]
    for parameter in attached.parameters:
        parameter.grad = None
    return gradients


def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """‖one − other‖ / ‖other‖, over all factors."""
    distance = math.fsum(float((a - b).double().square().sum()) for a, b in zip(one, other, strict=True))
    return math.sqrt(distance / math.fsum(float(b.double().square().sum()) for b in other))
