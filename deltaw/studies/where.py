"""where: at equal parameters LoRA in the MLP beats LoRA in attention, and all layers at a low rank do no worse.

A module M x N at rank r trains r (M + N) numbers, so for one budget the ranks follow from the base's shapes:

    r_group = round(R · Σ_all (M + N) / Σ_group (M + N)),     R = 16 for all-linear

With alpha = 2 r everywhere the scale alpha / r is 2 at each rank: fixed at 32 it would fall as the rank grows, and a
group would be judged by the size of its steps. All-linear's runs are then the study `rank`'s own.
"""

import statistics
from collections.abc import Mapping

from torch import nn

from deltaw.adapter.targets import find_targets
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.base.frozen import FrozenLinear
from deltaw.base.load import open_skeleton
from deltaw.base.source import find_base
from deltaw.config import TARGET_GROUPS, AdapterSpec
from deltaw.studies.lab import RATES, Lab, Trial, best
from deltaw.studies.study import Claim, Judgement, Outcome

RANK = 16  # of all-linear; the others follow
SMALL_RATES = (1e-3, 3e-3)

CLAIM = Claim(
    name="where",
    title="Where does LoRA belong?",
    claim="At equal trained parameters the MLP alone does better than attention alone, and all linear layers at a "
    "lower rank do no worse than either.",
    source="LoRA Without Regret (Schulman et al. 2025): attention alone at r = 256 worse than the MLP alone at "
    "r = 128; AdaLoRA (Zhang et al. 2023), fig. 1: Wf2 89.99, Wq 88.58; LoRA (Hu et al. 2021), table 5: Wq, Wk, Wv, "
    "Wo at r = 2 73.7, Wq alone at r = 8 70.4",
    method=f"all-linear at rank {RANK}; attention and the MLP alone at the ranks that come nearest to as many trained "
    f"parameters; alpha 2 r, so that the scale is the same; learning rates {SMALL_RATES[0]:g} and {SMALL_RATES[1]:g} "
    "(the full grid: all four), held-out loss at each one's best",
    rule="held, if attention's loss is above the MLP's by more than seeds do, and all-linear's is above the lower of "
    "both by no more than that; too noisy, if attention and MLP lie within what seeds do",
)


def run(lab: Lab) -> Outcome:
    ranks = equal_ranks(open_skeleton(find_base(lab.task["base"], display=lab.display)))
    rates = RATES if lab.full else SMALL_RATES
    trials = {group: {rate: _train(lab, group, rank, rate) for rate in rates} for group, rank in ranks.items()}
    tops = {group: best(of_group)[0] for group, of_group in trials.items()}
    losses = {
        group: statistics.mean(_train(lab, group, ranks[group], rate, seed).loss for seed in lab.seeds)
        for group, rate in tops.items()
    }
    tie = lab.margin(len(lab.seeds))
    parameters = {group: int(trials[group][rate].result["trained_parameters"]) for group, rate in tops.items()}
    names = [f"{group}, rank {ranks[group]}" for group in ranks]
    because = (
        "; ".join(f"{name} ends at {losses[group]:.3f} nats" for name, group in zip(names, ranks, strict=True))
        + f". Seeds alone make a difference of up to {tie:.3f}. "
        f"Trained parameters: {min(parameters.values()):,} to {max(parameters.values()):,}."
    )
    rows: list[list[Cell]] = [
        [group, ranks[group], parameters[group], *(t.loss for t in trials[group].values()), loss, f"{tops[group]:g}"]
        for group, loss in losses.items()
    ]
    head = ["", "rank", "trained parameters", *(f"lr {rate:g}" for rate in rates), "best", "at"]
    picture = Picture(
        pictures.bars(
            names,
            {f"lr {rate:g}": [trials[group][rate].loss for group in ranks] for rate in rates},
            y_label="held-out loss, nats per token",
        ),
        "Held-out loss with LoRA in all layers, in attention alone and in the MLP alone, at equal parameters.",
        "A group of bars for each place, a bar for each learning rate",
        Table(head, rows, f"Held-out loss by place; best: the mean of {len(lab.seeds)} seeds"),
    )
    figures = {
        "ranks": ranks,
        "parameters": parameters,
        "losses": {group: {f"{rate:g}": t.loss for rate, t in of_group.items()} for group, of_group in trials.items()},
        "best": losses,
        "tie": tie,
    }
    return Outcome(verdict(losses, tie), because, [picture], figures)


def equal_ranks(model: nn.Module) -> dict[str, int]:
    """The rank at which each group of layers trains about as many numbers as all layers at `RANK`."""
    sizes = {}
    for group in TARGET_GROUPS:
        paths = find_targets(model, AdapterSpec(targets=group, rank=1)).paths
        layers = [FrozenLinear(model.get_submodule(path)) for path in paths]
        sizes[group] = sum(layer.in_features + layer.out_features for layer in layers)
    return {group: round(RANK * sizes["all-linear"] / size) for group, size in sizes.items()}


def verdict(losses: Mapping[str, float], tie: float) -> Judgement:
    """`losses` by group of layers; differences of up to `tie` come from seeds alone."""
    if losses["all-linear"] - min(losses["attention"], losses["mlp"]) > tie:
        return "did not hold"
    if abs(losses["attention"] - losses["mlp"]) <= tie:
        return "too noisy"
    return "held" if losses["attention"] > losses["mlp"] else "did not hold"


def _train(lab: Lab, group: str, rank: int, rate: float, seed: int = 0) -> Trial:
    adapter = {"targets": group, "rank": rank, "alpha": 2 * rank}
    return lab.train(f"{group}, rank {rank}, lr {rate:g}, seed {seed}", seed=seed, adapter=adapter, lr=rate)
