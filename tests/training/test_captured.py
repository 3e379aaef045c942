"""Captured steps are the steps themselves: recorded and replayed on a CPU by the same code (tests/tape.py)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.adapter.attach import attach
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.config import AdapterSpec, TrainConfig
from deltaw.data.loader import LoaderState
from deltaw.training.captured import Captured
from deltaw.training.checkpoint import TrainState
from deltaw.training.learner import Learner
from deltaw.training.step import step
from tests.architectures import tiny
from tests.tape import Recorder, attention_by_offsets
from tests.training.test_step import batch, documents

CONFIG = TrainConfig(lr=1e-2, warmup_steps=0, schedule="constant", tokens_per_batch=64, skip_nonfinite=1)
STEPS = [[(9, 4, 12, 7), (5, 8, 6)], [(20, 11)], [(7, 9, 3, 13), (6, 8)], [(15, 16)], [(5, 4, 19), (9,)]]


def learner(forward: Forward, config: TrainConfig = CONFIG, **changes: Any) -> Learner:
    spec = AdapterSpec(rank=2, alpha=6.0).model_copy(update=changes)
    made = Learner(attach(forward.model, spec), config, 100, TrainState(), lambda text: None)
    with torch.no_grad():
        for n, parameter in enumerate(made.attached.parameters):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(n))
    return made


def batches(lengths: Sequence[Sequence[int]], seed: int) -> list[Batch]:
    return [batch(documents(some, seed + n)) for n, some in enumerate(lengths)]


def run(recorder: Recorder | None, *, blind: bool = True, **changes: Any) -> tuple[list[Any], list[Tensor]]:
    """The records of `STEPS`, recorded or as they are, and the factors afterwards. `blind`: attention knows offsets."""
    forward = plan_forward(tiny("llama", torch.float64))
    assert forward.packed
    one, lines = learner(forward, **changes), list[str]()
    captured = Captured(forward, one, longest=24, say=lines.append, record=recorder)
    if recorder is not None:
        moments = one.optimizer.state
        recorder.changed = lambda: [
            *captured.gradients,
            *one.attached.parameters,
            *(tensor for state in moments.values() for tensor in state.values()),
        ]
    records = []
    with attention_by_offsets() if blind else nullcontext():
        for number, lengths in enumerate(STEPS):
            (record,) = step(forward, [one], batches(lengths, 10 * number), LoaderState(0, number + 1), captured)
            del record["seconds"]
            records.append(record)
    assert not lines and not captured.why_not
    return records, [parameter.detach().clone() for parameter in one.attached.parameters]


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"magnitude": True}], ids=["plain", "dropout", "dora"])
def test_replayed_steps_are_the_steps_to_the_bit(changes: dict[str, Any]) -> None:
    recorder = Recorder()
    records, factors = run(recorder, **changes)
    assert recorder.recorded >= 3 and recorder.replayed > recorder.recorded, "passes, clip and update were replayed"
    expected, theirs = run(None, **changes)
    assert records == expected
    assert all(torch.equal(mine, its) for mine, its in zip(factors, theirs, strict=True))


def test_filled_steps_are_the_uncaptured_ones() -> None:
    records, factors = run(None, blind=False)
    forward = plan_forward(tiny("llama", torch.float64))
    one = learner(forward)
    for number, (lengths, record) in enumerate(zip(STEPS, records, strict=True)):
        (plain,) = step(forward, [one], batches(lengths, 10 * number), LoaderState(0, number + 1))
        assert {name: plain[name] for name in record} == pytest.approx(record, rel=1e-5)
    for mine, its in zip(factors, one.attached.parameters, strict=True):
        torch.testing.assert_close(mine, its.detach(), rtol=1e-4, atol=1e-6)
