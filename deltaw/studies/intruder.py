"""intruder: LoRA brings new top directions into the weights, the more the higher the rate; full fine-tuning hardly any.

An intruder is one of the first ten left singular vectors of W + ΔW whose cosine with every left singular vector of W
is below ε (analysis/measure.py). The paper's ε is 0.5. Short trainings of a small model may bring none at all, and a
count of zero shows nothing about what it depends on, so the ε of the verdict is fixed by the counts' size alone: 0.5,
or else the first of 0.7 and 0.9 at which all trainings together have a few. The page shows all three.

Counts of at most 10 per module add up over the model. Two counts a and b differ when they are further apart than
2 √(a + b), twice what a Poisson count's difference scatters by.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltaw.analysis import pictures
from deltaw.analysis.measure import INTRUDER_EPSILON
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.studies.forget import crossing
from deltaw.studies.lab import Lab
from deltaw.studies.study import Claim, Judgement, Outcome

COMPARED = (1, 16)  # ranks
EPSILONS = (INTRUDER_EPSILON, 0.7, 0.9)
FEW = 5  # intruders in all trainings together, below which nothing can be said
RHO = 0.7

CLAIM = Claim(
    name="intruder",
    title="Does LoRA bring intruder dimensions?",
    claim="LoRA's tuned weights have leading singular vectors like none of the base's, whose number follows the "
    "learning rate and forgetting rather than the task; full fine-tuning's hardly have any.",
    source="LoRA vs Full Fine-tuning: An Illusion of Equivalence (Shuttleworth et al. 2024): their number's rank "
    "correlation with forgetting is 0.971 (RoBERTa, MNLI)",
    method=f"the sweeps over learning rates of ranks {' and '.join(map(str, COMPARED))} and of full fine-tuning; "
    "intruders among the first 10 left vectors of every module, summed",
    rule=f"at ε = {EPSILONS[0]:g}, or the first of {EPSILONS[1]:g} and {EPSILONS[2]:g} at which all trainings together "
    f"have {FEW} intruders: held, if at both ranks the count rises with the rate (Spearman above {RHO:g}) and at the "
    "larger of the best task losses of LoRA and full fine-tuning LoRA's exceeds the other's by more than 2 √(their "
    "sum); did not hold, if at either rank it doesn't rise or is no larger; too noisy, if it is larger but not by that "
    f"much, if there are fewer than {FEW} at every ε, or where the task losses don't overlap",
)


@dataclass(frozen=True)
class Spot:
    """The trainings at one rate, averaged over the seeds."""

    rate: float
    loss: float
    kl: float
    counts: Mapping[float, float]  # by ε


def verdict(epsilon: float | None, rhos: Sequence[float], matched: Sequence[tuple[float, float] | None]) -> Judgement:
    """`rhos` of the counts with the rate and (LoRA's, full's) counts at one task loss, one for each rank."""
    pairs = [pair for pair in matched if pair is not None]
    if epsilon is None or len(pairs) < len(matched):
        return "too noisy"
    if min(rhos) <= RHO or any(lora <= full for lora, full in pairs):
        return "did not hold"
    clear = all(lora - full > 2 * math.sqrt(lora + full) for lora, full in pairs)
    return "held" if clear else "too noisy"


def threshold(totals: Mapping[float, float]) -> float | None:
    """The first ε with enough intruders, or None."""
    return next((epsilon for epsilon, total in totals.items() if total >= FEW), None)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """The correlation of the ranks, equal numbers sharing theirs; 0 if all numbers of one are equal."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    ranks = ([sum(b < a for b in z) + (z.count(a) + 1) / 2 for a in z] for z in (list(x), list(y)))
    return statistics.correlation(*ranks)


def at_best(lora: Sequence[Spot], full: Sequence[Spot], epsilon: float) -> tuple[float, float] | None:
    """Both counts at the larger of their best losses, as in the study `forget`."""
    loss = max(min(spot.loss for spot in spots) for spots in (lora, full))
    counts = []
    for spots in (lora, full):
        place = crossing([spot.loss for spot in spots], loss)
        if place is None:
            return None
        n, t = place
        before, after = (spots[min(at, len(spots) - 1)].counts[epsilon] for at in (n, n + 1))
        counts.append(before + t * (after - before))
    return counts[0], counts[1]


def run(lab: Lab) -> Outcome:
    ranks = [f"rank {rank}" for rank in COMPARED]
    sweeps = {name: spots_of(lab, name, {"rank": r, "alpha": 32}) for name, r in zip(ranks, COMPARED, strict=True)}
    sweeps["full"] = full = spots_of(lab, "full", "full")
    totals = {e: sum(spot.counts[e] for spots in sweeps.values() for spot in spots) for e in EPSILONS}
    epsilon = threshold(totals)
    shown = EPSILONS[-1] if epsilon is None else epsilon
    rhos = {name: correlations(spots, shown) for name, spots in sweeps.items()}
    matched = {name: at_best(sweeps[name], full, shown) for name in ranks}
    chosen = verdict(epsilon, [rhos[name]["rate"] for name in ranks], list(matched.values()))
    counts = "; ".join(
        f"{name} {', '.join(f'{spot.counts[shown]:.4g}' for spot in spots)}" for name, spots in sweeps.items()
    )
    follows = "; ".join(
        f"{name} {rhos[name]['rate']:+.2f} with the rate, {rhos[name]['KL']:+.2f} with KL, {rhos[name]['loss']:+.2f} "
        f"with the task loss"
        for name in ranks
    )
    at = "; ".join(
        f"{name} {pair[0]:.1f}, full {pair[1]:.1f}" if pair else f"{name}: losses don't overlap with full's"
        for name, pair in matched.items()
    )
    because = (
        f"Intruders at ε = {', '.join(f'{e:g}' for e in EPSILONS)} in all trainings: "
        f"{', '.join(f'{total:.4g}' for total in totals.values())}. At ε = {shown:g}, by rising rate: {counts}. "
        f"Their rank correlations: {follows}. At one task loss: {at}."
    )
    figures = {
        "epsilon": epsilon,
        "totals": {f"{e:g}": total for e, total in totals.items()},
        "correlations": rhos,
        "matched": matched,
        "sweeps": {
            name: [{**vars(s), "counts": {f"{e:g}": count for e, count in s.counts.items()}} for s in spots]
            for name, spots in sweeps.items()
        },
    }
    return Outcome(chosen, because, pictures_of(sweeps, shown), figures)


def spots_of(lab: Lab, name: str, adapter: Mapping[str, int] | str) -> list[Spot]:
    by_seed = [lab.sweep(adapter, seed=seed) for seed in lab.seeds]
    spots = []
    for rate in sorted(by_seed[0]):
        trials = [trials[rate] for trials in by_seed]
        cosines: list[float] = []
        for trial in trials:
            measures = lab.measured(f"{name}, lr {rate:g}", trial.adapter()).values()
            cosines += [cosine for m in measures if m.base for cosine in m.base.cosines]
        counts = {e: sum(cosine < e for cosine in cosines) / len(trials) for e in EPSILONS}
        loss = statistics.fmean(trial.loss for trial in trials)
        spots.append(Spot(rate, loss, statistics.fmean(trial.forgetting["kl"] for trial in trials), counts))
    return spots


def correlations(spots: Sequence[Spot], epsilon: float) -> dict[str, float]:
    """Spearman's ρ of the counts with the rate, with forgetting and with the task loss."""
    counts = [spot.counts[epsilon] for spot in spots]
    columns = {"rate": [s.rate for s in spots], "KL": [s.kl for s in spots], "loss": [s.loss for s in spots]}
    return {name: spearman(counts, column) for name, column in columns.items()}


def pictures_of(sweeps: Mapping[str, Sequence[Spot]], epsilon: float) -> list[Picture]:
    rows: list[list[Cell]] = [
        [name, f"{spot.rate:g}", *(spot.counts[e] for e in EPSILONS), spot.loss, spot.kl]
        for name, spots in sweeps.items()
        for spot in spots
    ]
    head = ["", "lr", *(f"ε = {e:g}" for e in EPSILONS), "task loss", "KL"]
    table = Table(head, rows, "Intruders, and what was learnt and forgotten")
    counts = {name: [spot.counts[epsilon] for spot in spots] for name, spots in sweeps.items()}
    over = {name: ([spot.rate for spot in spots], counts[name]) for name, spots in sweeps.items()}
    beside = {name: ([spot.kl for spot in spots], counts[name]) for name, spots in sweeps.items()}
    label = f"intruders at ε = {epsilon:g}"
    return [
        Picture(
            pictures.lines(over, x_label="learning rate", y_label=label, log_x=True),
            "Intruders over the learning rate. Full fine-tuning's rates are a tenth of LoRA's.",
            "A curve for each rank and one for full fine-tuning",
            table,
        ),
        Picture(
            pictures.scatter(beside, x_label="KL(base ‖ tuned) on general text", y_label=label, log_x=True),
            "Intruders against what was forgotten.",
            "A dot for each training",
            table,
        ),
    ]
