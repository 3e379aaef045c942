"""Examples that begin alike are laid out as a tree: it holds the same examples, computes less, and stays within
bounds."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.base.batch import Batch
from deltaw.data import sharing
from deltaw.data.example import Example
from deltaw.data.loader import Loader
from deltaw.data.pack import pack
from deltaw.data.sharing import LEAST, Shared


def example(tokens: list[int], mask: list[bool], origin: str) -> Example:
    return Example(np.array(tokens, np.int32), np.array(mask, bool), origin)


@st.composite
def rows(draw: st.DrawFn) -> list[Example]:
    """Rows grown from each other: copies, beginnings, continuations, the same tokens trained otherwise."""
    made = list[tuple[list[int], list[bool]]]()
    for _ in range(draw(st.integers(1, 12))):
        tokens, mask = draw(st.sampled_from(made)) if made and draw(st.integers(0, 4)) else ([], [])
        keep = draw(st.integers(0, len(tokens)))
        more = draw(st.lists(st.integers(3, 6), min_size=0 if keep else 1, max_size=40))
        trained = draw(st.lists(st.booleans(), min_size=len(more), max_size=len(more)))
        made.append((tokens[:keep] + more, [False, *(mask[:keep] + trained)[1:]]))
    return [example(tokens, mask, f"row:{n}") for n, (tokens, mask) in enumerate(made)]


def contents(batch: Batch) -> Counter:
    """Each example of a batch: its origin, tokens, labels and positions."""
    return Counter(
        (origin, *(tuple(x[batch.rows_of(n)].tolist()) for x in (batch.tokens_T, batch.labels_T, batch.positions_T)))
        for n, origin in enumerate(batch.origins)
    )


@settings(deadline=None, max_examples=80)
@given(
    examples=rows(),
    capacity=st.integers(1, 200),
    ranks=st.integers(1, 4),
    least=st.sampled_from([1, 4, LEAST]),
    pairs=st.booleans(),
)
def test_batches_hold_the_same_examples_and_compute_less(examples, capacity, ranks, least, pairs) -> None:
    sizes = [2] * (len(examples) // 2) + [1] * (len(examples) % 2) if pairs else ()
    before, sharing.LEAST = sharing.LEAST, least
    try:
        shared = Shared.of(examples, sizes)
    finally:
        sharing.LEAST = before
    if shared is None:
        return
    batches = [part.pack() for part in shared.batches(capacity, ranks)]
    whole = pack(examples)
    assert sum(map(contents, batches), Counter()) == contents(whole)
    assert sum(batch.supervised for batch in batches) == whole.supervised
    assert sum(batch.tokens for batch in batches) == len(whole.tokens_T)
    assert len(batches) >= min(ranks, len(sizes or examples))
    places = [(number, at) for at, batch in enumerate(batches) for number in batch.origins]
    where = dict(places)
    assert len(where) == len(examples)
    if pairs:
        assert all(where[f"row:{n}"] == where[f"row:{n + 1}"] for n in range(0, len(examples) - 1, 2))
    for batch in batches:
        assert len(batch.tokens_T) <= capacity or batch.examples <= (2 if pairs else 1)
        assert contents(batch.unshared()) == contents(batch)
        tree = batch.documents.tree
        if tree is not None:
            used = Counter(tree.parents)
            assert all(used[prefix] > 1 for prefix in tree.prefixes)
    one = shared.pack()
    assert len(one.tokens_T) == sum(shared.costs()) <= (1 - sharing.WORTH) * len(whole.tokens_T)
    assert one.documents.tree is not None
    assert min(b - a for a, b in zip(one.starts, one.starts[1:], strict=False)) >= 1


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_where_nothing_is_shared_nothing_changes(lengths: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    examples = [example(generator.integers(0, 10**6, n).tolist(), [False] * n, f"row:{n}") for n in lengths]
    loaders = [Loader(examples, 100, 50, seed, shares=shares) for shares in (False, True)]
    for (plain, at), (shared, same), _ in zip(*loaders, range(5), strict=False):
        assert at == same and len(plain) == len(shared)
        for a, b in zip(plain, shared, strict=True):
            assert torch.equal(a.tokens_T, b.tokens_T) and a.starts == b.starts and b.documents.tree is None


@settings(deadline=None, max_examples=40)
@given(examples=rows(), ranks=st.integers(1, 3))
def test_a_step_takes_the_same_examples(examples: list[Example], ranks: int) -> None:
    loaders = [Loader(examples, 60, 30, 0, ranks=ranks, shares=shares) for shares in (False, True)]
    for (plain, at), (shared, same), _ in zip(*loaders, range(4), strict=False):
        assert at == same
        assert sum(map(contents, plain), Counter()) == sum(map(contents, shared), Counter())


def test_pairs_share_their_prompt_and_all_the_system_prompt() -> None:
    generator = np.random.default_rng(0)
    system, examples = generator.integers(0, 999, 40).tolist(), list[Example]()
    for pair in range(6):
        prompt = system + generator.integers(0, 999, 30).tolist()
        for _ in range(2):
            answer = generator.integers(0, 999, 10).tolist()
            examples.append(example(prompt + answer, [False] * 70 + [True] * 10, f"pair:{pair}"))
    shared = Shared.of(examples, [2] * 6)
    assert shared is not None
    batch = shared.pack()
    assert len(batch.tokens_T) < 40 + 6 * 30 + 12 * 10 + 20
    assert batch.documents.tree is not None
    assert sorted(len(chain) for chain in batch.documents.tree.chains) == [3] * 12
    assert all(a == b for a, b in zip(batch.origins[::2], batch.origins[1::2], strict=True))


def test_labels_of_a_prefix_count_for_each_who_shares_it() -> None:
    tokens = list(range(3, 43))
    examples = [example([*tokens, n], [False] * 20 + [True] * 21, f"row:{n}") for n in range(50, 53)]
    shared = Shared.of(examples)
    assert shared is not None
    batch = shared.pack()
    values_K = torch.arange(1.0, 1 + int((batch.labels_T != -100).sum()), dtype=torch.float64)
    sums_D = batch.by_document(values_K)
    assert batch.supervised == 3 * 21
    assert sums_D.tolist() == [sum(range(1, 21)) + n for n in (21, 22, 23)]


def test_examples_of_one_prefix_must_take_one_update() -> None:
    with pytest.raises(ValueError):
        Batch.of(torch.arange(6), [0, 2, 4, 6], parents=[-1, 0, 0], updates=[0, 1])
    batch = Batch.of(torch.arange(8), [0, 2, 4, 6, 8], parents=[-1, 0, 0, -1], updates=[3, 3, 1])
    assert batch.segments() == ((3, 0, 6), (1, 6, 8))
    assert batch.tokens_of(3) == 8 and batch.tokens_of(1) == 2
