"""batch: LoRA loses more than full fine-tuning does if the batches are large.

The three sizes see equally much data, so a larger batch means fewer steps, and both ways lose by that. The question is
whether the gap between them grows. Each way has the learning rate that is best for it at each size: a batch four times
as large wants a higher one, and a gap at one common rate would be the rate's.
"""

from collections.abc import Mapping

from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.studies.bench import FULL_RATES, LORA_RATES, STEPS, TOKENS, Arm, lora
from deltaw.studies.lab import Lab
from deltaw.studies.means import band, cells, mean_of
from deltaw.studies.statistics import Criterion, Estimate, Paired, Tuned
from deltaw.studies.study import Outcome, Rule, nothing_learnt

RANK, SIZES, MORE = 16, (256, 1024, 4096), 0.02
WAYS: Mapping[str, Mapping[str, int] | str] = {"LoRA": lora(RANK), "full": "full"}
RATES = {"LoRA": LORA_RATES, "full": FULL_RATES}
ASKED = f"growth of LoRA's gap from batches of {SIZES[0]} to {SIZES[-1]} tokens"

RULE = Rule(
    name="batch",
    title="Does LoRA mind large batches more?",
    claim="LoRA tolerates large batches less than full fine-tuning: its loss falls behind as the batch grows, whatever "
    "the rank.",
    source="LoRA Without Regret (Schulman et al. 2025): a gap that opens at larger batches (128 and above) on 10 000 "
    "examples",
    definition=f"LoRA of rank {RANK}, alpha 32, and full fine-tuning with batches of {', '.join(map(str, SIZES))} "
    "tokens on equally much data (one training more than the other by at most 1.4 %), each at its best learning rate "
    "at that size. The gap g is LoRA's held-out loss / full fine-tuning's − 1 with the same seed; asked is "
    f"g({SIZES[-1]}) − g({SIZES[0]})",
    criteria=(Criterion(ASKED, above=MORE),),
    void="a loss is above half of the base's: then too little was learnt to compare",
    change="more data, so that the largest batch has more steps than a few dozen; other ranks",
    design={"rank": RANK, "alpha": 32, "sizes": SIZES, "tokens": STEPS * TOKENS,
            "rates": {way: list(rates) for way, rates in RATES.items()}},
)  # fmt: skip


def arm_of(way: str, size: int) -> Arm:
    return Arm(WAYS[way], tokens=size, steps=round(STEPS * TOKENS / size))


def percent(share: float) -> float:
    return 100 * share


def run(lab: Lab) -> Outcome:
    tuned: dict[str, Tuned] = {}
    losses: dict[str, dict[int, dict[int, float]]] = {way: {} for way in WAYS}
    for way in WAYS:
        for size in SIZES:
            arm = arm_of(way, size)
            tuned[f"{way}, {size}"] = best = lab.bench.tuned(arm, RATES[way])
            losses[way][size] = lab.bench.losses(arm.at(best.rate), RULE.seeds)
    gaps = {
        size: Paired(tuple(losses["LoRA"][size][seed] / losses["full"][size][seed] - 1 for seed in RULE.seeds))
        for size in SIZES
    }
    least, most = gaps[SIZES[0]], gaps[SIZES[-1]]
    estimates: dict[str, Estimate] = {
        ASKED: Paired(tuple(b - a for a, b in zip(least.values, most.values, strict=True))),
        **{f"LoRA's gap at {size} tokens": gap for size, gap in gaps.items()},
    }
    before = lab.bench.train(arm_of("full", SIZES[1]).at(tuned[f"full, {SIZES[1]}"].rate), RULE.seeds[0]).before
    worst = max(loss for sizes in losses.values() for by_seed in sizes.values() for loss in by_seed.values())
    rows: list[list[Cell]] = []
    for way, sizes in losses.items():
        for size, by_seed in sizes.items():
            rows.append(
                [way, size, arm_of(way, size).steps, f"{tuned[f'{way}, {size}'].rate:g}", *cells(mean_of(by_seed))]
            )
    picture = Picture(
        pictures.lines(
            {"LoRA's gap": (list(SIZES), [percent(gap.value) for gap in gaps.values()])},
            x_label="tokens of a batch",
            y_label="LoRA's loss above full fine-tuning's, percent",
            log_x=True,
            bands={"LoRA's gap": band(SIZES, list(gaps.values()), percent)},
        ),
        "How far LoRA ends behind full fine-tuning, by the size of the batch, on equally much data; the band is the "
        "interval for the mean over the seeds.",
        "A curve over three batch sizes",
        Table(["", "batch", "steps", "learning rate", "held-out loss", "from", "to"], rows, "Means over the seeds"),
    )
    return Outcome(estimates, [picture], {"losses": losses}, tuned, nothing_learnt(worst, before))
