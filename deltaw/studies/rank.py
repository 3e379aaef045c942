"""rank: once the learning rate is right, the rank hardly matters until capacity runs out.

Each rank gets the learning rate that is best for it, chosen with the tuning seed. Loss ratios, not differences, since
they compare over tasks and models. alpha is 32 at every rank, so the scale falls as the rank grows; what that does to
the size of a step is what the tuned rate makes up for.
"""

import math

from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.studies.bench import LORA_RATES, NEW_TASK, Arm, lora
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import Criterion, Estimate, Paired, Tuned, log_ratios
from deltaw.studies.study import Outcome, Rule, nothing_learnt

LOW, HIGH = 4, 64
RANKS = (1, LOW, 16, HIGH)
WORSE = 1.05
ASKED = f"loss of rank {LOW} / rank {HIGH}"

RULE = Rule(
    name="rank",
    title="Does the rank matter?",
    claim="Once the learning rate is right, rank 4 does as well as rank 64.",
    source="LoRA (Hu et al. 2021), table 6: WikiSQL with r = 1, 2, 4, 8, 64 gives 73.4, 73.3, 73.7, 73.8, 73.5",
    definition=f"Ranks {', '.join(map(str, RANKS))}, alpha 32, all linear layers, on a task that the base can't do; "
    "held-out loss at each one's best learning rate, as a ratio with the same seed. Ranks 1 and 16 are reported beside "
    "it, and on the tiny bench the same on a task that is close to pretraining (an accent)",
    criteria=(Criterion(ASKED, below=math.log(WORSE), is_log=True),),
    void="either rank's loss is above half of the base's: then nothing was learnt that a rank could matter for",
    change="a task that needs less than it has (see the accent), a larger base, more steps for the low rank",
    design={"ranks": RANKS, "rates": LORA_RATES, "alpha": 32, "steps": Arm().steps, "tokens": Arm().tokens},
)


def run(lab: Lab) -> Outcome:
    estimates: dict[str, Estimate] = {}
    tuned: dict[str, Tuned] = {}
    curves, rows = {}, list[list[Cell]]()
    for stage in lab.bench.stages:
        losses = {}
        ranks = RANKS if stage == NEW_TASK else (LOW, HIGH)
        for rank in ranks:
            arm = Arm(lora(rank), stage=stage)
            best = lab.bench.tuned(arm, LORA_RATES)
            losses[rank] = lab.bench.losses(arm.at(best.rate), RULE.seeds)
            tuned[f"rank {rank}, {stage}"] = best
            mean = Paired(tuple(losses[rank].values()))
            rows.append([stage, rank, f"{best.rate:g}", mean.value, *mean.bounds()])
        for rank in ranks[:-1]:
            beside = f"log loss of rank {rank} / rank {HIGH}, {stage}"
            estimates[ASKED if (stage, rank) == (NEW_TASK, LOW) else beside] = log_ratios(losses[rank], losses[HIGH])
        if stage == NEW_TASK:
            worst = max(loss for rank in (LOW, HIGH) for loss in losses[rank].values())
            first = Arm(lora(LOW), tuned[f"rank {LOW}, {stage}"].rate)
            void = nothing_learnt(worst, lab.bench.train(first, RULE.seeds[0]).before)
            curves = {f"seed {s}": (list(ranks), [losses[r][s] for r in ranks]) for s in RULE.seeds}
    head = ["task", "rank", "learning rate", "held-out loss", "from", "to"]
    picture = Picture(
        pictures.lines(curves, x_label="rank", y_label="held-out loss, nats per learnt token", log_x=True, log_y=True),
        "Held-out loss against the rank on a task that the base can't do, each rank at its own best learning rate.",
        "A curve for each seed",
        Table(head, rows, "Means over the seeds, with intervals for the mean"),
    )
    asked = {arm: tuned[arm] for arm in (f"rank {LOW}, {NEW_TASK}", f"rank {HIGH}, {NEW_TASK}")}
    figures = {"rows": rows, "rates": {arm: best.to_json() for arm, best in tuned.items()}}
    return Outcome(estimates, [picture], figures, asked, void)
