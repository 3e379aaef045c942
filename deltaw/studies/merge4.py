"""merge4: merging into a base that is already in four bits rounds a light update away.

Q is a grid of four bits: blocks of 32 numbers of a row, code · scale with codes −7 … 7 and scale = max|block| / 7, so
that Q(Q(W)) = Q(W). A merge is seen as Δ̂ = Q(W + Δ) − Q(W), and `kept` = ⟨Δ̂, Δ⟩ / ‖Δ‖² (linalg/rounding.py):

    off the grid    W is the bfloat16 base: merged first and quantised afterwards. A rounded entry moves by a whole step
                    or not at all, but by Δ on average, since W lies anywhere between two codes: kept is near 1
    on the grid     W = Q(W) is all there is, as where the base was loaded in four bits to train on it: what is less
                    than half a step is gone: kept is near 0, unless the update is strong. Not quite 0: the largest of a
                    block sets its scale and so is kept whole, one number of 32

The light update is the adapter scaled to a share of the weights' norm, module by module together; the whole adapter,
and 0.1 and 0.3 of it, are shown beside it. What it does to the task: the share of the gain (of the update beside the
base, Q(W) + Δ) that the merged weights still have.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deltaw.adapter.attach import attach, discard
from deltaw.adapter.file import Adapter
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.base.forward import Forward
from deltaw.config import AdapterSpec
from deltaw.data.example import Example
from deltaw.kinds import Dense
from deltaw.linalg.rounding import Survival, survived
from deltaw.studies.bench import LORA_RATES, NEW_TASK, Arm, by_passage, lora
from deltaw.studies.lab import Lab
from deltaw.studies.means import mean_of
from deltaw.studies.statistics import Criterion, Estimate, Paired, Quotient, Resampled
from deltaw.studies.study import Outcome, Rule, nothing_learnt

RANK, BLOCK, MOST = 16, 32, 7
LIGHT, SCALES = 0.03, (0.1, 0.3, 1.0)
NEARLY_ALL, NEARLY_NONE, HALF, DRAWS = 0.9, 0.1, 0.5, 2000
LIGHTLY = f"{LIGHT:.0%}"
BASES = ("off the grid", "on the grid")
KEPT = {base: f"kept of an update of {LIGHT:.0%}, base {base}" for base in BASES}
GAIN = {base: f"share of the gain that is left at {LIGHT:.0%}, base {base}" for base in BASES}

RULE = Rule(
    name="merge4",
    title="Does a merge into four bits keep the update?",
    claim="Merged into a base that is in four bits, a light update is rounded away; merged into the bfloat16 base, "
    "which is quantised afterwards, it is not.",
    source="peft#2321: a merge into four bits warns of rounding errors, and there is no way round them; "
    "alpaca_lora_4bit#109: merged so, a LoRA appears to have no effect",
    definition=f"LoRA of rank {RANK} at its best learning rate, scaled to {LIGHT:.0%} of the weights' norm, on "
    f"weights of four bits (blocks of {BLOCK}, absmax): kept is ⟨Q(W + Δ) − Q(W), Δ⟩ / ‖Δ‖² over all modules; the "
    "gain left is the fall of the held-out loss by merging, as a share of the fall with the update beside the base. A "
    "number for each seed",
    criteria=(
        Criterion(KEPT["off the grid"], above=NEARLY_ALL),
        Criterion(KEPT["on the grid"], below=NEARLY_NONE),
        Criterion(GAIN["off the grid"], above=HALF),
        Criterion(GAIN["on the grid"], below=HALF),
    ),
    void="the light update beside the base gains nothing: then there is nothing to lose",
    change="another grid (NF4's codes lie closer about zero), a stronger update, weights with outliers",
    design={"rank": RANK, "alpha": 32, "rates": LORA_RATES, "block": BLOCK, "light": LIGHT, "scales": SCALES},
)  # fmt: skip

Deltas = Mapping[str, Tensor]
Results = dict[tuple[str, str], dict[int, "Merged"]]  # by base and strength, by seed


def run(lab: Lab) -> Outcome:
    tuned = lab.bench.tuned(Arm(lora(RANK)), LORA_RATES)
    trained = lab.bench.by_seed(Arm(lora(RANK), lr=tuned.rate), RULE.seeds)
    forward, rows = lab.bench.forward, lab.bench.held_out(NEW_TASK)
    before = {path: lab.bench.weights[path].dense().float() for path in trained[RULE.seeds[0]].adapter().factors}
    results: Results = {}
    with lab.display.task("merging", len(trained) * len(BASES) * (len(SCALES) + 1)) as progress:
        for seed, one in trained.items():
            deltas = {path: update.plain().dense().float() for path, update in one.adapter().factors.items()}
            factors = {LIGHTLY: LIGHT / share_of(deltas, before)} | {f"× {scale:g}": scale for scale in SCALES}
            for name, factor in factors.items():
                light = {path: factor * delta for path, delta in deltas.items()}
                for base in BASES:
                    one_merged = merged(forward, before, light, rows, on_grid=base == "on the grid")
                    results.setdefault((base, name), {})[seed] = one_merged
                    progress(sum(map(len, results.values())))
    estimates: dict[str, Estimate] = {}
    for (base, name), by_seed in results.items():
        if name == LIGHTLY:
            estimates |= {KEPT[base]: kept(by_seed), GAIN[base]: gain(by_seed)}
        else:
            estimates[f"kept at {name}, base {base}"] = kept(by_seed)
    void = nothing_learnt(max(one.loss for one in trained.values()), trained[RULE.seeds[0]].before)
    if void is None and min(one.gain_beside for base in BASES for one in results[base, LIGHTLY].values()) <= 0:
        void = "the light update beside the base gains nothing"
    figures = {
        f"{base}, {name}": {seed: one.to_json() for seed, one in by_seed.items()}
        for (base, name), by_seed in results.items()
    }
    return Outcome(estimates, [picture(results)], figures, {f"rank {RANK}": tuned}, void)


def picture(results: "Results") -> Picture:
    """What is kept, and the losses."""
    names = list(dict.fromkeys(name for _, name in results))
    table: list[list[Cell]] = []
    for (base, name), by_seed in results.items():
        losses = [bootstrapped([one.losses for one in by_seed.values()], column).bounds(0.025) for column in range(3)]
        size = mean_of({seed: one.size for seed, one in by_seed.items()}).value
        ends = [f"{low:.3f} to {high:.3f}" for low, high in losses]
        table.append([base, name, f"{size:.1%}", kept(by_seed).value, gain(by_seed).value, *ends])
    return Picture(
        pictures.bars(
            names,
            {base: [kept(results[base, name]).value for name in names] for base in BASES},
            errors={base: [half(kept(results[base, name])) for name in names] for base in BASES},
            y_label="kept of the update",
        ),
        "What of the update four bits keep, by its strength; whiskers are intervals over the seeds.",
        "A bar for each base and strength",
        Table(
            ["base", "update", "‖ΔW‖ / ‖W‖", "kept", "gain left", "loss of Q(W)", "update beside it", "merged"],
            table,
            "Means over the seeds; of the losses the middle 95 % of a bootstrap over held-out rows",
        ),
    )


def kept(by_seed: "Mapping[int, Merged]") -> Paired:
    return mean_of({seed: one.survival.kept for seed, one in by_seed.items()})


def gain(by_seed: "Mapping[int, Merged]") -> Quotient:
    return Quotient(tuple(one.gain for one in by_seed.values()), tuple(one.gain_beside for one in by_seed.values()))


class Merged:
    """A merge: what survived of the update, and the held-out losses. losses_P4: of each row, of Q(W), of the update
    beside it, of the merged weights; and its labels."""

    def __init__(self, survival: Survival, size: float, losses_P4: Tensor) -> None:
        self.survival, self.size, self.losses = survival, size, losses_P4
        base, beside, after, count = losses_P4.sum(0).tolist()
        self.gain_beside, self.gain = (base - beside) / count, (base - after) / count

    def to_json(self) -> dict[str, float]:
        return {"kept": self.survival.kept, "gain": self.gain, "gain_beside": self.gain_beside, "size": self.size}


def merged(forward: Forward, before: Deltas, deltas: Deltas, rows: Sequence[Example], *, on_grid: bool) -> Merged:
    """Merge and measure. What the model is given is a change of its weights, as a full fine-tune's."""
    total, states = Survival(), dict[str, dict[str, Tensor]]()
    for path, delta in deltas.items():
        w = four_bits(before[path]) if on_grid else before[path].bfloat16().float()
        base, after = four_bits(w), four_bits(w + delta)
        total += survived(after - base, delta)
        for name, weight in (("base", base), ("beside", base + delta), ("merged", after)):
            states.setdefault(name, {})[path] = weight - before[path]
    losses = []
    for name in ("base", "beside", "merged"):
        adapter = Adapter(AdapterSpec(full=True), {path: Dense(change) for path, change in states[name].items()})
        attached = attach(forward.model, adapter)
        try:
            passages_P4 = by_passage(forward, attached, rows)
        finally:
            discard(attached)
        losses.append(passages_P4[:, 1])
    return Merged(total, share_of(deltas, before), torch.stack([*losses, passages_P4[:, 3]], 1))


def four_bits(w_MN: Tensor) -> Tensor:
    """The nearest numbers on the grid of four bits. Rows are cut into blocks; a last one may be shorter."""
    parts = []
    for w_MB in w_MN.split(BLOCK, 1):
        scale_M1 = (w_MB.abs().amax(1, keepdim=True) / MOST).clamp_min(torch.finfo(torch.float32).tiny)
        parts.append((w_MB / scale_M1).round() * scale_M1)
    return torch.cat(parts, 1)


def share_of(deltas: Deltas, weights: Deltas) -> float:
    """‖ΔW‖ / ‖W‖ over all modules."""
    of_update, of_weights = (
        math.fsum(float(each[path].double().square().sum()) for path in deltas) for each in (deltas, weights)
    )
    return math.sqrt(of_update / of_weights)


def bootstrapped(losses: Sequence[Tensor], column: int) -> Resampled:
    """A loss per label, the mean over trainings; the same rows are drawn for all of them."""
    sums_PS = torch.stack([one[:, column] for one in losses], 1).mean(1).numpy()
    counts_P = losses[0][:, 3].numpy()
    random, draws = np.random.default_rng(0), []
    for _ in range(DRAWS):
        chosen = random.integers(0, len(counts_P), len(counts_P))
        draws.append(float(sums_PS[chosen].sum() / counts_P[chosen].sum()))
    return Resampled(float(sums_PS.sum() / counts_P.sum()), tuple(draws))


def half(paired: Paired) -> float:
    """Half of an interval's width."""
    low, high = paired.bounds()
    return (high - low) / 2
