"""Filled batches: the same batch with room to spare. Any documents, any labels."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from deltaw.base.batch import Batch
from deltaw.base.filled import Places, Size, fill
from deltaw.base.forward import Forward, plan_forward
from deltaw.kernels.logprobs import IGNORE
from tests.architectures import tiny

LENGTHS = st.lists(st.integers(1, 24), min_size=1, max_size=12)


def random_batch(lengths: list[int], share: float, seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    tokens_T = torch.randint(3, 97, (starts[-1],), generator=draw)
    labelled_T = torch.rand(starts[-1], generator=draw) < share
    return Batch.of(tokens_T, starts, torch.where(labelled_T, tokens_T.roll(-1), IGNORE))


@given(LENGTHS, st.floats(0, 1), st.integers(16, 400), st.integers(1, 60))
def test_a_filled_batch_begins_with_the_batch_and_what_follows_is_nobodys(
    lengths: list[int], share: float, capacity: int, longest: int
) -> None:
    batch = random_batch(lengths, share, len(lengths))
    size = Size.of(batch, capacity, longest)
    filled, T = fill(batch, size), len(batch.tokens_T)
    for name in ("tokens_T", "labels_T", "positions_T"):
        assert (
            torch.equal(getattr(filled, name)[:T], getattr(batch, name)) and len(getattr(filled, name)) == size.tokens
        )
    assert (filled.labels_T[T:] == IGNORE).all() and filled.supervised == batch.supervised
    starts = filled.documents.starts_S.tolist()
    assert (
        starts[: len(batch.starts)] == batch.starts and len(starts) == size.documents + 1 and starts[-1] == size.tokens
    )
    lengths_filled = torch.tensor(starts).diff()
    assert lengths_filled.min() >= 0 and lengths_filled.max() <= size.longest == filled.documents.longest
    rows = filled.rows_K
    assert rows is not None and len(rows) == size.labels == len(set(rows.tolist()))
    assert set((batch.labels_T != IGNORE).nonzero().flatten().tolist()) <= set(rows.tolist())
    fewer = -(-capacity // 32)
    assert size.labels % max(64, fewer) == 0, "a small batch isn't of another size for each share of labels"
    assert size.tokens - T < max(64, fewer) and Size.of(filled, capacity, longest).tokens == size.tokens


@given(LENGTHS, st.integers(16, 400))
def test_batches_of_one_size_are_put_into_the_same_places(lengths: list[int], capacity: int) -> None:
    batch = random_batch(lengths, 0.5, 0)
    size = Size.of(batch, capacity, 24)
    places = Places(size, torch.device("cpu"))
    places.put(fill(random_batch(lengths[::-1], 0.2, 1), size))
    before = places.batch()
    places.put(fill(batch, size))
    now, filled = places.batch(), fill(batch, size)
    for name in ("tokens_T", "labels_T", "positions_T", "rows_K"):
        assert torch.equal(getattr(now, name), getattr(filled, name))
        assert getattr(now, name).data_ptr() == getattr(before, name).data_ptr()
    assert torch.equal(now.documents.starts_S, filled.documents.starts_S)
    with pytest.raises(NotImplementedError):
        _ = now.starts
    with pytest.raises(NotImplementedError):
        now.documents.layout(1)


@pytest.fixture(scope="module")
def forward() -> Forward:
    return plan_forward(tiny("llama", torch.float64))


def loss_and_gradient(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by the embedding of every token."""
    table = forward.model.get_input_embeddings().weight  # type: ignore[operator]
    table.requires_grad_(True)
    try:
        loss, _ = forward.loss(batch)
        return loss.detach(), torch.autograd.grad(loss, table)[0]
    finally:
        table.requires_grad_(False)


@settings(max_examples=12)
@given(LENGTHS, st.floats(0.1, 1), st.booleans())
def test_filler_changes_neither_loss_nor_gradient(
    forward: Forward, lengths: list[int], share: float, own_head: bool
) -> None:
    batch = random_batch(lengths, share, 3)
    assume(batch.supervised)
    forward = replace(forward, head=None) if own_head else forward
    filled = fill(batch, Size.of(batch, 256, 24))
    places = Places(Size.of(batch, 256, 24), torch.device("cpu"))
    places.put(filled)
    loss, gradient = loss_and_gradient(forward, batch)
    for same in (filled, places.batch(filled.documents)):
        its_loss, its_gradient = loss_and_gradient(forward, same)
        torch.testing.assert_close(its_loss, loss, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(its_gradient, gradient, rtol=1e-9, atol=1e-10)


def test_what_does_not_fit_is_refused() -> None:
    batch = random_batch([5, 6], 1.0, 0)
    for size in (Size(8, 8, 8, 8), Size(64, 1, 64, 64), Size(64, 8, 5, 64), Size(64, 64, 16, 3)):
        with pytest.raises(ValueError, match="fit"):
            fill(batch, size)
    with pytest.raises(ValueError, match="own"):
        fill(replace(batch, updates=(0, 1)), Size.of(batch, 64, 64))


SIZE = st.builds(Size, *(st.integers(1, 400) for _ in range(4)))


@given(SIZE, st.lists(SIZE, max_size=6))
def test_a_batch_goes_into_a_size_that_is_there_where_that_costs_hardly_more(size: Size, sizes: list[Size]) -> None:
    chosen = size.among(sizes)
    fitting = [other for other in sizes if other.with_(size) == other and other.cost <= 1.05 * size.cost]
    assert chosen in (fitting or [size]) and chosen.cost == min(other.cost for other in fitting or [size])
