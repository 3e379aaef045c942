"""Batch and Pass: what was worked out when a batch was packed reaches every layer of its own model, and no other's."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.base.attention import is_packed
from deltaw.base.batch import Batch, segments_of
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.passing import NOTHING, Pass, passing_of
from deltaw.errors import InputError
from deltaw.kernels.documents import Documents
from deltaw.kernels.logprobs import IGNORE
from deltaw.kernels.segments import NOBODY
from tests.architectures import PACKED, PADDED, tiny


def batch(seed: int = 0, lengths: tuple[int, ...] = (6, 3, 9), **more: Any) -> Batch:
    tokens = torch.randint(3, 97, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    starts = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    return Batch.of(tokens, starts, tokens.roll(-1), **more)


@given(st.lists(st.tuples(st.integers(NOBODY, 3), st.integers(1, 9)), min_size=1))
def test_segments_have_every_row_once_but_nobody_s_and_say_whose_it_is(documents: list[tuple[int, int]]) -> None:
    updates, lengths = [update for update, _ in documents], [length for _, length in documents]
    starts = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    segments = segments_of(updates, starts)
    assert segments is not None
    rows = [NOBODY] * starts[-1]
    for update, start, end in segments:
        assert start < end and set(rows[start:end]) == {NOBODY}
        rows[start:end] = [update] * (end - start)
    assert rows == [update for update, length in documents for _ in range(length)]
    assert all(a.end <= b.start and (a.end < b.start or a.update != b.update) for a, b in pairwise(segments))


def test_without_updates_all_rows_take_the_first() -> None:
    assert segments_of((), [0, 3, 5]) is None and batch().segments() is None


def test_labels_count_once_and_positions_begin_anew() -> None:
    tokens = torch.arange(5)
    given_labels = torch.tensor([1, IGNORE, 3, 4, IGNORE])
    assert Batch.of(tokens, [0, 2, 5], given_labels).supervised == 3
    assert Batch.of(tokens, [0, 2, 5]).supervised == 0
    assert Batch.of(tokens, [0, 2, 5]).positions_T.tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("starts", [[0, 2, 2, 5], [0]])
def test_an_empty_document_is_refused(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Batch.of(torch.arange(5), starts)


def test_a_pass_ends_with_its_block_also_by_an_exception() -> None:
    passing = passing_of(tiny("llama"))
    outer, inner = Pass(segments=()), Pass()
    with passing.running(outer):
        with pytest.raises(KeyError), passing.running(inner):
            assert passing.current is inner
            raise KeyError
        assert passing.current is outer
    assert passing.current is NOTHING


def test_each_model_has_a_holder_of_its_own_and_a_copy_too() -> None:
    one, other = tiny("llama"), tiny("llama")
    assert passing_of(one) is passing_of(one) is not passing_of(other)
    held = copy.deepcopy({"passing": passing_of(one)})["passing"]
    assert held is not passing_of(one) and held.current is NOTHING


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_attention_sees_the_layout_that_was_packed_and_the_right_segments(name: str) -> None:
    model, seen = tiny(name), list[Pass]()
    forward, given_batch = plan_forward(model), batch(updates=(1, 0, 0))
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(passing_of(model).current))
    forward.loss(given_batch)
    assert passing_of(model).current is NOTHING and len(seen) == 1
    if forward.packed:
        assert seen[0].documents is given_batch.documents and seen[0].segments == ((1, 0, 6), (0, 6, 18))
    else:  # rows of the longest's length
        assert seen[0].documents is None and seen[0].segments == ((1, 0, 9), (0, 9, 27))


def test_the_layout_is_worked_out_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, made = plan_forward(tiny("llama")), []
    build = Documents.__init__
    monkeypatch.setattr(Documents, "__init__", lambda self, *given: (made.append(1), build(self, *given))[1])
    packed = batch()
    for _ in range(3):
        forward.loss(packed)
    assert len(made) == 1


def test_two_models_run_side_by_side_in_one_process() -> None:
    def answers(forward: Forward, seed: int) -> list[torch.Tensor]:
        return [forward.logits(batch(seed + n, lengths)) for n, lengths in enumerate([(6, 3, 9), (2, 16), (18,)] * 5)]

    forwards = [plan_forward(tiny(name)) for name in ("llama", "qwen3")]
    assert all(is_packed(forward.model) for forward in forwards)
    with torch.no_grad():
        alone = [answers(forward, 10 * n) for n, forward in enumerate(forwards)]
    with ThreadPoolExecutor(2) as threads:

        def quietly(n: int) -> list[torch.Tensor]:
            with torch.no_grad():
                return answers(forwards[n], 10 * n)

        together = list(threads.map(quietly, range(2)))
    for got, truth in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))


def test_a_copied_model_is_not_run_as_if_it_had_been_planned() -> None:
    forward = plan_forward(tiny("llama"))
    copied = copy.deepcopy(forward.model)
    with pytest.raises(InputError, match="planned"):
        replace(forward, model=copied).logits(batch())
    assert torch.equal(plan_forward(copied).logits(batch()), forward.logits(batch()))
    forward.model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match="planned"):
        forward.logits(batch())
