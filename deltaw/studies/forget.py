"""forget: at the same task loss, LoRA has forgotten less than full fine-tuning.

That a method which learns less forgets less says little. What matters is the price: how much is forgotten at the same
task loss. A trained update can be worn at any strength c, W + c ΔW, so each training draws a front of (task loss,
forgetting) from the base, c = 0, through the training's end, c = 1, and a little beyond. Two fronts are compared at the
task loss that is the larger of both methods' best: the hardest one that both reach. Between two strengths the rise of
general text's loss is interpolated linearly, KL in its logarithm.

The bootstrap draws the general passages again, for all seeds alike: whether the difference is of these passages.

Letters: P passages, B draws.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.studies.bench import FULL_RATES, LORA_RATES, Arm, Bench, Trained, by_passage, lora, weaken
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import Criterion, Estimate, Paired, Resampled, differences, log_ratios
from deltaw.studies.study import Outcome, Rule, nothing_learnt

RANK, DRAWS = 16, 1000
STRENGTHS = (0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)
KL = "KL of LoRA / full at one task loss"
RISE = "rise of LoRA − full at one task loss, nats"

RULE = Rule(
    name="forget",
    title="Does LoRA forget less at the same task loss?",
    claim="Where LoRA and full fine-tuning have learnt the task equally well, LoRA has forgotten less.",
    source="Shuttleworth et al. 2024 (An Illusion of Equivalence) claim it. LoRA Learns Less and Forgets Less "
    "(Biderman et al. 2024) has LoRA learn less and forget less, and both seem to lie on the same Pareto curve",
    definition=f"LoRA of rank {RANK} and full fine-tuning at their best rates, worn at strengths "
    f"{', '.join(f'{c:g}' for c in STRENGTHS)}; by seed the KL(base ‖ tuned) and the rise of the loss on general "
    "text at the larger of both methods' lowest task losses. What both forget at their own ends is told beside it",
    criteria=(Criterion(KL, below=0.0, is_log=True), Criterion(RISE, below=0.0)),
    void="either ends above half of the base's loss, or the fronts share no task loss",
    change="longer training at lower rates, as in the papers; a penalty on general text, which both would gain by",
    design={"rank": RANK, "strengths": STRENGTHS, "rates": [LORA_RATES, FULL_RATES], "steps": Arm().steps},
)


class Point(NamedTuple):
    """An update worn at some strength. `passages_P4`: general text, by passage (bench.by_passage)."""

    strength: float
    loss: float
    passages_P4: Tensor

    @property
    def kl(self) -> float:
        return float(self.passages_P4[:, 2].sum() / self.passages_P4[:, 3].sum())

    @property
    def rise(self) -> float:
        return float((self.passages_P4[:, 1] - self.passages_P4[:, 0]).sum() / self.passages_P4[:, 3].sum())


class Lost(NamedTuple):
    """Forgetting at a task loss: log KL, the rise, and both by passage, to be drawn again."""

    log_kl: float
    rise: float


def run(lab: Lab) -> Outcome:
    arms = {"LoRA": (Arm(lora(RANK)), LORA_RATES), "full": (Arm("full"), FULL_RATES)}
    tuned = {name: lab.bench.tuned(arm, rates) for name, (arm, rates) in arms.items()}
    trained = {name: lab.bench.by_seed(arm.at(tuned[name].rate), RULE.seeds) for name, (arm, _) in arms.items()}
    fronts: dict[str, dict[int, list[Point]]] = {name: {} for name in arms}
    with lab.display.task("wearing updates at several strengths", len(arms) * len(RULE.seeds)) as progress:
        for name, by_seed in trained.items():
            for seed, one in by_seed.items():
                fronts[name][seed] = front(lab.bench, one)
                progress(sum(map(len, fronts.values())))
    matched = {seed: at_one_loss(fronts["LoRA"][seed], fronts["full"][seed]) for seed in RULE.seeds}
    pairs = [pair for pair in matched.values() if pair is not None]
    worst = max(one.loss for by_seed in trained.values() for one in by_seed.values())
    void = nothing_learnt(worst, trained["LoRA"][RULE.seeds[0]].before)
    if len(pairs) < len(matched):
        void = void or "the two fronts share no task loss"
    estimates: dict[str, Estimate] = {
        KL: Paired(tuple(one.log_kl - other.log_kl for one, other in pairs)),
        RISE: Paired(tuple(one.rise - other.rise for one, other in pairs)),
        "rise at one task loss, other passages (bootstrap)": drawn_again(fronts, RULE.seeds),
    }
    lost = {n: {s: one.general - one.general_before for s, one in each.items()} for n, each in trained.items()}
    learnt = {n: {s: one.loss for s, one in each.items()} for n, each in trained.items()}
    estimates["log task loss of LoRA / full, each at its end"] = log_ratios(learnt["LoRA"], learnt["full"])
    estimates["rise of LoRA − full, each at its end"] = differences(lost["LoRA"], lost["full"])
    figures = {
        name: {str(seed): [[p.strength, p.loss, p.kl, p.rise] for p in points] for seed, points in each.items()}
        for name, each in fronts.items()
    }
    return Outcome(estimates, [picture_of(fronts)], {"fronts": figures}, tuned, void)


def front(bench: Bench, one: Trained) -> list[Point]:
    """Task loss and forgetting at each strength, the base first."""
    adapter, points = one.adapter(), []
    with bench.wearing(adapter) as attached:
        for strength in STRENGTHS:
            weaken(attached, adapter, strength)
            points.append(Point(strength, bench.loss(), by_passage(bench.forward, attached, bench.general)))
    base_P4 = points[0].passages_P4.clone()
    base_P4[:, 1], base_P4[:, 2] = base_P4[:, 0], 0
    return [Point(0.0, one.before, base_P4), *points]


def at_one_loss(lora_front: Sequence[Point], full_front: Sequence[Point]) -> tuple[Lost, Lost] | None:
    """Both at the larger of their lowest losses."""
    loss = max(min(point.loss for point in points) for points in (lora_front, full_front))
    one, other = at_loss(lora_front, loss), at_loss(full_front, loss)
    return (one, other) if one and other else None


def at_loss(points: Sequence[Point], loss: float) -> Lost | None:
    """Where a front, from the base on, first reaches a loss."""
    for a, b in pairwise(points):
        if b.loss <= loss <= a.loss:
            t = (a.loss - loss) / (a.loss - b.loss) if a.loss != b.loss else 1.0
            low, high = (math.log(max(point.kl, 1e-12)) for point in (a, b))
            return Lost(low + t * (high - low), a.rise + t * (b.rise - a.rise))
    return None


def drawn_again(fronts: dict[str, dict[int, list[Point]]], seeds: Sequence[int]) -> Resampled:
    """The mean rise of LoRA less full's at one task loss, on other draws of the general passages."""
    passages = len(fronts["LoRA"][seeds[0]][0].passages_P4)
    random = np.random.default_rng(0)

    def mean(rows: np.ndarray) -> float:
        total = []
        for seed in seeds:
            some = [
                [p._replace(passages_P4=p.passages_P4[torch.from_numpy(rows)]) for p in fronts[n][seed]]
                for n in ("LoRA", "full")
            ]
            pair = at_one_loss(*some)
            total.append(pair[0].rise - pair[1].rise if pair else math.nan)
        return sum(total) / len(total)

    draws = tuple(mean(random.integers(0, passages, passages)) for _ in range(DRAWS))
    return Resampled(mean(np.arange(passages)), draws)


def picture_of(fronts: dict[str, dict[int, list[Point]]]) -> Picture:
    rows: list[list[Cell]] = [
        [name, seed, point.strength, point.loss, point.kl, point.rise]
        for name, each in fronts.items()
        for seed, points in each.items()
        for point in points
    ]
    dots = {
        name: (
            [p.loss for points in each.values() for p in points[1:]],
            [p.kl for points in each.values() for p in points[1:]],
        )
        for name, each in fronts.items()
    }
    return Picture(
        pictures.scatter(
            dots,
            x_label="held-out loss of the task",
            y_label="KL(base ‖ tuned) on general text, nats per token",
            log_x=True,
            log_y=True,
        ),
        "What was learnt (further left is better) against what was forgotten (lower is better), each update worn at "
        "several strengths.",
        "A dot for each strength and seed of LoRA and of full fine-tuning",
        Table(["", "seed", "strength", "task loss", "KL", "rise"], rows, "Nats per token"),
    )
