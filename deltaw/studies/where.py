"""where: at equal parameters LoRA in the MLP beats LoRA in attention, and all layers at a low rank do no worse.

A module M x N at rank r trains r (M + N) numbers, so for one budget the ranks follow from the base's shapes:

    r_group = round(R · Σ_all (M + N) / Σ_group (M + N)),     R = 16 for all-linear

alpha is 32 in all of them. With alpha = 2 r a group of a higher rank would step further at the same rate: under Adam
ΔW grows with s r, 2.6 times as far for attention. Each group's rate is tuned, so what is left of that is no matter.
"""

import math

from torch import nn

from deltaw.adapter.targets import find_targets
from deltaw.base.frozen import FrozenLinear
from deltaw.config import AdapterSpec
from deltaw.studies.bench import LORA_RATES, Arm, lora
from deltaw.studies.lab import Lab
from deltaw.studies.means import mean_bars
from deltaw.studies.statistics import Criterion, log_ratios
from deltaw.studies.study import Outcome, Rule, nothing_learnt

GROUPS = ("all-linear", "attention", "mlp")
RANK, WORSE = 16, 1.05  # of all-linear; the others follow
MLP_BEST = "loss of the MLP / attention"
NO_WORSE = "loss of all layers / {}"

RULE = Rule(
    name="where",
    title="Where does LoRA belong?",
    claim="At equal trained parameters the MLP alone does better than attention alone, and all linear layers at a "
    "lower rank do no worse than either.",
    source="LoRA Without Regret (Schulman et al. 2025): attention alone at r = 256 worse than the MLP alone at "
    "r = 128; AdaLoRA (Zhang et al. 2023), fig. 1: Wf2 89.99, Wq 88.58; LoRA (Hu et al. 2021), table 5: Wq, Wk, Wv, "
    "Wo at r = 2 73.7, Wq alone at r = 8 70.4",
    definition=f"All-linear at rank {RANK}; attention and the MLP alone at the ranks that come nearest to as many "
    "trained parameters; alpha 32; held-out loss at each one's best rate, as ratios with the same seed",
    criteria=(
        Criterion(MLP_BEST, below=0.0, is_log=True),
        Criterion(NO_WORSE.format("attention"), below=math.log(WORSE), is_log=True),
        Criterion(NO_WORSE.format("mlp"), below=math.log(WORSE), is_log=True),
    ),
    void="any of the three ends above half of the base's loss",
    change="another division of the budget between attention and the MLP in the base, another task",
    design={"rank": RANK, "alpha": 32, "rates": LORA_RATES, "steps": Arm().steps},
)


def run(lab: Lab) -> Outcome:
    ranks = equal_ranks(lab.bench.forward.model)
    losses, tuned, void = {}, {}, None
    for group, rank in ranks.items():
        arm = Arm(lora(rank) | ({} if group == "all-linear" else {"targets": group}))
        tuned[group] = lab.bench.tuned(arm, LORA_RATES)
        trained = lab.bench.by_seed(arm.at(tuned[group].rate), RULE.seeds)
        losses[group] = {seed: one.loss for seed, one in trained.items()}
        void = void or nothing_learnt(max(losses[group].values()), trained[RULE.seeds[0]].before)
    estimates = {MLP_BEST: log_ratios(losses["mlp"], losses["attention"])} | {
        NO_WORSE.format(group): log_ratios(losses["all-linear"], losses[group]) for group in ("attention", "mlp")
    }
    picture = mean_bars(
        {f"{group}, rank {rank}": losses[group] for group, rank in ranks.items()},
        "held-out loss, nats per learnt token",
        "Held-out loss with LoRA in all layers, in attention alone and in the MLP alone, at equal parameters.",
    )
    return Outcome(estimates, [picture], {"ranks": ranks, "losses": losses}, tuned, void)


def equal_ranks(model: nn.Module) -> dict[str, int]:
    """The rank at which each group of layers trains about as many numbers as all layers at `RANK`."""
    sizes = {}
    for group in GROUPS:
        paths = find_targets(model, AdapterSpec(targets=group, rank=1)).paths
        layers = [FrozenLinear(model.get_submodule(path)) for path in paths]
        sizes[group] = sum(layer.in_features + layer.out_features for layer in layers)
    return {group: round(RANK * sizes["all-linear"] / size) for group, size in sizes.items()}
