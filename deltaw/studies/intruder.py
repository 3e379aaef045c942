"""intruder: LoRA brings new top directions into the weights, which full fine-tuning hardly does.

An intruder is one of the first ten left singular vectors of W' = W + ΔW whose cosine with every left singular vector
of W is below ε (Shuttleworth et al. 2024, algorithm 1), and less than half of which lies in the span of W's first
twenty: a rotation among directions of nearly equal σ resembles none of them, and brings nothing new.

The paper's ε is 0.5. Short trainings may bring none at that, so ε is the first of 0.5, 0.7, 0.9 at which LoRA's and
full fine-tuning's trainings with the *tuning* seed, both at their best rates, have five together. The verdict is on
other seeds. If there is no such ε the study is void: a count of nothing shows nothing.

What intruders do: their σ is shrunk, W' − λ Σ_j σ_j u_j v_jᵀ, and beside it the whole update by the same Frobenius
norm, W + (1 − c) ΔW; both are told beside the rule as general text's loss and the task's.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.adapter.file import Adapter
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.config import AdapterSpec
from deltaw.kinds import Dense
from deltaw.linalg.threads import one_thread
from deltaw.studies.bench import FULL_RATES, LORA_RATES, Arm, Trained, by_passage, lora
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import TUNED_WITH, Criterion, Estimate, Paired
from deltaw.studies.study import Outcome, Rule, nothing_learnt

RANK, FIRST, NEAR, MOSTLY = 16, 10, 20, 0.5
EPSILONS, FEW, SHRUNK = (0.5, 0.7, 0.9), 5, 0.3
MORE = "intruders of LoRA − of full fine-tuning"
FOLLOWS = "intruders of LoRA at twice its best rate − at its best"

RULE = Rule(
    name="intruder",
    title="Does LoRA bring intruder dimensions?",
    claim="LoRA's tuned weights have leading singular vectors like none of the base's, and the more the higher the "
    "learning rate; full fine-tuning's hardly have any.",
    source="LoRA vs Full Fine-tuning: An Illusion of Equivalence (Shuttleworth et al. 2024): their number's rank "
    "correlation with forgetting is 0.971 (RoBERTa, MNLI)",
    definition=f"LoRA of rank {RANK}, alpha 32, and full fine-tuning at their best rates, and LoRA at twice its own; "
    f"intruders among the first {FIRST} left vectors of every module, without those of which half lies in W's first "
    f"{NEAR}; summed over modules, by seed. ε is the first of {', '.join(f'{e:g}' for e in EPSILONS)} at which the "
    f"matched pair of the tuning seed has {FEW}",
    criteria=(Criterion(MORE, above=0.0), Criterion(FOLLOWS, above=0.0)),
    void=f"the pair of the tuning seed has fewer than {FEW} at every ε, or either ends above half of the base's loss",
    change="longer training; a base with fewer strong directions, among which rotations are rarer",
    design={
        "rank": RANK, "first": FIRST, "near": [NEAR, MOSTLY], "epsilons": EPSILONS, "few": FEW, "shrunk": SHRUNK,
        "rates": [LORA_RATES, FULL_RATES], "steps": Arm().steps,
    },
)  # fmt: skip


class Module(NamedTuple):
    """A module's W' and its first singular directions, with each one's largest cosine and its share in W's first."""

    w_MN: Tensor
    tuned_MN: Tensor
    u_MJ: Tensor
    sigma_J: Tensor
    v_NJ: Tensor
    cosine_J: Tensor
    near_J: Tensor

    def intruders(self, epsilon: float) -> Tensor:
        """[J] bool."""
        return (self.cosine_J < epsilon) & (self.near_J < MOSTLY)


def run(lab: Lab) -> Outcome:
    arms = {"LoRA": (Arm(lora(RANK)), LORA_RATES), "full": (Arm("full"), FULL_RATES)}
    tuned = {name: lab.bench.tuned(arm, rates) for name, (arm, rates) in arms.items()}
    best = {name: arm.at(tuned[name].rate) for name, (arm, _) in arms.items()}
    best["LoRA, twice the rate"] = best["LoRA"].at(float(f"{2 * tuned['LoRA'].rate:.4g}"))
    pair = {name: modules_of(lab, lab.bench.train(best[name], TUNED_WITH)) for name in arms}
    epsilon = next((e for e in EPSILONS if sum(count(modules, e) for modules in pair.values()) >= FEW), None)
    trained = {name: lab.bench.by_seed(arm, RULE.seeds) for name, arm in best.items()}
    counts: dict[str, dict[float, list[int]]] = {name: {e: [] for e in EPSILONS} for name in best}
    effects: list[tuple[float, float]] = []
    with lab.display.task("looking for intruders", len(best) * len(RULE.seeds)) as progress:
        for name, by_seed in trained.items():
            for one in by_seed.values():
                modules = modules_of(lab, one)
                for e in EPSILONS:
                    counts[name][e].append(count(modules, e))
                if name == "LoRA" and epsilon is not None:
                    effects.append(shrunk(lab, one, modules, epsilon))
                progress(sum(len(each[EPSILONS[0]]) for each in counts.values()))
    shown = EPSILONS[-1] if epsilon is None else epsilon
    estimates: dict[str, Estimate] = {
        MORE: _less(counts["LoRA"][shown], counts["full"][shown]),
        FOLLOWS: _less(counts["LoRA, twice the rate"][shown], counts["LoRA"][shown]),
    }
    if effects:
        general, task = zip(*effects, strict=True)
        estimates["general loss, intruders shrunk − all of ΔW by as much"] = Paired(general)
        estimates["task loss, intruders shrunk − all of ΔW by as much"] = Paired(task)
    worst = max(one.loss for name in arms for one in trained[name].values())
    void = nothing_learnt(worst, trained["LoRA"][RULE.seeds[0]].before)
    if epsilon is None:
        void = void or f"the matched pair has fewer than {FEW} intruders at every ε"
    rows: list[list[Cell]] = [
        [name, e, sum(values) / len(values), *values] for name, each in counts.items() for e, values in each.items()
    ]
    picture = Picture(
        pictures.bars(
            list(counts),
            {f"ε = {e:g}": [sum(each[e]) / len(each[e]) for each in counts.values()] for e in EPSILONS},
            y_label="intruders in all modules, mean of the seeds",
            errors={f"ε = {e:g}": [_half(each[e]) for each in counts.values()] for e in EPSILONS},
        ),
        "Intruders: first directions of the tuned weights that resemble none of W's and lie outside of its first.",
        "A group of bars for LoRA, full fine-tuning and LoRA at twice the rate; a bar for each ε",
        Table(["", "ε", "mean", *(f"seed {seed}" for seed in RULE.seeds)], rows, "Counts"),
    )
    words = "" if epsilon is None else f"ε is {epsilon:g}, chosen with the tuning seed."
    return Outcome(estimates, [picture], {"epsilon": epsilon, "counts": rows}, tuned, void, words)


def modules_of(lab: Lab, one: Trained) -> dict[str, Module]:
    """Every module's first directions beside W's."""
    modules = {}
    with one_thread():
        for path, update in one.adapter().factors.items():
            w_MN = lab.bench.weights[path].dense().float()
            modules[path] = module_of(w_MN, update.plain().dense())
    return modules


def module_of(w_MN: Tensor, delta_MN: Tensor) -> Module:
    """In float64: a match must be found where there is one."""
    base_MK = torch.linalg.svd(w_MN.double(), full_matrices=False).U
    tuned_MN = w_MN + delta_MN
    u_MK, sigma_K, vt_KN = torch.linalg.svd(tuned_MN.double(), full_matrices=False)
    u_MJ = u_MK[:, :FIRST]
    across_KJ = base_MK.T @ u_MJ
    cosine_J, near_J = across_KJ.abs().amax(0), across_KJ[:NEAR].square().sum(0)
    return Module(w_MN, tuned_MN, u_MJ, sigma_K[:FIRST], vt_KN[:FIRST].T, cosine_J, near_J)


def count(modules: dict[str, Module], epsilon: float) -> int:
    return sum(int(module.intruders(epsilon).sum()) for module in modules.values())


def shrunk(lab: Lab, one: Trained, modules: dict[str, Module], epsilon: float) -> tuple[float, float]:
    """(general loss, task loss) with the intruders' σ shrunk, less those with ΔW shrunk by the same norm."""
    without, control = {}, {}
    for path, m in modules.items():
        delta_MN, chosen_J = m.tuned_MN - m.w_MN, m.intruders(epsilon)
        part_MN = (SHRUNK * (m.u_MJ[:, chosen_J] * m.sigma_J[chosen_J]) @ m.v_NJ[:, chosen_J].T).float()
        share = float(part_MN.norm() / delta_MN.norm()) if float(delta_MN.norm()) else 0.0
        without[path], control[path] = Dense(delta_MN - part_MN), Dense((1 - share) * delta_MN)
    adapter = one.adapter()
    found = []
    for factors in (without, control):
        changed: Adapter = dataclasses.replace(
            adapter, spec=AdapterSpec(full=True, targets=tuple(factors)), factors=factors
        )
        with lab.bench.wearing(changed) as attached:
            sums_P4 = by_passage(lab.bench.forward, attached, lab.bench.general)
            found.append((float(sums_P4[:, 1].sum() / sums_P4[:, 3].sum()), lab.bench.loss()))
    return found[0][0] - found[1][0], found[0][1] - found[1][1]


def _less(one: list[int], other: list[int]) -> Paired:
    return Paired(tuple(float(a - b) for a, b in zip(one, other, strict=True)))


def _half(values: list[int]) -> float:
    mean = Paired(tuple(map(float, values)))
    return mean.bounds()[1] - mean.value
