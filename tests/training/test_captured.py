"""Captured steps are the steps themselves: recorded and replayed on a CPU by the same code (tests/tape.py)."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from deltaw.adapter.attach import attach
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.config import AdapterSpec, TrainConfig
from deltaw.data.loader import Ahead, LoaderState
from deltaw.kernels.logprobs import IGNORE
from deltaw.training.batch_size import LEAST, MOST, fitting
from deltaw.training.captured import Captured
from deltaw.training.checkpoint import TrainState
from deltaw.training.fit import Fit
from deltaw.training.learner import Learner
from deltaw.training.step import step
from tests.architectures import tiny
from tests.tape import Recorder, attention_by_offsets
from tests.training.test_step import batch, documents

CONFIG = TrainConfig(lr=1e-2, warmup_steps=0, schedule="constant", tokens_per_batch=64, skip_nonfinite=1)
HALF = {"dtype": "float16"}  # in which the gradient is divided, not the loss
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


def changing(captured: Captured) -> list[Tensor]:
    """What recorded work writes to."""
    moments = captured.learner.optimizer.state.values()
    states = (tensor for state in moments for tensor in state.values())
    return [*captured.gradients, *captured.learner.attached.parameters, *states]


def run(
    recorder: Recorder | None, *, blind: bool = True, said: list[str] | None = None, **changes: Any
) -> tuple[list[Any], list[Tensor]]:
    """The records of `STEPS`, recorded or as they are, and the factors afterwards. `blind`: attention knows offsets;
    `said`: the lines, where there may be some."""
    forward = plan_forward(tiny("llama", torch.float64))
    assert forward.packed
    config = CONFIG.model_copy(update={"dtype": changes.pop("dtype", CONFIG.dtype)})
    folding = changes.pop("folding", False)
    one, lines = learner(forward, config, **changes), list[str]()
    captured = Captured(forward, one, longest=24, say=lines.append, record=recorder, folding=folding)
    if isinstance(recorder, Recorder):
        recorder.changed = partial(changing, captured)
    records = []
    with attention_by_offsets() if blind else nullcontext():
        for number, lengths in enumerate(STEPS):
            (record,) = step(forward, [one], batches(lengths, 10 * number), LoaderState(0, number + 1), captured)
            del record["seconds"]
            records.append(record)
    if said is None:
        assert not lines and not captured.why_not
    else:
        said += lines
    captured.release()
    return records, [parameter.detach().clone() for parameter in one.attached.parameters]


@pytest.mark.parametrize(
    "changes",
    [{}, {"dropout": 0.3}, {"magnitude": True}, HALF, {"folding": True}],
    ids=["plain", "dropout", "dora", "undivided", "folded"],
)
def test_replayed_steps_are_the_steps_to_the_bit(changes: dict[str, Any]) -> None:
    recorder = Recorder()
    records, factors = run(recorder, **changes)
    assert recorder.recorded >= 3 and recorder.replayed > recorder.recorded, "passes, clip and update were replayed"
    expected, theirs = run(None, **changes) if changes else plainly()
    assert records == expected
    assert all(torch.equal(mine, its) for mine, its in zip(factors, theirs, strict=True))


@pytest.mark.parametrize("folding", [False, True])
def test_filled_steps_are_the_uncaptured_ones(folding: bool) -> None:
    records, factors = run(None, blind=False, folding=folding)
    forward = plan_forward(tiny("llama", torch.float64))
    one = learner(forward)
    for number, (lengths, record) in enumerate(zip(STEPS, records, strict=True)):
        (plain,) = step(forward, [one], batches(lengths, 10 * number), LoaderState(0, number + 1))
        assert {name: plain[name] for name in record} == pytest.approx(record, rel=1e-5)
    for mine, its in zip(factors, one.attached.parameters, strict=True):
        torch.testing.assert_close(mine, its.detach(), rtol=1e-4, atol=1e-6)


@cache
def plainly() -> tuple[list[Any], list[Tensor]]:
    """What `run` gives where nothing is recorded."""
    return run(None)


class Waits(Recorder):
    """A device on which some work can't be recorded: the n-th that is tried."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __call__(self, work: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise RuntimeError("the work waits\nfor the device")
        return super().__call__(work)


@pytest.mark.parametrize("at", [1, 3])
def test_what_can_not_be_recorded_runs_as_it_is_and_is_said_once(at: int) -> None:
    said: list[str] = []
    records, factors = run(Waits(at), said=said)
    assert len(said) == 1 and "the work waits" in said[0] and "device\n" not in said[0]
    expected, theirs = plainly()
    for mine, its in zip(records, expected, strict=True):
        assert mine == pytest.approx(its, rel=1e-6)
    for a, b in zip(factors, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_a_number_skips_the_captured_step_and_names_its_rows() -> None:
    forward = plan_forward(tiny("llama", torch.float64))
    one, recorder = learner(forward), Recorder()
    captured = Captured(forward, one, longest=24, say=print, record=recorder)
    recorder.changed = lambda: [*captured.gradients, *one.attached.parameters]
    with attention_by_offsets():
        for number in range(2):
            step(forward, [one], batches([(9, 4), (5, 8)], number), LoaderState(0, 1), captured)
        before = [parameter.detach().clone() for parameter in one.attached.parameters]
        with torch.no_grad():
            one.attached.parameters[0][0, 0] = float("nan")
        (record,) = step(forward, [one], batches([(9, 4), (5, 8)], 7), LoaderState(0, 2), captured)
        assert "batch 1 of 2" in record["skipped"] and record["rows"] == ["row:7.0", "row:7.1"]
        assert one.state.skipped == one.state.not_finite == 1
        with torch.no_grad():
            one.attached.parameters[0].copy_(before[0])
        assert all(torch.equal(a, b) for a, b in zip(one.attached.parameters, before, strict=True)), (
            "nothing was updated"
        )
        (record,) = step(forward, [one], batches([(9, 4), (5, 8)], 8), LoaderState(0, 3), captured)
    assert record["loss"] > 0 and one.state.skipped == 1


def test_a_pass_that_is_recorded_wrong_is_not_used() -> None:
    def wrong(work: Any) -> Any:
        return (lambda: None), torch.zeros((), dtype=torch.float64)

    said: list[str] = []
    records, _ = run(wrong, said=said)  # type: ignore[arg-type]
    assert "isn't the pass" in said[0] and len(records) == len(STEPS) and all(record["loss"] > 0 for record in records)


def test_the_next_item_is_fetched_once_and_given_in_order() -> None:
    items = [([object()], LoaderState(0, n)) for n in range(6)]
    ahead = Ahead(iter(items))  # type: ignore[arg-type]
    seen = []
    for item in ahead:
        seen.append(item)
        if len(seen) == 5:
            break
        if len(seen) % 2:
            assert ahead.fetch() is ahead.fetch() is items[len(seen)][0]
    assert seen == items[:5]


@given(st.integers(1, 200_000), st.floats(0, 1e6), st.floats(0, 1e5), st.floats(0, 1e9))
def test_a_batch_is_a_part_of_a_step_that_fits(step_tokens: int, token: float, supervised: float, limit: float) -> None:
    fit = Fit(1e6, token, supervised)
    tokens = fitting(step_tokens, fit, limit)
    assert 0 < tokens <= max(MOST, LEAST) and tokens <= step_tokens
    assert tokens <= LEAST or fit.bytes_at(tokens, tokens) <= limit
    if tokens < step_tokens:
        larger = 2 * tokens
        assert larger > MOST or fit.bytes_at(larger, larger) >= limit


def test_a_batch_has_2048_tokens_where_nobody_says_otherwise() -> None:
    assert TrainConfig().batch_tokens == 2048 and TrainConfig(tokens_per_batch=64).batch_tokens == 64


class Short(Recorder):
    """A device on which memory is short as soon as a second size is met as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: Any = None

    def loss_of(self, batch: Batch) -> Tensor:
        if len(self.captured._passes) > 1 and any(one.is_recorded for one in self.captured._passes.values()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return type(self.captured).loss_of(self.captured, batch)


def test_where_memory_is_short_all_batches_have_one_size() -> None:
    forward, said, recorder = plan_forward(tiny("llama", torch.float64)), list[str](), Short()
    one = learner(forward)
    captured = recorder.captured = Captured(forward, one, longest=24, say=said.append, record=recorder)
    captured.loss_of = recorder.loss_of  # type: ignore[method-assign]
    moments = one.optimizer.state
    recorder.changed = lambda: [
        *captured.gradients,
        *one.attached.parameters,
        *(tensor for state in moments.values() for tensor in state.values()),
    ]
    lengths, records = [[(9, 4, 12)], [(9, 4, 12)], [(2,) * 17], [(9, 4)], [(3,) * 20], [(9, 4, 12)]], []
    with attention_by_offsets():
        for number, some in enumerate(lengths):
            (record,) = step(forward, [one], batches(some, 10 * number), LoaderState(0, number + 1), captured)
            records.append(record["loss"])
    assert said == ["all batches are filled up to one size: there isn't memory for passes of several"]
    assert not captured.why_not and captured.sizes == (1, 1)
    plain = plan_forward(tiny("llama", torch.float64))
    other = learner(plain)
    for number, some in enumerate(lengths):
        (record,) = step(plain, [other], batches(some, 10 * number), LoaderState(0, number + 1))
        assert record["loss"] == pytest.approx(records[number], rel=1e-5)


def test_gradients_are_found_again_after_a_step_that_is_not_captured() -> None:
    def taken(capturing: bool) -> list[Tensor]:
        forward = plan_forward(tiny("llama", torch.float64))
        one = learner(forward)
        recorder = Recorder()
        captured = Captured(forward, one, longest=24, say=lambda text: None, record=recorder) if capturing else None
        if captured is not None:
            recorder.changed = partial(changing, captured)
        with attention_by_offsets() if capturing else nullcontext():
            for number, lengths in enumerate([*STEPS, *STEPS]):
                some = batches(lengths, 10 * number)
                if number == 4:  # nothing of it is trained
                    some = [each.relabelled(torch.full_like(each.labels_T, IGNORE)) for each in some]
                (record,) = step(forward, [one], some, LoaderState(0, number + 1), captured)
                assert ("skipped" in record) == (number == 4)
                if captured is not None:
                    kept = [parameter.grad is not None for parameter in one.attached.parameters]
                    assert all(kept) == (number != 4), "until the next step"
        if captured is not None:
            captured.release()
            assert all(parameter.grad is None for parameter in one.attached.parameters)
        return [parameter.detach().clone() for parameter in one.attached.parameters]

    for mine, its in zip(taken(True), taken(False), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_a_faster_form_that_is_not_the_pass_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A term is missing that is zero as long as B is."""
    from deltaw.kernels import joined

    monkeypatch.setattr(joined.Joined, "ranked_back", lambda self, g_TM: with_zeros(g_TM, self.room))
    forward, said = plan_forward(tiny("llama", torch.float64)), list[str]()
    one = learner(forward)
    with torch.no_grad():
        for layer in one.attached.layers.values():
            layer.trained()["b"].zero_()
    before = [parameter.detach().clone() for parameter in one.attached.parameters]
    captured = Captured(forward, one, longest=24, say=said.append, record=None, folding=True)
    ran = captured.run(batches([(9, 4, 12)], 0), 22)
    assert captured.faster is None and "another's gradient is off by" in said[0] and len(said) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, one.attached.parameters, strict=True))
    plain = Captured(forward, one, longest=24, say=said.append, record=None)
    again = plain.run(batches([(9, 4, 12)], 0), 22)
    assert ran is not None and again is not None and ran.losses == again.losses and ran.norm == again.norm


def test_a_pass_that_fails_while_it_is_shown_leaves_nothing_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, said = plan_forward(tiny("llama", torch.float64)), list[str]()
    one, loss, calls = learner(forward), type(forward).loss, list[Any]()
    model, before = one.attached.model, [parameter.detach().clone() for parameter in one.attached.parameters]

    def views() -> int:
        return sum(weight.untyped_storage().nbytes() > weight.nbytes for weight in model.parameters())

    def failing(self: Any, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("of the plain pass")
        return loss(self, batch)

    assert not views()
    captured = Captured(forward, one, longest=24, say=said.append, record=None, folding=True)
    assert views()
    monkeypatch.setattr(type(forward), "loss", failing)
    assert captured.run(batches([(9, 4, 12)], 0), 22) is None
    assert "there isn't memory enough" in said[0] and len(said) == 1
    assert not views() and all(map(torch.equal, before, one.attached.parameters))


def with_zeros(g_TM: Tensor, room: int) -> Tensor:
    return torch.cat([g_TM, g_TM.new_zeros(len(g_TM), room)], 1)
