"""lr10: the best learning rate of LoRA is about ten times full fine-tuning's.

A best rate is the least point of a parabola of log loss over log rate, through three rates a factor of 2 apart around
the one that the tuning seed chose, for each seed by itself. The ratio of two such rates has a seed's noise in both; it
is the logarithm of the ratio that is averaged. A parabola that has no least point leaves the study unsettled.
"""

import math

from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.studies.bench import FULL_RATES, LORA_RATES, Arm, lora
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import Criterion, Paired, valley
from deltaw.studies.study import Outcome, Rule, nothing_learnt

RANK, STEP = 16, 2.0
LOW, HIGH = 6.7, 22.0  # 10 / 1.5 to 15 · 1.5
ASKED = "best rate of LoRA / of full fine-tuning"

RULE = Rule(
    name="lr10",
    title="Does LoRA want ten times the learning rate?",
    claim="LoRA's best learning rate is about 10 times full fine-tuning's (15 times in runs below 100 steps).",
    source="LoRA Without Regret (Schulman et al. 2025): 9.8 times over 14 models",
    definition=f"LoRA of rank {RANK}, alpha 32, and full fine-tuning of the same layers; by seed the least point of a "
    f"parabola of log loss over log rate, at three rates a factor of {STEP:g} apart",
    criteria=(Criterion(ASKED, above=math.log(LOW), below=math.log(HIGH), is_log=True),),
    void="at its best rate either ends above half of the base's loss",
    change="another alpha (LoRA's best rate follows it), longer runs, where the paper has 10 and not 15, other widths",
    design={"rank": RANK, "step": STEP, "rates": [LORA_RATES, FULL_RATES], "steps": Arm().steps},
)


def run(lab: Lab) -> Outcome:
    arms = {"LoRA": (Arm(lora(RANK)), LORA_RATES), "full": (Arm("full"), FULL_RATES)}
    tuned, best, void = {}, {}, None
    curves: dict[str, dict[float, Paired]] = {}
    for name, (arm, rates) in arms.items():
        tuned[name] = lab.bench.tuned(arm, rates)
        around = [float(f"{tuned[name].rate * STEP**power:.4g}") for power in (-1, 0, 1)]
        losses = {rate: lab.bench.by_seed(arm.at(rate), RULE.seeds) for rate in around}
        best[name] = [valley({rate: losses[rate][seed].loss for rate in around}) for seed in RULE.seeds]
        curves[name] = {rate: Paired(tuple(one.loss for one in losses[rate].values())) for rate in around}
        middle = losses[around[1]].values()
        void = void or nothing_learnt(max(one.loss for one in middle), next(iter(middle)).before)
    ratios = tuple(one - other for one, other in zip(best["LoRA"], best["full"], strict=True))
    rows: list[list[Cell]] = [
        [seed, *(math.exp(best[name][at]) for name in arms), math.exp(ratios[at])] for at, seed in enumerate(RULE.seeds)
    ]
    picture = Picture(
        pictures.lines(
            {name: (list(means), [mean.value for mean in means.values()]) for name, means in curves.items()},
            x_label="learning rate",
            y_label="held-out loss, nats per learnt token",
            log_x=True,
            log_y=True,
            bands={
                name: (list(means), [m.bounds()[0] for m in means.values()], [m.bounds()[1] for m in means.values()])
                for name, means in curves.items()
            },
        ),
        "Held-out loss at three learning rates around the best one.",
        "A curve for LoRA and one for full fine-tuning, means of the seeds with intervals",
        Table(["seed", "LoRA's best rate", "full's best rate", "ratio"], rows, "Least points of the parabolas"),
    )
    return Outcome({ASKED: Paired(ratios)}, [picture], {"rows": rows}, tuned, void)
