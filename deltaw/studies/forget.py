"""forget: at the same task loss, LoRA has forgotten less than full fine-tuning.

That a method which learns less forgets less says little. What matters is the price: how much is forgotten at the same
task loss. Over a sweep of learning rates each method draws a path of (task loss, forgetting), so two methods can be
compared where their paths first reach the same loss: a higher rate that ends at that loss again has overshot. Between
two rates of the grid the task's loss and general text's rise are interpolated linearly, KL and the rate as powers.

The loss chosen is the larger of the two methods' best: the hardest one that both reach, and a trained point of one of
them.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from deltaw.analysis import pictures
from deltaw.analysis.page import Block, Cell, Picture, Table
from deltaw.studies.lab import Lab, Trial
from deltaw.studies.study import Claim, Judgement, Outcome

COMPARED = (16, 64)  # ranks
SIGMAS = 2 * 2**0.5  # twice the noise of a difference
LEAST = 1e-9  # the lowest KL, which rounding may bring to 0

CLAIM = Claim(
    name="forget",
    title="Does LoRA forget less at the same task loss?",
    claim="Where LoRA and full fine-tuning have learnt the task equally well, LoRA has forgotten less.",
    source="LoRA Learns Less and Forgets Less (Biderman et al. 2024): after code, HumanEval .498 at rank 256 and .497 "
    "of full fine-tuning; what is left on general tasks .509 at rank 64, .414 of full fine-tuning. Shuttleworth et "
    "al. 2024 find the same",
    method=f"the sweeps over learning rates of ranks {' and '.join(map(str, COMPARED))} and of full fine-tuning; on "
    "general text the rise of the loss and KL(base ‖ tuned), nats per token; between two rates interpolated at the "
    "larger of both methods' best task losses",
    rule="held, if at that loss LoRA's KL is lower than full fine-tuning's by more than seeds make (2√2 standard "
    "deviations of log KL over three seeds of rank 16) and its rise is lower, at both ranks; did not hold, if at "
    "either rank KL or rise is higher by more than seeds make; otherwise, or where the losses of two sweeps don't "
    "overlap, too noisy",
)


class Point(NamedTuple):
    """The end of a training, in nats per token."""

    rate: float
    loss: float  # of the task, held out
    rise: float  # of general text's loss
    kl: float  # KL(base ‖ tuned) on general text


class Noise(NamedTuple):
    """Standard deviations over seeds."""

    rise: float
    log_kl: float


def verdict(matched: Sequence[tuple[Point, Point] | None], noise: Noise) -> Judgement:
    """(LoRA, full fine-tuning) at one task loss, a pair for each rank; None if there is no such loss."""
    pairs = [pair for pair in matched if pair is not None]
    if not pairs or len(pairs) < len(matched):
        return "too noisy"
    rises = [lora.rise - full.rise for lora, full in pairs]
    ratios = [math.log(lora.kl / full.kl) for lora, full in pairs]
    if max(ratios) > SIGMAS * noise.log_kl or max(rises) > SIGMAS * noise.rise:
        return "did not hold"
    return "held" if max(ratios) < -SIGMAS * noise.log_kl and max(rises) < 0 else "too noisy"


def at_best(lora: Sequence[Point], full: Sequence[Point]) -> tuple[Point, Point] | None:
    """Both methods at the larger of their best losses."""
    loss = max(min(point.loss for point in points) for points in (lora, full))
    one, other = at_loss(lora, loss), at_loss(full, loss)
    return (one, other) if one and other else None


def at_loss(points: Sequence[Point], loss: float) -> Point | None:
    """Where a sweep, in the order of its rates, first reaches `loss`."""
    place = crossing([point.loss for point in points], loss)
    if place is None:
        return None
    n, t = place
    a, b = points[n], points[min(n + 1, len(points) - 1)]
    return Point(a.rate ** (1 - t) * b.rate**t, loss, a.rise + t * (b.rise - a.rise), a.kl ** (1 - t) * b.kl**t)


def crossing(losses: Sequence[float], loss: float) -> tuple[int, float] | None:
    """(n, t): the first place where `loss` lies t of the way from losses[n] to losses[n + 1]."""
    for n, (a, b) in enumerate(pairwise(losses)):
        if min(a, b) <= loss <= max(a, b):
            return n, (loss - a) / (b - a) if b != a else 0.0
    return None


def run(lab: Lab) -> Outcome:
    ranks = [f"rank {rank}" for rank in COMPARED]
    sweeps = {name: sweep_of(lab, {"rank": r, "alpha": 32}) for name, r in zip(ranks, COMPARED, strict=True)}
    sweeps["full"] = full = sweep_of(lab, "full")
    seeds = [point_of([lab.train(f"rank 16, seed {seed}", seed=seed)], 0.0) for seed in range(3)]
    noise = Noise(
        statistics.stdev(point.rise for point in seeds), statistics.stdev(math.log(point.kl) for point in seeds)
    )
    matched = {name: at_best(sweeps[name], full) for name in ranks}
    sentences = [
        f"At a task loss of {pair[0].loss:.3f} {name} has moved general text by a KL of {pair[0].kl:.3g} and a rise of "
        f"{pair[0].rise:+.3g}, full fine-tuning by {pair[1].kl:.3g} and {pair[1].rise:+.3g}."
        if pair
        else f"The losses of {name} and of full fine-tuning don't overlap."
        for name, pair in matched.items()
    ]
    best = ", ".join(f"{name} {min(point.loss for point in points):.3f}" for name, points in sweeps.items())
    because = (
        f"{' '.join(sentences)} Seeds alone change KL by a factor of {math.exp(noise.log_kl):.2f} and the rise by "
        f"{noise.rise:.2g}. The lowest task losses are: {best}."
    )
    figures = {
        "sweeps": {name: [point._asdict() for point in points] for name, points in sweeps.items()},
        "noise": noise._asdict(),
        "matched": {
            name: {"lora": pair[0]._asdict(), "full": pair[1]._asdict()} if pair else None
            for name, pair in matched.items()
        },
    }
    blocks: list[Block] = [*scatters(sweeps), beside(sweeps, ranks)]
    return Outcome(verdict(list(matched.values()), noise), because, blocks, figures)


def sweep_of(lab: Lab, adapter: Mapping[str, int] | str) -> list[Point]:
    """A point for each rate, averaged over the seeds."""
    by_seed = [lab.sweep(adapter, seed=seed) for seed in lab.seeds]
    return [point_of([trials[rate] for trials in by_seed], rate) for rate in sorted(by_seed[0])]


def point_of(trials: Sequence[Trial], rate: float) -> Point:
    lost = [trial.forgetting for trial in trials]
    return Point(
        rate,
        statistics.fmean(trial.loss for trial in trials),
        statistics.fmean(each["loss_after"] - each["loss_before"] for each in lost),
        statistics.geometric_mean(max(each["kl"], LEAST) for each in lost),
    )


def scatters(sweeps: Mapping[str, Sequence[Point]]) -> list[Picture]:
    labels = {name: [f"{point.rate:g}" for point in points] for name, points in sweeps.items()}
    rows: list[list[Cell]] = [
        [name, f"{point.rate:g}", point.loss, point.kl, point.rise]
        for name, points in sweeps.items()
        for point in points
    ]
    table = Table(["", "lr", "task loss", "KL", "rise"], rows, "Forgetting on general text, nats per token")
    axes = {"KL(base ‖ tuned) on general text": ("kl", True), "rise of general text's loss": ("rise", False)}
    return [
        Picture(
            pictures.scatter(
                {n: ([p.loss for p in points], [getattr(p, field) for p in points]) for n, points in sweeps.items()},
                x_label="held-out loss of the task, nats per token",
                y_label=f"{label}, nats per token",
                log_x=True,
                log_y=log,
                labels=labels,
            ),
            f"What was learnt (further left is better) against the {label} (lower is better); the numbers are rates.",
            "A dot for each training",
            table,
        )
        for label, (field, log) in axes.items()
    ]


def beside(sweeps: Mapping[str, Sequence[Point]], ranks: Sequence[str]) -> Table:
    """Every full fine-tuning beside LoRA at the same task loss, if LoRA's sweep reaches it."""
    rows: list[list[Cell]] = []
    for point in sweeps["full"]:
        loras = [at_loss(sweeps[name], point.loss) for name in ranks]
        kls, rises = ([getattr(lora, of) if lora else None for lora in loras] for of in ("kl", "rise"))
        rows.append([f"{point.rate:g}", point.loss, point.kl, *kls, point.rise, *rises])
    head = ["full's lr", "task loss", "full: KL", *(f"{n}: KL" for n in ranks), "full: rise"]
    caption = "LoRA at the task losses of full fine-tuning's runs, interpolated"
    return Table([*head, *(f"{name}: rise" for name in ranks)], rows, caption)
