"""A bench whose trainings are made up, not run: losses from a valley over the rate, updates drawn at random."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch

from deltaw.adapter.file import Adapter
from deltaw.adapter.targets import find_targets
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.linear_weights import LinearWeights
from deltaw.base.load import open_base
from deltaw.config import AdapterSpec
from deltaw.data.builtin import pronunciation
from deltaw.data.example import Example
from deltaw.data.row import Row
from deltaw.factors import LowRank
from deltaw.kinds import Dense
from deltaw.show.progress import Display
from deltaw.studies.bench import ACCENTED, NEW_TASK, Arm, Bench, Trained
from deltaw.studies.lab import Lab
from deltaw.studies.tiny import PRETRAINING, example
from deltaw.updates import Update
from tests.tiny import tiny_base

Loss = Callable[[Arm, int], float]
BEFORE = 5.0
ROWS = [
    Row(pronunciation(word, sounds), word) for word, sounds in (("cat", "K AE1 T"), ("bee", "B IY1"), ("sew", "S OW1"))
]


@dataclass(frozen=True)
class MadeUp(Trained):
    """A training that was never run. `made`: its update."""

    made: Adapter = None  # type: ignore[assignment]

    def adapter(self) -> Adapter:
        return self.made


class Planted(Bench):
    """`ending`: the loss that an arm ends with; `factors`: the updates it learns."""

    stages = (NEW_TASK, ACCENTED)

    def __init__(self, base: Path, ending: Loss, strength: float = 0.5) -> None:
        self.base, self.ending, self.strength = base, ending, strength

    @cached_property
    def forward(self) -> Forward:
        return plan_forward(open_base(str(self.base), dtype="float32", device="cpu").model)

    @cached_property
    def weights(self) -> LinearWeights:
        return LinearWeights(self.base)

    def held_out(self, stage: str) -> Sequence[Example]:
        return [example(row, stage) for row in ROWS]

    rows = held_out

    @property
    def general(self) -> Sequence[Example]:
        return self.held_out(PRETRAINING)

    def train(self, arm: Arm, seed: int) -> Trained:
        loss = self.ending(arm, seed)
        return MadeUp(loss, BEFORE, 2.0, 1.0, 1.0, (BEFORE, loss), "", self.adapter(arm, seed))

    def adapter(self, arm: Arm, seed: int) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        factors: dict[str, Update] = {}
        for path in self.paths:
            m, n = self.weights[path].dense().shape
            rank = min(m, n) if arm.spec.full else arm.spec.rank
            a_RN, b_MR = torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)
            low = LowRank(a_RN / n**0.5, self.strength * b_MR / rank**0.5 / m**0.5)
            factors[path] = Dense(low.dense()) if arm.spec.full else low
        return Adapter(arm.spec.model_copy(update={"targets": tuple(factors)}), factors)

    @cached_property
    def paths(self) -> list[str]:
        return list(find_targets(self.forward.model, AdapterSpec(rank=1)).paths)


def valley(arm: Arm, least: float, at: float, curve: float = 0.1) -> float:
    """A loss that is lowest at one rate."""
    return least * math.exp(curve * math.log(arm.lr / at) ** 2)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that reads bytes, in which rank 64 has room everywhere."""
    folder = tmp_path_factory.mktemp("studies") / "base"
    return tiny_base(folder, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_key_value_heads=4)


@pytest.fixture
def lab_of(base: Path, tmp_path: Path) -> Callable[[Loss], Lab]:
    """A lab whose trainings end as one says."""
    return lambda loss: Lab(tmp_path, Display(quiet=True), bench=Planted(base, loss))
