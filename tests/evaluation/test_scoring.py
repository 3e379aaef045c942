"""Evaluations whose pass is recorded once say what passes of the model say: recorded and replayed on a CPU by the same
code (tests/tape.py)."""

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from deltaw.adapter.attach import attach
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.parts import CHOSEN, REJECTED
from deltaw.base.preferences import Dpo, Kto
from deltaw.config import AdapterSpec
from deltaw.data.example import Example
from deltaw.data.weighed import Weighed
from deltaw.evaluation import batches, scoring
from deltaw.evaluation.forgetting import forgetting
from deltaw.evaluation.held_out import held_out_loss
from deltaw.evaluation.scoring import scored_batches
from deltaw.evaluation.weighing import anchor_of, summed_logprobs, weighed_sums
from deltaw.generate.cache import evaluating
from deltaw.model import Model
from deltaw.show.progress import QUIET
from tests.architectures import tiny
from tests.tape import Recorder, attention_by_offsets

AT_ONCE = 64


@pytest.fixture(scope="module")
def adapted() -> Any:
    """A forward that shares nothing, as on a GPU, and what is on its model."""
    forward = dataclasses.replace(plan_forward(tiny("llama", torch.float64)), continues=False)
    assert forward.packed and not forward.shares
    attached = attach(forward.model, AdapterSpec(rank=2, alpha=6.0))
    with torch.no_grad():
        for number, parameter in enumerate(attached.parameters):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    return forward, attached


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """What records on this device, where attention knows offsets alone. Batches are small."""
    made = Recorder()
    use(monkeypatch, made)
    with attention_by_offsets():
        yield made


def use(monkeypatch: pytest.MonkeyPatch, record: Any) -> None:
    monkeypatch.setattr(scoring, "recorder_on", lambda device: record)
    monkeypatch.setattr("deltaw.evaluation.forgetting.TOKENS_AT_ONCE", AT_ONCE)
    for function in (scoring.passes, batches.batches, batches.groups):
        inner = getattr(function, "__wrapped__", function)
        monkeypatch.setitem(inner.__kwdefaults__, "at_once", AT_ONCE)


def rows(lengths: list[int], share: float = 0.5, seed: int = 0, parts: tuple[int, ...] = ()) -> list[Example]:
    random = np.random.default_rng(seed)
    return [
        Example(
            random.integers(3, 97, length).astype(np.int32),
            np.append(random.random(length - 1) < share, True),
            f"row {number}",
            part=parts[number % len(parts)] if parts else 0,
        )
        for number, length in enumerate(lengths)
    ]


MANY = [9, 4, 30, 17, 5, 28, 21, 3, 14, 33, 8, 26, 12, 19, 2, 31, 7, 24]


def plainly(forward: Forward, examples: list[Example]) -> dict[int, float]:
    """The summed log-probability of each row, alone."""
    with evaluating(forward.model):
        return {n: float(forward.logprobs(Weighed(examples).packed([n])).sum()) for n in range(len(examples))}


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=12, max_size=30), st.sampled_from([0.0, 0.3, 1.0]), st.booleans(), st.data()
)
def test_each_label_has_what_a_pass_of_its_rows_alone_says(
    adapted: Any, lengths: list[int], share: float, switched_off: bool, data: st.DataObject
) -> None:
    forward, attached = adapted
    lengths.insert(data.draw(st.integers(0, len(lengths))), AT_ONCE + 6)  # a batch by itself, too large for the size
    examples, recorder = rows(lengths, share), Recorder()
    with pytest.MonkeyPatch.context() as patch, attention_by_offsets():
        use(patch, recorder)
        with attached.disabled() if switched_off else nullcontext():
            alone, seen, labels = plainly(forward, examples), list[int](), 0
            for numbers, batch, scores in scored_batches(forward, Weighed(examples)):
                assert len(scores.logp_K) == batch.supervised
                assert float(scores.loss) == pytest.approx(-float(scores.logp_K.sum()))
                for number, value in zip(numbers, batch.by_document(scores.logp_K).tolist(), strict=True):
                    assert value == pytest.approx(alone[number], rel=1e-9)
                seen, labels = [*seen, *numbers], labels + batch.supervised
    assert sorted(seen) == list(range(len(examples)))
    assert labels == sum(int(row.loss_mask[1:].sum()) for row in examples)
    groups = batches.groups(forward, Weighed(examples), at_once=AT_ONCE)
    assert recorder.recorded == (len(groups) - 1 > scoring.FEW), "one recording serves all batches"
    assert recorder.replayed == (len(groups) if recorder.recorded else 0), "once to be tried, once for each that fits"


def test_figures_are_those_of_evaluations_that_are_not_recorded(adapted: Any, recorder: Recorder) -> None:
    forward, attached = adapted
    pairs = rows([*MANY, *MANY], 0.5, 1, (CHOSEN, REJECTED))
    texts = [dataclasses.replace(row, loss_mask=np.ones(len(row.tokens), bool)) for row in rows(MANY)]
    weighed = Weighed(pairs, np.linspace(-40, -20, len(pairs)), np.linspace(-30, -35, len(pairs)))
    model = Model(None, None, forward, attached)  # type: ignore[arg-type]

    def figures() -> list[Any]:
        general = forgetting(model, "texts", texts, QUIET)
        return [
            *(general.loss_before, general.loss_after, general.kl, general.tokens, *general.kl_interval),  # type: ignore[misc]
            *held_out_loss(forward, rows(MANY)),
            *summed_logprobs(forward, rows(MANY)),
            *weighed_sums(forward, weighed, Dpo(0.1)).values,
            *weighed_sums(forward, weighed, Kto(0.1).with_anchor(0.3)).values,
            *weighed_sums(forward, weighed, Dpo(0.1), range(1, 16)).values,
            anchor_of(forward, weighed),
        ]

    recorded = figures()
    assert recorder.recorded == 7 and recorder.replayed > 5 * recorder.recorded, "each evaluation was"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "recorder_on", lambda device: None)
        assert recorded == pytest.approx(figures(), rel=1e-6)


def waits(work: Any) -> Any:
    raise RuntimeError("the work waits\nfor the device")


def lacks(work: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def is_wrong(work: Any) -> Any:
    return (lambda: None), torch.zeros_like(work())


@pytest.mark.parametrize(("record", "word", "tries"), [(waits, "waits", 1), (is_wrong, "the pass", 1), (lacks, "", 2)])
def test_what_can_not_be_recorded_is_said_once_and_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch, record: Any, word: str, tries: int
) -> None:
    forward = dataclasses.replace(plan_forward(tiny("llama", torch.float64)), continues=False)
    said, tried = list[str](), list[int]()

    def counted(work: Any) -> Any:
        tried.append(1)
        return record(work)

    use(monkeypatch, counted)
    with attention_by_offsets():
        losses = [held_out_loss(forward, rows(MANY), say=said.append) for _ in range(2)]
        use(monkeypatch, None)
        assert losses == [held_out_loss(forward, rows(MANY))] * 2
    assert len(tried) == len(said) == tries and word in said[0] and "\n" not in said[0]


def test_a_recording_is_gone_when_its_evaluation_is_over_or_given_up(adapted: Any, recorder: Recorder) -> None:
    forward, kept = adapted[0], list[Any]()

    def keeping(work: Any) -> Any:
        replay, place = recorder(work)
        kept.append(weakref.ref(replay))
        return replay, place

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "recorder_on", lambda device: keeping)
        coming = scored_batches(forward, Weighed(rows(MANY)))
        next(coming)
        assert kept[0]() is not None
        coming.close()
        held_out_loss(forward, rows(MANY))
    assert len(kept) == 2 and not any(replay() for replay in kept)


def test_factors_that_were_trained_since_are_in_the_next_evaluation(adapted: Any, recorder: Recorder) -> None:
    forward, attached = adapted
    losses = [held_out_loss(forward, rows(MANY))[0]]
    with torch.no_grad():
        attached.parameters[0].add_(0.5)
    losses.append(held_out_loss(forward, rows(MANY))[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "recorder_on", lambda device: None)
        assert losses[1] == pytest.approx(held_out_loss(forward, rows(MANY))[0], rel=1e-9)
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)
