"""fullrank: what full fine-tuning learns is not low-rank, and needs more directions the longer it is trained.

How many directions a ΔW needs is its energy rank at 90 % (linalg/rank.py), as in the paper, here as a share of all that
there are, min(M, N): widths differ. The paper's "10 to 100 times LoRA's rank" is 160 of Llama-2-7B's 4,096 at least,
r = 16: a share of 0.04.

One training per seed at a constant rate is looked at on its way. (Trainings of several lengths, each with a schedule
that decays, would differ by the schedule as well.) Counts tie in small matrices, and a module that ties hasn't grown;
it hasn't failed to, either. So it is the mean share over modules that grows or doesn't, one number per seed.

Letters: K = min(M, N).
"""

import json
from pathlib import Path
from typing import Any

import torch

from deltaw.adapter.attach import attach, discard
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.analysis.words import place
from deltaw.files.atomic import write_text_atomic
from deltaw.linalg.rank import energy_rank
from deltaw.linalg.threads import one_thread
from deltaw.studies.bench import FULL_RATES, NEW_TASK, Arm, learn
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import Criterion, Paired
from deltaw.studies.study import Outcome, Rule, nothing_learnt

ENERGY, STEPS = 0.9, (12, 24, 48, 96, 192)
LEAST = 0.04
ARM = Arm("full", FULL_RATES[0], steps=STEPS[-1], train={"schedule": "constant"})
LAST = f"share of directions that hold 90 % after {STEPS[-1]} steps"
GROWS = f"growth of that share from {STEPS[0]} to {STEPS[-1]} steps"
MLP = "share in the MLP less that in attention"
KINDS = {"self_attn": "attention", "mlp": "MLP"}

RULE = Rule(
    name="fullrank",
    title="Is the update of full fine-tuning low-rank?",
    claim="Full fine-tuning's ΔW is not low-rank: 90 % of its energy takes 10 to 100 times the ranks that LoRA is "
    "given, and more the longer it is trained; the MLP needs more than attention.",
    source="LoRA Learns Less and Forgets Less (Biderman et al. 2024), §4: SVD of ΔW over the checkpoints of a "
    "continued pretraining of Llama-2-7B",
    definition=f"Full fine-tuning at the constant learning rate {ARM.lr:g}; after {', '.join(map(str, STEPS))} steps "
    "the share of each module's singular values that hold 90 % of ‖ΔW‖²; by seed the mean over modules. "
    f"{LEAST:g} is ten times rank 16 among the 4,096 directions of the paper's model",
    criteria=(Criterion(LAST, above=LEAST), Criterion(GROWS, above=0.0), Criterion(MLP, above=0.0)),
    void="the training ends above half of the base's loss",
    change="longer training on more data: the paper's is 16 billion tokens, and this is a fine-tune",
    design={"steps": STEPS, "rate": ARM.lr, "energy": ENERGY},
)


def run(lab: Lab) -> Outcome:
    by_seed = {seed: on_the_way(lab, seed) for seed in RULE.seeds}
    series = {
        part: [Paired(tuple(one["shares"][str(step)][part] for one in by_seed.values())) for step in STEPS]
        for part in ("all", *KINDS.values())
    }
    estimates = {
        LAST: series["all"][-1],
        GROWS: _less(series["all"][-1], series["all"][0]),
        MLP: _less(series["MLP"][-1], series["attention"][-1]),
    }
    rows: list[list[Cell]] = [
        [step, *(series[part][at].value for part in series), *series["all"][at].bounds()]
        for at, step in enumerate(STEPS)
    ]
    bands = {
        part: (list(STEPS), [one.bounds()[0] for one in ones], [one.bounds()[1] for one in ones])
        for part, ones in series.items()
    }
    picture = Picture(
        pictures.lines(
            {part: (list(STEPS), [one.value for one in ones]) for part, ones in series.items()},
            x_label="steps",
            y_label="share of the directions that hold 90 % of the energy",
            log_x=True,
            bands=bands,
            baseline=("ten times rank 16 of 4,096", LEAST),
        ),
        "The share of ΔW's directions that hold 90 % of its energy, over the training.",
        "Curves for all modules, attention and the MLP, with intervals over seeds",
        Table(["steps", *series, "all: from", "to"], rows, "Means over modules and seeds"),
    )
    void = nothing_learnt(max(one["loss"] for one in by_seed.values()), by_seed[RULE.seeds[0]]["first"])
    return Outcome(estimates, [picture], {"shares": {s: one["shares"] for s, one in by_seed.items()}}, {}, void)


def on_the_way(lab: Lab, seed: int) -> dict[str, Any]:
    """{shares: {step: {part: share}}, first, loss}: of one training, run once; the last two are training losses."""
    file = Path(lab.folder) / "fullrank" / f"{RULE.hash}-{seed}.json"
    if not file.is_file():
        lab.display.say(f"training {ARM.words}, seed {seed}")
        forward, shares = lab.bench.forward, dict[str, dict[str, float]]()
        attached = attach(forward.model, ARM.spec, generator=torch.Generator().manual_seed(seed))

        def look(step: int) -> None:
            if step in STEPS:
                with one_thread():
                    each = {
                        path: float(energy_rank(torch.linalg.svdvals(layer.factors().dense().double()), ENERGY))
                        / min(layer.factors().shape)
                        for path, layer in attached.layers.items()
                    }
                shares[str(step)] = means(each)

        try:
            curve = learn(forward, attached, ARM, lab.bench.rows(NEW_TASK), seed, look)
        finally:
            discard(attached)
        file.parent.mkdir(parents=True, exist_ok=True)
        loss = sum(curve[-10:]) / len(curve[-10:])
        write_text_atomic(file, json.dumps({"shares": shares, "first": curve[0], "loss": loss}))
    return dict(json.loads(file.read_text(encoding="utf-8")))


def means(shares: dict[str, float]) -> dict[str, float]:
    """Of all modules, attention's and the MLP's."""
    parts = {"all": list(shares.values())}
    for path, share in shares.items():
        parts.setdefault(next((word for part, word in KINDS.items() if part in path), place(path)[1]), []).append(share)
    return {part: sum(each) / len(each) for part, each in parts.items()}


def _less(one: Paired, other: Paired) -> Paired:
    return Paired(tuple(a - b for a, b in zip(one.values, other.values, strict=True)))
