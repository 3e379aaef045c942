"""Rows in flat arrays are the rows they were built from, whatever is asked of them."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltaw.base.parts import DESIRABLE, PLAIN, UNDESIRABLE
from deltaw.data.example import Example
from deltaw.data.examples import Builder, Examples, fingerprint, lengths_of, supervised_of
from deltaw.data.pack import pack

words = st.lists(st.sampled_from(["a", "b c", "messages[].name", "<|x|>"]), max_size=2).map(tuple)
origins = st.one_of(
    st.builds("{}:{}".format, st.sampled_from(["a.jsonl", "d/b.csv", "x:y"]), st.integers(0, 2**40)),
    st.builds("a.txt:{} (piece {} of {})".format, st.integers(0, 9), st.integers(1, 300), st.integers(1, 300)),
    st.text(max_size=8),
    st.sampled_from(["", ":", "a:01", "a:1 (piece 0 of 2)", "a:1 (piece 1 of 2) ", "b:-1", "a\n:3", "١:٣", "a:٣"]),
)


@st.composite
def one(draw) -> Example:
    tokens = np.array(draw(st.lists(st.integers(0, 2**31 - 1), max_size=12)), np.int32)
    mask = np.array(draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))), bool)
    numbers = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    kinds = draw(words), draw(words), draw(words)
    return Example(
        tokens,
        mask,
        draw(origins),
        numbers[0],
        *kinds,
        numbers[1],
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([PLAIN, DESIRABLE, UNDESIRABLE])),
    )


rows = st.lists(one(), max_size=12)


def plain(example: Example) -> tuple:
    fields = ("origin", "untrained_turns", "unused", "left_out", "names", "context", "goes_on", "glued", "part")
    values = [getattr(example, field) for field in fields]
    return example.tokens.dtype, example.tokens.tolist(), example.loss_mask.tolist(), *values


def old_fingerprint(*parts) -> str:
    """As it was before rows lay in arrays."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        for example in part:
            digest.update(len(example.tokens).to_bytes(8, "little"))
            digest.update(example.tokens.tobytes())
            digest.update(example.loss_mask.tobytes())
    return digest.hexdigest()


@given(rows, st.data())
def test_examples_are_what_they_were_built_from_in_every_use(examples, data):
    built = Examples.of(examples)
    assert [plain(row) for row in built] == [plain(row) for row in examples]
    numbers = data.draw(st.lists(st.integers(0, len(examples) - 1), max_size=20) if examples else st.just([]))
    chosen, taken = [examples[n] for n in numbers], built.take(np.array(numbers, np.int64))
    assert [plain(taken[n]) for n in range(-len(chosen), len(chosen))] == [plain(row) for row in chosen] * 2
    assert taken.columns is built.columns
    assert fingerprint(taken, built) == old_fingerprint(chosen, examples) == fingerprint(chosen, examples)
    assert taken.lengths.tolist() == lengths_of(chosen).tolist() == [len(row.tokens) for row in chosen]
    assert taken.supervised.tolist() == supervised_of(chosen).tolist() == [row.loss_mask.sum() for row in chosen]
    assert taken.highest.tolist() == [max(row.tokens.tolist(), default=0) for row in chosen]
    assert [taken.origin(n) for n in range(len(chosen))] == [row.origin for row in chosen]
    ids = data.draw(st.sets(st.sampled_from([0, 1, *(int(t) for row in chosen for t in row.tokens)]), max_size=3))
    trains = [not ids.isdisjoint(row.tokens[row.loss_mask].tolist()) for row in chosen]
    assert taken.train_any(ids).tolist() == trains
    assert taken.is_kind(lambda kind: kind.glued).tolist() == [row.glued for row in chosen]
    assert [plain(row) for row in taken.distinct] == [plain(examples[n]) for n in dict.fromkeys(numbers)]
    keys = [(tuple(row.tokens), tuple(row.loss_mask)) for row in chosen]
    assert len(np.unique(taken.digests())) == len(set(keys))
    part = slice(*data.draw(st.tuples(st.integers(-5, 9), st.integers(-5, 9), st.sampled_from([1, 2, -1]))))
    assert [plain(row) for row in taken[part]] == [plain(row) for row in chosen[part]]
    if chosen and all(len(row.tokens) for row in chosen):
        batches = pack(taken), pack(chosen)
        assert batches[0].origins == batches[1].origins
        assert all((getattr(batches[0], n) == getattr(batches[1], n)).all() for n in ("tokens_T", "labels_T"))


@given(st.lists(rows, max_size=4))
def test_kinds_are_counted_and_chunks_add_up(chunks):
    builder = Builder()
    for number, chunk in enumerate(chunks):
        if number % 2:
            builder.extend(Examples.of(chunk).columns)
        else:
            [builder.append(example) for example in chunk]
    built, examples = builder.finish(), [example for chunk in chunks for example in chunk]
    assert [plain(row) for row in built] == [plain(row) for row in examples]
    seen: dict[tuple, list[int]] = {}
    for number, row in enumerate(examples):
        seen.setdefault(plain(row)[4:], []).append(number)
    assert [(tuple(kind), count, first) for kind, count, first in built.kinds()] == [
        (kind, len(numbers), numbers[0]) for kind, numbers in seen.items()
    ]


def test_a_row_costs_little_beside_its_tokens():
    words = Examples.of(
        Example(np.arange(17, dtype=np.int32), np.ones(17, bool), f"words.jsonl:{n}") for n in range(70_000)
    )
    assert (words.columns.nbytes + words.rows.nbytes + 2 * words.lengths.nbytes) / words.lengths.sum() <= 8
