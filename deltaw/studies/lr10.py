"""lr10: the best learning rate of LoRA is about ten times full fine-tuning's, and hardly depends on the rank."""

import math

from deltaw.analysis import pictures
from deltaw.analysis.page import Picture, Table
from deltaw.studies.lab import Lab, Trial, best
from deltaw.studies.study import Claim, Outcome

LOW, HIGH = 3.0, 40.0  # of the ratio; the claim's is 10 to 15, the grid's step a factor of 3
SHIFT = 3.5  # between the best rates of ranks: one step of the grid

CLAIM = Claim(
    name="lr10",
    title="Does LoRA want ten times the learning rate?",
    claim="LoRA's best learning rate is about 10 times full fine-tuning's (15 times in runs below 100 steps), "
    "and nearly the same for all ranks.",
    source="LoRA Without Regret (Schulman et al. 2025): 9.8 times over 14 models, less than 2 times different "
    "over ranks",
    method="the runs of the study `rank`; the best rate is the least point of a parabola through the three points "
    "around the best one, over log loss and log rate",
    rule=f"held, if the median over ranks of LoRA's best rate lies between {LOW:g} and {HIGH:g} times full "
    f"fine-tuning's, and the ranks' "
    f"best rates lie within a factor of {SHIFT:g}; too noisy, if a best rate lies at the grid's end",
)


def run(lab: Lab) -> Outcome:
    sweeps = lab.sweeps()
    rates = {name: best_rate(trials) for name, trials in sweeps.items()}
    ends = [name for name, trials in sweeps.items() if best(trials)[0] in (min(trials), max(trials))]
    lora = sorted(rate for name, rate in rates.items() if name != "full")
    middle = math.sqrt(lora[(len(lora) - 1) // 2] * lora[len(lora) // 2])
    ratio, shift = middle / rates["full"], lora[-1] / lora[0]
    because = (
        f"LoRA's best rate is {middle:.2g} (median over ranks), full fine-tuning's {rates['full']:.2g}: "
        f"{ratio:.1f} times. "
        f"Over the ranks it varies by a factor of {shift:.1f}."
    )
    if ends:
        because += f" The best of {', '.join(ends)} lies at the end of the grid, so its true best may lie beyond."
    holds = LOW <= ratio <= HIGH and shift <= SHIFT
    names = list(rates)
    picture = Picture(
        pictures.bars(names, {"best rate": [rates[name] for name in names]}, y_label="best learning rate", log_y=True),
        "The learning rate with which each ends at the lowest held-out loss.",
        "A bar for each rank and one for full fine-tuning",
        Table(
            ["", "best rate", "times full's"], [[n, rates[n], rates[n] / rates["full"]] for n in names], "Best rates"
        ),
    )
    figures = {"best_rates": rates, "ratio": ratio, "over_ranks": shift}
    return Outcome("too noisy" if ends else "held" if holds else "did not hold", because, [picture], figures)


def best_rate(trials: dict[float, Trial]) -> float:
    """The rate of the lowest loss, interpolated if the grid's best point has a neighbour on either side."""
    rates = sorted(trials)
    at = rates.index(best(trials)[0])
    if at in (0, len(rates) - 1):
        return rates[at]
    x, y = zip(*[(math.log(r), math.log(trials[r].loss)) for r in rates[at - 1 : at + 2]], strict=True)
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    if right == left:
        return rates[at]
    return math.exp((x[0] + x[1]) / 2 - left * (x[2] - x[0]) / 2 / (right - left))
