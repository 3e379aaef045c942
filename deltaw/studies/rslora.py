"""rslora: with a scale of α/√r what an update adds keeps its size as the rank grows; with α/r it shrinks.

Measured is what a module adds to what its weight gives, RMS(s B A x) / RMS(W x), over the held-out tokens x that reach
it in the tuned model. Its logarithm, a mean over modules, is fitted by a line over log r for each seed: a slope of 0
is the claim for rsLoRA. One learning rate for all arms, the best of rank 16, where both scales are 2 and the trainings
the same: with a rate of its own each rank would make up for its scale, and the scale is what is asked about.

What Adam does to it: its step is as long whatever the gradient's size, so s B A grows as s r at first along the
gradient, and by norm as s √r at most. docs/math.md has both.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.adapter.attach import attach, discard
from deltaw.adapter.file import Adapter
from deltaw.adapter.layer_update import LayerUpdate
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.base.forward import Forward
from deltaw.data.example import Example
from deltaw.data.pack import pack
from deltaw.generate.cache import evaluating
from deltaw.studies.bench import LORA_RATES, NEW_TASK, Arm, lora
from deltaw.studies.lab import Lab
from deltaw.studies.means import band, cells, mean_of
from deltaw.studies.statistics import Criterion, Estimate, Paired, log_ratios
from deltaw.studies.study import Outcome, Rule, nothing_learnt

RANKS, MIDDLE, ROWS = (4, 16, 64), 16, 100
ALPHA, ROOT_ALPHA = 32, 8  # equal scales at rank 16
FLAT, FALLS = 0.15, -0.25
KINDS = ("α/r", "α/√r")
LORA, RSLORA = "slope with α/r", "slope with α/√r"

RULE = Rule(
    name="rslora",
    title="Does α/√r keep an update's size?",
    claim="With α/r the update shrinks as the rank grows, so that higher ranks hardly learn more; with α/√r its size "
    "does not depend on the rank.",
    source="rsLoRA (Kalajdzievski 2023): only a scale in Θ(1/√r) is rank-stabilised",
    definition=f"Ranks {', '.join(map(str, RANKS))} with alpha {ALPHA} (/r) and {ROOT_ALPHA} (/√r), all at the "
    f"learning rate that is best for rank {MIDDLE}, where both are one training. Slope, over log r, of the mean over "
    "modules of log(RMS(s B A x) / RMS(W x)) on held-out rows after training, one per seed",
    criteria=(Criterion(RSLORA, above=-FLAT, below=FLAT), Criterion(LORA, below=FALLS)),
    void="a loss is above half of the base's: then too little was learnt to speak of an update's size",
    change="plain gradient descent in place of Adam, which takes away the gradient's size; a rate for each rank",
    design={"ranks": RANKS, "alpha": ALPHA, "root_alpha": ROOT_ALPHA, "rates": LORA_RATES, "rows": ROWS,
            "steps": Arm().steps, "tokens": Arm().tokens},
)  # fmt: skip


def arm_of(kind: str, rank: int) -> Arm:
    if kind == "α/r" or rank == MIDDLE:
        return Arm(lora(rank, ALPHA))
    return Arm(lora(rank, ROOT_ALPHA, scaling="rslora"))


def run(lab: Lab) -> Outcome:
    tuned = lab.bench.tuned(arm_of("α/r", MIDDLE), LORA_RATES)
    arms = {(kind, rank): arm_of(kind, rank).at(tuned.rate) for kind in KINDS for rank in RANKS}
    trained = {key: lab.bench.by_seed(arm, RULE.seeds) for key, arm in arms.items()}
    rows = lab.bench.held_out(NEW_TASK)[:ROWS]
    known: dict[str, float] = {}  # by folder: rank 16 is one training of both

    def size(folder: str, adapter: Any) -> float:
        if folder not in known:
            known[folder] = added(lab.bench.forward, adapter(), rows)
        return known[folder]

    sizes = {
        key: {seed: size(one.folder, one.adapter) for seed, one in by_seed.items()} for key, by_seed in trained.items()
    }
    slopes = {
        kind: Paired(tuple(slope({rank: sizes[kind, rank][seed] for rank in RANKS}) for seed in RULE.seeds))
        for kind in KINDS
    }
    losses = {key: {seed: one.loss for seed, one in by_seed.items()} for key, by_seed in trained.items()}
    estimates: dict[str, Estimate] = {RSLORA: slopes["α/√r"], LORA: slopes["α/r"]}
    for rank in (RANKS[0], RANKS[-1]):
        name = f"log of (loss with α/√r / with α/r) at rank {rank}"
        estimates[name] = log_ratios(losses["α/√r", rank], losses["α/r", rank])
    table: list[list[Cell]] = []
    for (kind, rank), by_seed in sizes.items():
        table.append([kind, rank, *cells(mean_of(by_seed), math.exp), mean_of(losses[kind, rank]).value])
    means = {kind: [mean_of(sizes[kind, rank]) for rank in RANKS] for kind in KINDS}
    picture = Picture(
        pictures.lines(
            {kind: (list(RANKS), [math.exp(mean.value) for mean in of]) for kind, of in means.items()},
            x_label="rank",
            y_label="RMS(s B A x) / RMS(W x)",
            log_x=True,
            log_y=True,
            bands={kind: band(RANKS, of, math.exp) for kind, of in means.items()},
        ),
        "What the update adds to what the weight gives, against the rank, after training at one learning rate; bands "
        "are intervals for the mean over the seeds.",
        "A curve for each of both scales",
        Table(["scale", "rank", "added / given", "from", "to", "held-out loss"], table, "Means over the seeds"),
    )
    before = trained["α/r", MIDDLE][RULE.seeds[0]].before
    void = nothing_learnt(max(losses["α/r", MIDDLE].values()), before)
    figures = {f"{kind}, rank {rank}": by_seed for (kind, rank), by_seed in sizes.items()}
    return Outcome(estimates, [picture], {"log_sizes": figures}, {f"rank {MIDDLE}": tuned}, void)


def slope(by_rank: Mapping[int, float]) -> float:
    """Of the line that fits best, over log r."""
    return float(np.polyfit(np.log(list(by_rank)), list(by_rank.values()), 1)[0])


@torch.no_grad()
def added(forward: Forward, adapter: Adapter, rows: Sequence[Example]) -> float:
    """The mean over modules of log(RMS(ΔW x) / RMS(W x)) over the rows' tokens, in the tuned model."""
    attached = attach(forward.model, adapter, fuse=())  # each layer by its own code, which a hook sees
    sums: dict[str, tuple[float, float]] = {}

    def watch(path: str, layer: LayerUpdate) -> Any:
        update = layer.factors()

        def hook(module: LayerUpdate, args: tuple[Tensor, ...], y: Tensor) -> None:
            x_TN = args[0].reshape(-1, args[0].shape[-1]).float()
            added_TM = update.apply(x_TN)
            own_TM = y.reshape(added_TM.shape).float() - added_TM
            of_update, of_weight = sums.get(path, (0.0, 0.0))
            sums[path] = of_update + float(added_TM.square().sum()), of_weight + float(own_TM.square().sum())

        return layer.register_forward_hook(hook)

    hooks = [watch(path, layer) for path, layer in attached.layers.items()]
    try:
        with evaluating(forward.model):
            forward.rows(pack(rows).to(next(forward.model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
        discard(attached)
    return sum(math.log(one / other) / 2 for one, other in sums.values()) / len(sums)
