"""plus: LoRA learns better if B's learning rate is a few times A's.

B begins at zero and A doesn't, so equal rates move them by different shares of themselves. LoRA+ argues that in wide
models B's rate has to be larger, and finds 1 to 2 % on tasks that are far from pretraining. A higher rate for B
alone is also a higher rate on the whole, so each ratio gets the rate of A that suits it best. Which of the two ratios
above 1 is compared is chosen together with the rates, on the tuning seed.
"""

import math

from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.studies.bench import Arm, lora
from deltaw.studies.lab import Lab
from deltaw.studies.means import cells, mean_of
from deltaw.studies.statistics import Criterion, Estimate, Tuned, log_ratios
from deltaw.studies.study import Outcome, Rule, nothing_learnt

RATIOS = (1, 4, 16)
RATES = {
    1: (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),  # of A; B's is the ratio times that
    4: (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
    16: (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3),
}
RANK, BETTER = 16, 0.99
ASKED = "loss with B's rate a few times A's / loss with one rate"

RULE = Rule(
    name="plus",
    title="Should B learn faster than A?",
    claim="With B's learning rate λ times A's (λ > 1, about 16), LoRA does 1 to 2 % better than with one rate.",
    source="LoRA+ (Hayou et al. 2024): on MNLI, RoBERTa-base 84.5 → 86.5; 1-2 % and up to twice as fast",
    definition=f"LoRA of rank {RANK}, alpha 32, on a task that the base can't do, with B's rate "
    f"{', '.join(map(str, RATIOS))} times A's, each at the rate of A that is best for it; held-out loss as a ratio "
    "with the same seed. Compared with ratio 1 is the one of the others that does best with the tuning seed",
    criteria=(Criterion(ASKED, below=math.log(BETTER), is_log=True),),
    void="a loss is above half of the base's: then too little was learnt to compare",
    change="a wider model (the argument is about width, and this one has 128), a longer training",
    design={"ratios": RATIOS, "rates": {str(k): v for k, v in RATES.items()}, "rank": RANK, "alpha": 32,
            "steps": Arm().steps, "tokens": Arm().tokens},
)  # fmt: skip


def arm_of(ratio: int) -> Arm:
    return Arm(lora(RANK), train={} if ratio == 1 else {"lr_ratio_b": float(ratio)})


def run(lab: Lab) -> Outcome:
    tuned: dict[str, Tuned] = {f"ratio {r}": lab.bench.tuned(arm_of(r), RATES[r]) for r in RATIOS}
    losses = {r: lab.bench.losses(arm_of(r).at(tuned[f"ratio {r}"].rate), RULE.seeds) for r in RATIOS}
    best = min(RATIOS[1:], key=lambda ratio: min(tuned[f"ratio {ratio}"].losses.values()))
    estimates: dict[str, Estimate] = {ASKED: log_ratios(losses[best], losses[1])}
    for ratio in RATIOS[1:]:
        estimates[f"log of (loss with ratio {ratio} / with 1)"] = log_ratios(losses[ratio], losses[1])
    before = lab.bench.train(arm_of(1).at(tuned["ratio 1"].rate), RULE.seeds[0]).before
    void = nothing_learnt(max(loss for by_seed in losses.values() for loss in by_seed.values()), before)
    curves = {
        name: (sorted(one.losses), [one.losses[rate] for rate in sorted(one.losses)]) for name, one in tuned.items()
    }
    rows: list[list[Cell]] = []
    for ratio, by_seed in losses.items():
        rows.append([f"ratio {ratio}", f"{tuned[f'ratio {ratio}'].rate:g}", *cells(mean_of(by_seed))])
    head = ["B's rate / A's", "A's rate", "held-out loss", "from", "to"]
    seeds = {f"seed {s}": (list(RATIOS), [losses[r][s] for r in RATIOS]) for s in RULE.seeds}
    blocks = [
        Picture(
            pictures.lines(seeds, x_label="B's learning rate / A's", y_label="held-out loss", log_x=True),
            "Held-out loss against the ratio of B's learning rate to A's, each ratio at its best rate.",
            "A curve for each seed",
            Table(head, rows, "Means over the seeds, with intervals for the mean"),
        ),
        Picture(
            pictures.lines(curves, x_label="A's learning rate", y_label="held-out loss", log_x=True, log_y=True),
            "Held-out loss against A's learning rate with the tuning seed.",
            "A curve for each ratio",
            Table(
                ["", "rate: loss"],
                [
                    [name, ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(one.losses.items()))]
                    for name, one in tuned.items()
                ],
                "A's rate: held-out loss",
            ),
        ),
    ]
    words = f"The ratio that was compared, by the tuning seed, is {best}."
    return Outcome(estimates, blocks, {"losses": losses, "compared": best}, tuned, void, words)
