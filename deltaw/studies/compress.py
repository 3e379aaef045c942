"""compress: training at a high rank and cutting the adapter afterwards beats training at the low rank.

The cut is the best there is in the Frobenius norm (adapter/algebra.py). Whether the task needs only the largest
singular values is another matter, and the question here. As in the source the parent is trained with rsLoRA's scale,
alpha / √r, the child with LoRA's. What cutting alone costs compares one adapter with itself: no seed lies between them.
"""

from deltaw.adapter.algebra import resize
from deltaw.evaluation.budget import wear
from deltaw.studies.bench import LORA_RATES, Arm, lora
from deltaw.studies.lab import Lab
from deltaw.studies.means import mean_bars
from deltaw.studies.statistics import Criterion, Estimate, log_ratios
from deltaw.studies.study import Outcome, Rule, nothing_learnt

HIGH, LOW, CUTS = 64, 32, (32, 16, 4, 1)
ALPHA = 16  # of rsLoRA, whose scale it divides by √64: 2, where LoRA's alpha 32 has 0.5 at rank 64
ASKED = f"loss of {HIGH} cut to {LOW} / trained at {LOW}"

RULE = Rule(
    name="compress",
    title="Train high, compress after?",
    claim="An adapter trained at rank 64 and cut to 32 does better than one trained at rank 32.",
    source="PEFT's MetaMathQA benchmark: r = 64 (rsLoRA) 52.92, cut to r = 32 51.48, trained at r = 32 "
    "48.22; one run each",
    definition=f"rsLoRA of rank {HIGH}, alpha {ALPHA}, every module cut to rank {LOW} by the SVD of its update, "
    f"against LoRA of rank {LOW}, alpha 32, each at its own best rate; ratio of held-out losses with the same seed. "
    "Beside it: what the cut to lower ranks costs the parent",
    criteria=(Criterion(ASKED, below=0.0, is_log=True),),
    void="either ends above half of the base's loss",
    change="a task on which rank 32 runs out of capacity, a parent without rsLoRA's larger scale",
    design={"high": HIGH, "low": LOW, "alpha": [ALPHA, 32], "rates": LORA_RATES, "steps": Arm().steps},
)


def run(lab: Lab) -> Outcome:
    arms = {f"parent, {HIGH}": Arm(lora(HIGH, ALPHA, scaling="rslora")), f"trained, {LOW}": Arm(lora(LOW))}
    tuned = {name: lab.bench.tuned(arm, LORA_RATES) for name, arm in arms.items()}
    parents, children = (lab.bench.by_seed(arm.at(tuned[name].rate), RULE.seeds) for name, arm in arms.items())
    cut: dict[int, dict[int, float]] = {rank: {} for rank in CUTS}
    with lab.display.task("cutting", len(parents)) as progress:
        for done, (seed, parent) in enumerate(parents.items(), 1):
            adapter = parent.adapter()
            with lab.bench.wearing(adapter) as attached:
                for rank in CUTS:
                    wear(attached, resize(adapter, rank=rank)[0])
                    cut[rank][seed] = lab.bench.loss()
            progress(done)
    whole = {seed: one.loss for seed, one in parents.items()}
    trained = {seed: one.loss for seed, one in children.items()}
    estimates: dict[str, Estimate] = {ASKED: log_ratios(cut[LOW], trained)}
    estimates |= {f"log loss of the parent cut to {rank} / whole": log_ratios(cut[rank], whole) for rank in CUTS}
    worst = max(*whole.values(), *trained.values())
    columns = {f"cut to {rank}": cut[rank] for rank in CUTS[::-1]}
    columns |= {f"rank {HIGH}": whole, f"trained at {LOW}": trained}
    picture = mean_bars(
        columns,
        "held-out loss, nats per learnt token",
        f"Held-out loss of adapters of rank {HIGH}, whole and cut, and of those trained at rank {LOW}.",
    )
    void = nothing_learnt(worst, parents[RULE.seeds[0]].before)
    return Outcome(estimates, [picture], {"losses": columns}, tuned, void)
