"""pretrain: training from scratch needs full rank; fine-tuning doesn't.

The tiny Llama (tiny.py), in three ways. In all of them embeddings, norms and head train as well, so that only the
linear layers differ:

    full       W trains
    LoRA       W + s B A, W as it was: random in pretraining, pretrained in fine-tuning; B = 0 at first
    low rank   B A alone, W = 0, begun at the variance of a random W: A of variance 1 / N, B of 1 / R
               (in pretraining only: later it would have to discard the pretrained W)

Each way chooses the learning rate of the linear layers only. Embeddings, norms and head keep one fixed rate. Else a
rate that suits LoRA's factors, ten times full training's, would be theirs, too, and LoRA would be blamed for it.

The gap is the log of a way's held-out loss over full training's with the same seed. Fine-tuning is to an accent, which
the base mostly knows. This rule is exploratory: the study's first design had the new task as its fine-tuning, where
LoRA lagged as in pretraining (it still may: see what stands beside the study `forget`).

Letters: N inputs, R rank.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapter.attach import Attached, attach, discard
from deltaw.adapter.layer import LowRankUpdate
from deltaw.adapter.targets import linear_paths
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.base.forward import Forward
from deltaw.config import AdapterSpec, TrainConfig
from deltaw.data.loader import Loader
from deltaw.evaluation.held_out import held_out_loss
from deltaw.files.atomic import write_text_atomic
from deltaw.studies.bench import ACCENTED
from deltaw.studies.lab import Lab
from deltaw.studies.statistics import TUNED_WITH, Criterion, Estimate, Paired, Tuned, log_ratios, tune
from deltaw.studies.study import Outcome, Rule, nothing_learnt
from deltaw.studies.tiny import PRETRAINING, random_weights, tiny_llama
from deltaw.training.optim import learning_rate

RANK, TOKENS, STEPS = 16, 1024, 150
WAYS = {PRETRAINING: ("full", "LoRA", "low rank"), ACCENTED: ("full", "LoRA")}
RATES = {"full": (1.5e-3, 3e-3, 6e-3), "LoRA": (3e-3, 6e-3, 1.2e-2), "low rank": (1.5e-3, 3e-3, 6e-3)}
REST_RATE, TIMES, LITTLE = 1e-3, 2.0, 1.1
BEHIND = f"gap of {{}} from scratch − {TIMES:g} × LoRA's in fine-tuning"
FINE = "loss of LoRA / full in fine-tuning"

RULE = Rule(
    name="pretrain",
    title="Does pretraining need full rank?",
    claim="Trained from scratch, low-rank weights and LoRA on random ones end well behind full training; in "
    "fine-tuning LoRA hardly does.",
    source="GaLore (Zhao et al. 2024), perplexity on C4 at 60M and 130M parameters: full 34.06 and 25.08, LoRA 34.99 "
    "and 33.92, low-rank weights 78.18 and 45.51. At 60M LoRA is 3 % behind, at 130M 35 %",
    definition=f"The tiny Llama from scratch on words and pronunciations, {STEPS} steps of {TOKENS} bytes, fully, as "
    f"LoRA on frozen random weights and as low-rank weights, both of rank {RANK}; the pretrained one fine-tuned to an "
    f"accent in {STEPS} steps, fully and by LoRA; each at the linear layers' best rate, everything else at "
    f"{REST_RATE:g}. A gap is the log of the held-out loss over full training's with the same seed",
    criteria=(
        Criterion(BEHIND.format("LoRA"), above=0.0),
        Criterion(BEHIND.format("low rank"), above=0.0),
        Criterion(FINE, below=math.log(LITTLE), is_log=True),
    ),
    void="full training ends above half of what it began with, from scratch or in fine-tuning",
    change="longer pretraining; a fine-tuning task further from pretraining",
    design={"ways": WAYS, "rates": RATES, "rank": RANK, "rest": REST_RATE, "steps": STEPS, "tokens": TOKENS},
    exploratory=True,
)


def run(lab: Lab) -> Outcome:
    trainings = Trainings(lab)
    losses: dict[str, dict[str, dict[int, float]]] = {}
    tuned: dict[str, Tuned] = {}
    void = None
    for stage, ways in WAYS.items():
        losses[stage] = {}
        for way in ways:
            best = tune(lambda rates: trainings.losses(stage, way, rates), RATES[way])  # noqa: B023
            tuned[f"{stage}, {way}"] = best
            each = {seed: trainings.run(stage, way, best.rate, seed) for seed in RULE.seeds}
            losses[stage][way] = {seed: one["loss"] for seed, one in each.items()}
            if way == "full":
                void = void or nothing_learnt(max(losses[stage][way].values()), each[RULE.seeds[0]]["before"])
    gaps = {stage: {w: log_ratios(of[w], of["full"]) for w in of if w != "full"} for stage, of in losses.items()}
    fine = gaps[ACCENTED]["LoRA"]
    estimates: dict[str, Estimate] = {
        BEHIND.format(way): Paired(
            tuple(a - TIMES * b for a, b in zip(gaps[PRETRAINING][way].values, fine.values, strict=True))
        )
        for way in ("LoRA", "low rank")
    }
    estimates[FINE] = fine
    estimates |= {f"gap of {way}, {stage}": gap for stage, each in gaps.items() for way, gap in each.items()}
    rows: list[list[Cell]] = [
        [f"{stage}, {way}", sum(each.values()) / len(each), *each.values()]
        for stage, of in losses.items()
        for way, each in of.items()
    ]
    shown = {way: [gaps[stage].get(way) for stage in WAYS] for way in ("LoRA", "low rank")}
    picture = Picture(
        pictures.bars(
            list(WAYS),
            {
                way: [None if gap is None else 100 * math.expm1(gap.value) for gap in each]
                for way, each in shown.items()
            },
            y_label="held-out loss above full training's, percent of it",
            errors={
                way: [None if gap is None else 100 * (gap.bounds()[1] - gap.value) for gap in each]
                for way, each in shown.items()
            },
        ),
        "How far LoRA and low-rank weights end behind full training, from scratch and in fine-tuning.",
        "A group of bars for pretraining and for fine-tuning; a bar for each way",
        Table(["", "mean", *(f"seed {s}" for s in RULE.seeds)], rows, "Held-out loss, nats per learnt byte"),
    )
    return Outcome(estimates, [picture], {"losses": losses}, tuned, void)


class Trainings:
    """All runs of the study, each once: by stage, way, learning rate and seed."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.tiny, self._forward = lab, lab.tiny, tiny_llama()

    def losses(self, stage: str, way: str, rates: Sequence[float]) -> dict[float, float]:
        """By rate, with the tuning seed."""
        return {rate: self.run(stage, way, rate, TUNED_WITH)["loss"] for rate in rates}

    def run(self, stage: str, way: str, rate: float, seed: int) -> dict[str, float]:
        """{before, loss}."""
        name = hashlib.sha256(json.dumps([RULE.hash, stage, way, rate, seed]).encode()).hexdigest()[:12]
        file = self.lab.folder / "pretrain" / f"{name}.json"
        if not file.is_file():
            self.lab.display.say(f"{stage}, {way}, lr {rate:g}, seed {seed}")
            model = self._forward.model
            base = self.tiny.forward.model
            start = random_weights(model, seed) if stage == PRETRAINING else dict(base.state_dict())
            outcome = learn(self._forward, start, way, rate, self.tiny, stage, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(file, json.dumps(outcome))
        return dict(json.loads(file.read_text(encoding="utf-8")))


def learn(
    forward: Forward, start: Mapping[str, Tensor], way: str, rate: float, tiny: Any, stage: str, seed: int
) -> dict[str, float]:
    """Train the model from `start` in one of the ways and measure it. It has no adapter before and after."""
    model = forward.model
    model.load_state_dict(start)
    held_out: Sequence[Any] = tiny.held_out(stage)
    before, _ = held_out_loss(forward, held_out)
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    attached = None if way == "full" else _attach(model, way, generator)
    linear = attached.parameters if attached else [model.get_submodule(path).weight for path in linear_paths(model)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in trained if all(parameter is not other for other in linear)]
    groups: list[dict[str, Any]] = [{"params": linear, "peak": rate}, {"params": rest, "peak": REST_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    config = TrainConfig(lr=1.0)  # for its schedule: shares of each group's peak
    for step, (batches, _) in enumerate(islice(Loader(tiny.rows(stage), TOKENS, TOKENS, seed), STEPS)):
        for batch in batches:
            loss, count = forward.loss(batch)
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, STEPS, config)
        optimizer.step()
        optimizer.zero_grad()
    loss_after, _ = held_out_loss(forward, held_out)
    if attached:
        discard(attached)
    return {"before": before, "loss": loss_after}


@torch.no_grad()
def _attach(model: nn.Module, way: str, generator: torch.Generator) -> Attached:
    """LoRA's factors on every linear layer but the head, W frozen; for low rank W = 0 and B A is a start of its own."""
    for path in linear_paths(model):
        model.get_submodule(path).requires_grad_(False)
    alpha = 2.0 * RANK if way == "LoRA" else 1.0 * RANK  # a scale of 2, or of 1
    attached = attach(model, AdapterSpec(rank=RANK, alpha=alpha), generator=generator, fuse=())
    if way == "low rank":
        for layer in attached.layers.values():
            assert isinstance(layer, LowRankUpdate)
            m, n = layer.base.weight.shape
            layer.base.module.weight.zero_()  # type: ignore[operator]  # the model is this study's own
            a_RN, b_MR = torch.randn(RANK, n, generator=generator), torch.randn(m, RANK, generator=generator)
            layer.start(a_RN / n**0.5, b_MR / RANK**0.5)
    return attached
