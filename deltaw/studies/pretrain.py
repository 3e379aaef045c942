"""pretrain: learning from scratch needs weights of full rank, fine-tuning doesn't.

Both are tried on a Llama small enough to be pretrained in a minute: bytes as tokens, random weights of variance 1 / N
for N inputs. It is pretrained on words and their pronunciations, "cat>KAET". Fine-tuning teaches what it mostly knows,
in an accent: a few sounds become others, "cat>KAAT". A new task is the way back, "KAET<cat", which it has never seen
(that was the fine-tuning in the rule's first draft; LoRA lagged by a quarter there). It is trained in three ways; in
all of them embeddings, norms and head train, so that only the linear layers differ:

    full       W trains
    LoRA       W + s B A, W as it was: random in pretraining, pretrained in fine-tuning; B = 0 at first
    low rank   B A alone, W = 0, begun at the variance of a random W: A of variance 1 / N, B of 1 / R
               (in pretraining only: later it would have to discard the pretrained W)

Each way chooses the learning rate of the linear layers only. Embeddings, norms and head keep one fixed rate. Else a
rate that suits LoRA's factors, ten times full training's, would be theirs, too, and LoRA would be blamed for it.

The measure is how far a way ends behind full training, as a share of full training's loss. Everything runs on deltaw's
own parts except the head and the norms, whose kernels give weights no gradient: they run on the model's own code, here
with gradients.

Letters: N inputs, R rank.
"""

import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.adapter.attach import Attached, attach, detach
from deltaw.adapter.layer import LowRankUpdate
from deltaw.adapter.targets import linear_paths
from deltaw.analysis import pictures
from deltaw.analysis.page import Cell, Picture, Table
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.load import open_base, open_skeleton
from deltaw.base.source import Source
from deltaw.config import AdapterSpec, TrainConfig
from deltaw.data.builtin import read_builtin
from deltaw.data.example import Example
from deltaw.data.loader import Loader
from deltaw.data.row import Row
from deltaw.evaluation.held_out import held_out_loss
from deltaw.files.atomic import write_text_atomic
from deltaw.files.safetensors import save_safetensors
from deltaw.files.shards import SINGLE
from deltaw.studies.lab import Lab
from deltaw.studies.study import Claim, Judgement, Outcome
from deltaw.training.optim import learning_rate

HIDDEN, RANK = 128, 16
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": HIDDEN,
    "intermediate_size": 3 * HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
TOKENS, HELD_OUT = 1024, 500
STEPS = {"pretraining": 300, "fine-tuning": 150, "a new task": 150}
FULL_STEPS = {"pretraining": 3000, "fine-tuning": 600, "a new task": 600}
ROWS = {"pretraining": 60_000, "fine-tuning": 4_000, "a new task": 4_000}
WAYS = {"pretraining": ("full", "LoRA", "low rank"), "fine-tuning": ("full", "LoRA"), "a new task": ("full", "LoRA")}
ACCENT = {"AE": "AA", "ER": "AH", "IH": "IY", "OW": "AO", "T": "D", "Z": "S"}
RATES, REST_RATE = (1e-3, 3e-3, 1e-2), 1e-3  # at 3e-2 LoRA was tried on the new task, and ended at 2.8 nats
TIMES = 2.0

Weights = dict[str, Tensor]
Losses = Mapping[str, float]  # by way

CLAIM = Claim(
    name="pretrain",
    title="Does pretraining need full rank?",
    claim="Trained from scratch, low-rank weights and LoRA on random ones end well behind full training; in "
    "fine-tuning LoRA hardly does.",
    source="GaLore (Zhao et al. 2024), perplexity on C4 at 60M and 130M parameters: full 34.06 and 25.08, LoRA 34.99 "
    "and 33.92, low-rank weights 78.18 and 45.51",
    method=f"a Llama of width {HIDDEN} from scratch on words and pronunciations, {STEPS['pretraining']} steps of "
    f"{TOKENS} bytes, fully, as LoRA on frozen random weights and as low-rank weights, both of rank {RANK}; the fully "
    f"pretrained one fine-tuned to an accent in {STEPS['fine-tuning']} steps, fully and by LoRA of that rank "
    f"(full grid: {FULL_STEPS['pretraining']} and {FULL_STEPS['fine-tuning']}); each at the linear layers' best "
    f"learning rate of {', '.join(f'{rate:g}' for rate in RATES)}, everything else at {REST_RATE:g}. "
    "A gap is the held-out loss above full training's, as a share of it",
    rule=f"held, if in pretraining the smaller gap of LoRA and low rank is more than {TIMES:g} times LoRA's in "
    "fine-tuning; too noisy, if that hangs on no more than seeds do; a new task, sounds to letters, is reported beside "
    "it",
)


@dataclass(frozen=True)
class Stage:
    """The examples trained on and for how many steps, and those measured on."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    steps: int


@dataclass(frozen=True)
class Learnt:
    """The held-out loss, nats per trained byte, and the model's weights (without the adapter's update)."""

    loss: float
    weights: Weights


class Trainings:
    """All runs of the study, each once: by stage, way, learning rate and seed."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.forward = lab, tiny_llama()
        self.stages = read_stages(FULL_STEPS if lab.full else STEPS)
        self.done: dict[tuple[str, str, float, int], Learnt] = {}

    def run(self, stage: str, way: str, rate: float, seed: int = 0) -> Learnt:
        key = (stage, way, rate, seed)
        if key not in self.done:
            start = self.start(stage, seed)
            self.lab.display.say(f"{stage}, {way}, lr {rate:g}, seed {seed}")
            self.done[key] = learn(self.forward, start, way, rate, self.stages[stage], seed)
        return self.done[key]

    def start(self, stage: str, seed: int) -> Weights:
        """The weights to start from: random, or those of the best full pretraining."""
        if stage == "pretraining":
            return random_weights(self.forward.model, seed)
        return self.run("pretraining", "full", self.rate("pretraining", "full")).weights

    def before(self, stage: str) -> float:
        """The held-out loss that training begins with."""
        self.forward.model.load_state_dict(self.start(stage, 0))
        return held_out_loss(self.forward, self.stages[stage].held_out)[0]

    def rate(self, stage: str, way: str) -> float:
        """The learning rate that does best with seed 0."""
        return min(RATES, key=lambda rate: self.run(stage, way, rate).loss)

    def losses(self, stage: str, way: str, seeds: Iterable[int]) -> list[float]:
        """The trainings at the best rate, one per seed."""
        return [self.run(stage, way, self.rate(stage, way), seed).loss for seed in seeds]


def run(lab: Lab) -> Outcome:
    trainings = Trainings(lab)
    losses = {
        stage: {way: statistics.mean(trainings.losses(stage, way, lab.seeds)) for way in ways}
        for stage, ways in WAYS.items()
    }
    by_seed = trainings.losses("pretraining", "full", range(3))
    noise = statistics.stdev(by_seed) / statistics.mean(by_seed) / len(lab.seeds) ** 0.5
    gaps = {stage: {way: gap(by_way, way) for way in by_way} for stage, by_way in losses.items()}
    because = (
        f"In pretraining full training ends at {losses['pretraining']['full']:.3f} nats per byte, LoRA "
        f"{gaps['pretraining']['LoRA']:+.1%}, low-rank weights {gaps['pretraining']['low rank']:+.1%}; in fine-tuning "
        f"full ends at {losses['fine-tuning']['full']:.3f}, LoRA {gaps['fine-tuning']['LoRA']:+.1%}; in a new task at "
        f"{losses['a new task']['full']:.3f}, LoRA {gaps['a new task']['LoRA']:+.1%}. "
        f"A loss has a standard deviation of {noise:.1%} by the seed."
    )
    runs = [(stage, way) for stage, ways in WAYS.items() for way in ways]
    by_rate = {(stage, way): [trainings.run(stage, way, rate).loss for rate in RATES] for stage, way in runs}
    before = {stage: trainings.before(stage) for stage in WAYS}
    rows: list[list[Cell]] = [
        [f"{stage}, {way}", before[stage], *by_rate[stage, way], losses[stage][way], gaps[stage][way]]
        for stage, way in runs
    ]
    head = ["", "before", *(f"lr {rate:g}" for rate in RATES), "best", "behind full"]
    picture = Picture(
        pictures.bars(
            list(WAYS),
            {way: [100 * gaps[stage].get(way, math.nan) for stage in WAYS] for way in ("LoRA", "low rank")},
            y_label="held-out loss above full training's, percent of it",
        ),
        "How far LoRA and low-rank weights end behind full training, from scratch, in fine-tuning and on a new task.",
        "A group of bars for pretraining, fine-tuning and a new task; a bar for each way",
        Table(head, rows, f"Held-out loss, nats per trained byte; best: the mean of {len(lab.seeds)} seeds"),
    )
    figures = {
        "losses": {
            f"{stage}, {way}": dict(zip(map(str, RATES), by_rate[stage, way], strict=True)) for stage, way in runs
        },
        "before": before,
        "best": losses,
        "gaps": gaps,
        "noise": noise,
    }
    return Outcome(verdict(losses["pretraining"], losses["fine-tuning"], noise), because, [picture], figures)


def gap(losses: Losses, way: str) -> float:
    """How far a way's loss is above full training's, as a share of that."""
    return losses[way] / losses["full"] - 1


def verdict(pretraining: Losses, fine_tuning: Losses, noise: float) -> Judgement:
    """Held-out losses by way; `noise` is a loss's standard deviation by the seed, as a share of the loss."""
    behind = min(gap(pretraining, "LoRA"), gap(pretraining, "low rank"))
    margin = behind - TIMES * max(0.0, gap(fine_tuning, "LoRA"))
    tie = 2 * (2 + 2 * TIMES**2) ** 0.5 * noise  # two losses count once in the margin, two `TIMES` times
    return "too noisy" if abs(margin) <= tie else "held" if margin > 0 else "did not hold"


def learn(forward: Forward, start: Weights, way: str, rate: float, stage: Stage, seed: int) -> Learnt:
    """Train the model from `start` in one of the ways and measure it. It has no adapter before and after."""
    model = forward.model
    model.load_state_dict(start)
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    attached = None if way == "full" else _attach(model, way, generator)
    linear = attached.parameters if attached else [model.get_submodule(path).weight for path in linear_paths(model)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in trained if all(parameter is not other for other in linear)]
    groups: list[dict[str, Any]] = [{"params": linear, "peak": rate}, {"params": rest, "peak": REST_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    config = TrainConfig(lr=1.0)  # for its schedule: shares of each group's peak
    loader = Loader(stage.train, TOKENS, TOKENS, seed)
    for step, (batches, _) in enumerate(islice(loader, stage.steps)):
        for batch in batches:
            loss, count = forward.loss(batch)
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, stage.steps, config)
        optimizer.step()
        optimizer.zero_grad()
    held_out, _ = held_out_loss(forward, stage.held_out)
    if attached:
        detach(attached)
    return Learnt(held_out, {name: weight.clone() for name, weight in model.state_dict().items()})


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


def tiny_llama() -> Forward:
    """The model, run by its own head: packed documents, every weight with a gradient."""
    with tempfile.TemporaryDirectory() as folder:
        write_text_atomic(Path(folder, "config.json"), json.dumps(CONFIG))
        skeleton = open_skeleton(Source("tiny", Path(folder)))
        save_safetensors(random_weights(skeleton, 0), Path(folder, SINGLE))
        model = open_base(folder, dtype="float32", device="cpu").model
    return dataclasses.replace(plan_forward(model), head=None)


def random_weights(model: nn.Module, seed: int) -> Weights:
    """Normal numbers of variance 1 / N in every matrix [M, N], ones in the norms."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
        if weight.ndim == 2
        else torch.ones(weight.shape)
        for name, weight in model.named_parameters()
    }


def read_stages(steps: Mapping[str, int]) -> dict[str, Stage]:
    """The stages, each trained on words of its own, all measured on the same held-out words."""
    rows = list(read_builtin("cmudict"))
    order = np.random.RandomState(0).permutation(len(rows))
    stages, begin = {}, HELD_OUT
    for name, count in ROWS.items():
        held_out, train = order[:HELD_OUT], order[begin : begin + count]
        stages[name] = Stage(
            [_example(rows[i], name) for i in train], [_example(rows[i], name) for i in held_out], steps[name]
        )
        begin += count
    return stages


def _example(row: Row, stage: str) -> Example:
    """A line, and which of it is learnt: all of "cat>KAET", what follows the sign in "cat>KAAT" or "KAET<cat"."""
    word = row.value["prompt"].removesuffix("->").replace(" ", "")
    heard = row.value["completion"].split()
    sounds, accent = "".join(heard), "".join(ACCENT.get(sound, sound) for sound in heard)
    text, known = {
        "pretraining": (f"{word}>{sounds}\n", 1),
        "fine-tuning": (f"{word}>{accent}\n", len(word) + 1),
        "a new task": (f"{sounds}<{word}\n", len(sounds) + 1),
    }[stage]
    tokens_T = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return Example(tokens_T, np.arange(len(tokens_T)) >= known, row.origin)
