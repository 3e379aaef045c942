"""Packing: nothing is lost, and no label crosses from one document into the next."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.example import Example
from deltaw.data.pack import pack
from deltaw.kernels.logprobs import IGNORE


@st.composite
def example_lists(draw):
    documents = draw(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1), min_size=1))
    return [
        Example(
            np.array([token for token, _ in document], np.int32),
            np.array([trained for _, trained in document], bool),
            f"o:{number}",
        )
        for number, document in enumerate(documents)
    ]


@given(example_lists())
def test_packing_loses_nothing_and_labels_stay_in_their_document(examples):
    before = [example.loss_mask.copy() for example in examples]
    batch = pack(examples)
    starts = batch.starts
    assert starts[0] == 0
    assert starts[-1] == len(batch.tokens_T)
    assert batch.origins == tuple(example.origin for example in examples)
    for example, start, end in zip(examples, starts, starts[1:], strict=False):
        assert batch.tokens_T[start:end].tolist() == example.tokens.tolist()
        assert batch.positions_T[start:end].tolist() == list(range(end - start))
        expected = [
            int(token) if trained else IGNORE
            for token, trained in zip(example.tokens[1:], example.loss_mask[1:], strict=True)
        ]
        assert batch.labels_T[start:end].tolist() == [*expected, IGNORE]
    assert batch.supervised == sum(int(example.loss_mask[1:].sum()) for example in examples)
    assert {t.dtype for t in (batch.tokens_T, batch.labels_T, batch.positions_T)} == {torch.int64}
    assert all((example.loss_mask == mask).all() for example, mask in zip(examples, before, strict=True))


def test_a_batch_moves_as_a_whole():
    batch = pack([Example(np.array([1, 2], np.int32), np.array([False, True]), "o")])
    assert batch.to("meta").tokens_T.is_meta
    assert batch.to("meta").origins == batch.origins
    assert batch.to("meta").documents.starts_S.is_meta and batch.to("meta").starts == batch.starts
    assert not batch.tokens_T.is_meta and not batch.documents.starts_S.is_meta


def test_nothing_packs_to_nothing():
    with pytest.raises(ValueError, match="at least one"):
        pack([])
