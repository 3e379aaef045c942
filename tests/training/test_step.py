"""A step of two learners gives each what it gets alone; dropout draws from the step and leaves no trace."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deltaw.adapter.attach import attach, detach
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.config import AdapterSpec, TrainConfig
from deltaw.data.example import Example
from deltaw.data.loader import LoaderState
from deltaw.data.pack import pack
from deltaw.errors import InputError
from deltaw.kernels.segments import NOBODY
from deltaw.training.checkpoint import TrainState
from deltaw.training.learner import Learner
from deltaw.training.step import step
from deltaw.training.watch import TooManySkips, Unfit, note_skip
from tests.architectures import tiny

SPECS = (AdapterSpec(rank=2, alpha=6.0), AdapterSpec(rank=5, alpha=5.0))
CONFIG = TrainConfig(lr=1e-2, clip=1e6, warmup_steps=0)
LENGTHS = ((9, 4, 12, 7), (5, 8, 6))  # of the documents of each batch
OWNERS = ((0, 1, 1, 0), (1, 0, 1))  # who learns from them
END = LoaderState(0, 2)


def documents(lengths: Sequence[int], seed: int) -> list[Example]:
    draw = np.random.RandomState(seed)
    return [
        Example(draw.randint(3, 97, n).astype(np.int32), np.arange(n) >= 1 + i % 3, f"row:{seed}.{i}")
        for i, n in enumerate(lengths)
    ]


def batch(rows: Sequence[Example], updates: tuple[int, ...] = ()) -> Batch:
    packed = pack(rows)
    return Batch.of(packed.tokens_T, packed.starts, packed.labels_T, origins=packed.origins, updates=updates)


class Watched(Learner):
    """A learner that keeps the gradient of its last update."""

    def update(self, loss: float, batches: Sequence[Batch], taking: Callable[[], object] | None = None) -> float:
        self.gradient = [parameter.grad.clone() for parameter in self.attached.parameters if parameter.grad is not None]
        return super().update(loss, batches, taking)


def learner(model: nn.Module, number: int, **changes: Any) -> Watched:
    """Learner `number` on the model, begun where ΔW isn't zero, so that A has a gradient, too."""
    spec = SPECS[number].model_copy(update=changes)
    made = Watched(attach(model, spec), CONFIG, 100, TrainState())
    with torch.no_grad():
        for n, parameter in enumerate(made.attached.parameters):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(100 * number + n))
    return made


@pytest.fixture
def forward() -> Forward:
    return plan_forward(tiny("llama", torch.float32))


def alone(forward: Forward, number: int) -> tuple[Watched, dict[str, Any]]:
    """A learner with its own documents and nobody beside it."""
    one = learner(forward.model, number)
    batches = []
    for seed, (lengths, owners) in enumerate(zip(LENGTHS, OWNERS, strict=True)):
        rows = documents(lengths, seed)
        batches.append(batch([row for row, owner in zip(rows, owners, strict=True) if owner == number]))
    (record,) = step(forward, [one], batches, END)
    detach(one.attached)
    return one, record


def shared() -> list[Batch]:
    pairs = zip(LENGTHS, OWNERS, strict=True)
    return [batch(documents(lengths, seed), owners) for seed, (lengths, owners) in enumerate(pairs)]


def same_gradient(one: Watched, other: Watched) -> None:
    assert len(one.gradient) == len(other.gradient) > 0
    for mine, its in zip(one.gradient, other.gradient, strict=True):
        assert its.abs().max() > 0
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=2e-6 * float(its.abs().max()))


def test_two_learners_of_one_batch_get_the_gradients_and_the_records_that_each_gets_alone(forward: Forward) -> None:
    expected = [alone(forward, number) for number in (0, 1)]
    learners = [learner(forward.model, number) for number in (0, 1)]
    assert [one.attached.number for one in learners] == [0, 1]
    records = step(forward, learners, shared(), END)
    for together, record, (single, its) in zip(learners, records, expected, strict=True):
        same_gradient(together, single)
        assert record.keys() == its.keys()
        for name in ("step", "lr", "tokens", "supervised_tokens"):
            assert record[name] == its[name]
        assert record["loss"] == pytest.approx(its["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-4)
    assert records[0]["supervised_tokens"] != records[1]["supervised_tokens"]
    assert all(parameter.grad is None for one in learners for parameter in one.attached.parameters)


def test_a_learner_that_is_lost_costs_the_other_nothing(forward: Forward) -> None:
    expected, _ = alone(forward, 1)
    learners = [learner(forward.model, number) for number in (0, 1)]
    lost = learners[0]
    lost.config = CONFIG.model_copy(update={"skip_nonfinite": 1})
    lost.say = lambda text: None
    with torch.no_grad():
        lost.attached.parameters[0].fill_(float("nan"))
    skipped, updated = step(forward, learners, shared(), END)
    assert "skipped" in skipped and "loss" not in skipped
    assert set(skipped["rows"]) == {"row:0.0", "row:0.3"}, "its own rows are named"
    assert lost.state.step == lost.state.skipped == 1 and "loss" in updated
    same_gradient(learners[1], expected)


def test_a_document_of_nobody_or_of_anybody_is_refused(forward: Forward) -> None:
    learners = [learner(forward.model, number) for number in (0, 1)]
    with pytest.raises(ValueError, match="update 1"):
        step(forward, learners[:1], shared(), END)
    with pytest.raises(ValueError, match="which documents"):
        step(forward, learners, [batch(documents(LENGTHS[0], 0))], END)
    assert all(one.state.step == 0 for one in learners)


def test_the_base_s_documents_are_counted_by_no_learner(forward: Forward) -> None:
    expected, its = alone(forward, 1)
    pairs = enumerate(zip(LENGTHS, OWNERS, strict=True))
    beside = [
        batch(documents(lengths, n), tuple(owner or NOBODY for owner in owners)) for n, (lengths, owners) in pairs
    ]
    _, one = (learner(forward.model, number) for number in (0, 1))
    (record,) = step(forward, [one], beside, END)
    same_gradient(one, expected)
    assert record["loss"] == pytest.approx(its["loss"], rel=1e-5)
    assert (record["tokens"], record["supervised_tokens"]) == (its["tokens"], its["supervised_tokens"])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_is_random_depends_on_the_seed_the_step_and_the_batch_alone(forward: Forward, dropout: float) -> None:
    one = learner(forward.model, 0, dropout=dropout)
    batches, losses = [batch(documents(LENGTHS[0], 0))] * 2, list[float]()
    weights = [parameter.detach().clone() for parameter in one.attached.parameters]

    def loss_at(number: int, seed: int, count: int = 2) -> float:
        one.state, one.config = TrainState(step=number), CONFIG.model_copy(update={"seed": seed})
        with torch.no_grad():
            for parameter, weight in zip(one.attached.parameters, weights, strict=True):
                parameter.copy_(weight)
        torch.manual_seed(len(losses))  # whatever others have drawn
        drawn = torch.get_rng_state()
        (record,) = step(forward, [one], batches[:count], END)
        assert torch.equal(torch.get_rng_state(), drawn)
        losses.append(record["loss"])
        return losses[-1]

    first = loss_at(0, 0)
    assert loss_at(0, 0) == first
    others = [loss_at(1, 0), loss_at(0, 1), loss_at(0, 0, count=1)]
    if dropout:
        assert len({first, *others}) == 4
    else:
        assert others == pytest.approx([first] * 3, rel=1e-6)


# float16


def gradient(dtype: str, tiny_head: float) -> torch.Tensor:
    """Of one step, on a model whose last matrix is so small that a mean's gradient has no place in float16."""
    model = tiny("llama", torch.float32)
    with torch.no_grad():
        model.get_submodule("model.norm").weight.mul_(tiny_head)
    model = model.to(getattr(torch, dtype))
    made = learner(model, 0)
    made.config = CONFIG.model_copy(update={"dtype": dtype})
    batches = [batch(documents(lengths, seed)) for seed, lengths in enumerate(LENGTHS)]
    (record,) = step(plan_forward(model), [made], batches, END)
    assert record["grad_norm"] > 0 and "skipped" not in record
    return torch.cat([part.flatten() for part in made.gradient])


@pytest.mark.parametrize("tiny_head", [1.0, 1e-3])
def test_float16_loses_no_small_gradient(tiny_head: float) -> None:
    truth = gradient("float32", tiny_head)
    errors = {
        name: float((gradient(name, tiny_head) - truth).norm() / truth.norm()) for name in ("float16", "bfloat16")
    }
    assert errors["float16"] < errors["bfloat16"] < 0.1


def test_what_float16_cannot_hold_is_refused_with_its_reason() -> None:
    model = tiny("llama", torch.float32)
    with torch.no_grad():
        model.get_submodule("model.norm").weight.mul_(1e6)
    with pytest.raises(InputError) as attached:
        attach(model.to(torch.float16), SPECS[0])
    with pytest.raises(TooManySkips) as skipped:  # or on the way
        note_skip(Unfit("NaN", [], not_finite=True), TrainState(), CONFIG.model_copy(update={"dtype": "float16"}))
    assert all("float32" in str(caught.value.fix) for caught in (attached, skipped))
