"""A bench: a pretrained model, and the trainings on it that studies ask for, each run once.

A training is an `Arm` (all that sets it apart but the seed) and a seed. It lies in a folder of its own, which is named
by a hash of both: studies that want the same one share it, and a study that was stopped goes on with those it has.
Trainings with one seed share their rows' order and, at one shape, their start: that is what makes them pairs.

Two benches have this interface: a Llama that is pretrained here and learns in seconds (tiny.py), and a model of the
user's size (large.py).

Letters: P passages, K labelled tokens, V vocabulary.
"""

import abc
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter.attach import Attached, attach, discard
from deltaw.adapter.file import Adapter
from deltaw.adapter.init_data import initialise_from_data
from deltaw.base.forward import Forward
from deltaw.base.linear_weights import LinearWeights
from deltaw.config import AdapterSpec, TrainConfig
from deltaw.data.example import Example
from deltaw.data.loader import Loader
from deltaw.data.pack import pack
from deltaw.evaluation.held_out import held_out_loss
from deltaw.kernels.logprobs import IGNORE
from deltaw.studies.statistics import TUNED_WITH, Tuned, tune
from deltaw.training.optim import learning_rate, make_optimizer, set_rate

NEW_TASK, ACCENTED = "a new task", "an accent"
TOKENS, STEPS = 1024, 150
LORA_RATES, FULL_RATES = (3e-3, 6e-3, 1.2e-2), (7.5e-4, 1.5e-3, 3e-3)  # where tuning begins
START_BATCHES = 8  # that a start from data is made of, as in a run
AT_ONCE = 50  # passages: their logits of the whole vocabulary, a few times over


@dataclass(frozen=True)
class Arm:
    """A training, whole but for its seed. `adapter`: a run file's section, or "full"; `train`: more of its
    `train`."""

    adapter: Mapping[str, Any] | str = "full"
    lr: float = 3e-3
    stage: str = NEW_TASK
    steps: int = STEPS
    tokens: int = TOKENS
    train: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> AdapterSpec:
        return AdapterSpec(full=True) if isinstance(self.adapter, str) else AdapterSpec(**self.adapter)

    @property
    def words(self) -> str:
        kind = "full" if isinstance(self.adapter, str) else ", ".join(f"{k} {v}" for k, v in self.adapter.items())
        return f"{self.stage}, {kind}, lr {self.lr:g}, {self.steps} steps"

    def at(self, lr: float) -> "Arm":
        return dataclasses.replace(self, lr=lr)

    def key(self) -> str:
        """All that decides the outcome."""
        return json.dumps(asdict(self), sort_keys=True)


def lora(rank: int, alpha: float = 32, **more: str) -> dict[str, Any]:
    """LoRA's section of a run file."""
    return {"rank": rank, "alpha": alpha, **more}


@dataclass(frozen=True)
class Trained:
    """A finished training: held-out loss of its task (nats per learnt token), the same before it; loss on general text
    before and after, KL(base ‖ tuned) there; the loss of each step."""

    loss: float
    before: float
    general: float
    general_before: float
    kl: float
    curve: tuple[float, ...]
    folder: str

    def adapter(self) -> Adapter:
        """Read again each time: a full fine-tune's may be large."""
        return Adapter.load(Path(self.folder) / "adapter")


class Bench(abc.ABC):
    """A pretrained model with its trainings."""

    stages: Sequence[str]  # that can be trained

    @property
    @abc.abstractmethod
    def forward(self) -> Forward:
        """The pretrained model, without an adapter."""

    @property
    @abc.abstractmethod
    def weights(self) -> LinearWeights:
        """Its W by module path."""

    @abc.abstractmethod
    def held_out(self, stage: str) -> Sequence[Example]:
        """The rows that a stage is measured on."""

    @property
    @abc.abstractmethod
    def general(self) -> Sequence[Example]:
        """Passages of general text, what pretraining was on."""

    @abc.abstractmethod
    def rows(self, stage: str) -> Sequence[Example]:
        """The rows that a stage is trained on."""

    @abc.abstractmethod
    def train(self, arm: Arm, seed: int) -> Trained:
        """Run it, or read what it came to."""

    def by_seed(self, arm: Arm, seeds: Sequence[int]) -> dict[int, Trained]:
        return {seed: self.train(arm, seed) for seed in seeds}

    def losses(self, arm: Arm, seeds: Sequence[int]) -> dict[int, float]:
        return {seed: trained.loss for seed, trained in self.by_seed(arm, seeds).items()}

    def tuned(self, arm: Arm, rates: Sequence[float], extra: int = 3) -> Tuned:
        """The rate with the lowest held-out loss on the tuning seed."""
        return tune(lambda some: {rate: self.train(arm.at(rate), TUNED_WITH).loss for rate in some}, rates, extra)

    def loss(self, stage: str = NEW_TASK) -> float:
        """The held-out loss of the base as it is now: with what is attached to it."""
        return held_out_loss(self.forward, self.held_out(stage))[0]

    @contextmanager
    def wearing(self, adapter: Adapter) -> Iterator[Attached]:
        """Inside, the base has an adapter on it."""
        attached = attach(self.forward.model, adapter)
        try:
            yield attached
        finally:
            discard(attached)


def begun(forward: Forward, arm: Arm, examples: Sequence[Example], seed: int) -> Attached:
    """An arm's update on the model, at its start; if that is made of data, of the first batches that it will learn."""
    generator = torch.Generator().manual_seed(seed)
    attached = attach(forward.model, arm.spec, generator=generator, start_later=arm.spec.from_data)
    if arm.spec.from_data:
        device = attached.parameters[0].device
        batches = chain.from_iterable(step for step, _ in Loader(examples, arm.tokens, arm.tokens, seed))
        initialise_from_data(attached, forward, [batch.to(device) for batch in islice(batches, START_BATCHES)])
    return attached


def learn(
    forward: Forward,
    attached: Attached,
    arm: Arm,
    examples: Sequence[Example],
    seed: int,
    after: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """Train an attached adapter by the product's own arithmetic; the loss of each step. `after` is told how many steps
    are done. Ends early where the loss isn't finite."""
    config, curve = TrainConfig(lr=arm.lr, **arm.train), list[float]()
    optimizer = make_optimizer(attached, config)
    device = attached.parameters[0].device
    for step, (batches, _) in enumerate(islice(Loader(examples, arm.tokens, arm.tokens, seed), arm.steps)):
        total, count = 0.0, sum(batch.supervised for batch in batches)
        for batch in batches:
            loss, _ = forward.loss(batch.to(device))
            (loss / count).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(attached.parameters, config.clip)
        set_rate(optimizer, learning_rate(step, arm.steps, config))
        optimizer.step()
        optimizer.zero_grad()
        curve.append(total / count)
        after(step + 1)
        if not math.isfinite(curve[-1]):
            break
    return curve


@torch.no_grad()
def weaken(attached: Attached, adapter: Adapter, strength: float) -> None:
    """Wear an attached adapter that much stronger: its updates times `strength`."""
    for path, layer in attached.layers.items():
        trained, tensors = layer.trained(), adapter.factors[path].tensors()
        name = "b" if "b" in trained else "delta"
        trained[name].copy_(strength * tensors[name])


@torch.no_grad()
def by_passage(forward: Forward, attached: Attached, rows: Sequence[Example]) -> Tensor:
    """[P, 4], float64: each passage's loss without and with the adapter, its KL(base ‖ tuned), its labelled tokens."""
    sums, device = [], next(forward.model.parameters()).device
    for begin in range(0, len(rows), AT_ONCE):
        batch = pack(rows[begin : begin + AT_ONCE]).to(device)
        labelled = batch.labels_T != IGNORE
        labels_K1 = batch.labels_T[labelled][:, None]
        after_KV = forward.logits(batch)[labelled].float().log_softmax(-1)
        with attached.disabled():
            before_KV = forward.logits(batch)[labelled].float().log_softmax(-1)
        losses = [-logp_KV.gather(1, labels_K1).squeeze(1) for logp_KV in (before_KV, after_KV)]
        kl_K = (before_KV.exp() * (before_KV - after_KV)).sum(1)
        parts = torch.stack([*losses, kl_K, torch.ones_like(kl_K)], 1).double()
        sums.append(batch.by_document(parts.cpu()))
    return torch.cat(sums)
