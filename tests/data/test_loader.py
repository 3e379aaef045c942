"""The loader: every example once per epoch, and the same continuation from every position."""

import dataclasses
import json
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.data.example import Example
from deltaw.data.loader import Loader, LoaderState, Plan

lengths_of = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def examples_of(lengths) -> list[Example]:
    return [Example(np.full(n, i, np.int32), np.ones(n, bool), f"o:{i}") for i, n in enumerate(lengths)]


@given(lengths_of, st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**70), st.integers(0, 3))
def test_an_epoch_is_every_example_once_within_the_bounds(lengths, per_step, per_batch, seed, epoch):
    sizes = {"tokens_per_step": per_step, "tokens_per_batch": per_batch}
    steps = Plan(lengths, **sizes, seed=seed, epoch=epoch)
    assert sorted(i for step in steps for batch in step for i in batch) == list(range(len(lengths)))
    for step in steps:
        assert sum(lengths[i] for batch in step for i in batch) <= per_step or sum(map(len, step)) == 1
        for batch in step:
            assert sum(lengths[i] for i in batch) <= per_batch or len(batch) == 1
    assert list(steps) == list(Plan(lengths, **sizes, seed=seed, epoch=epoch))


@given(lengths_of, st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_the_batch_size_does_not_change_what_a_step_trains_on(lengths, per_step, small, large):
    def flat(per_batch):
        steps = Plan(lengths, tokens_per_step=per_step, tokens_per_batch=per_batch, seed=0, epoch=0)
        return [[i for batch in step for i in batch] for step in steps]

    assert flat(small) == flat(large)


def test_epochs_and_seeds_differ_and_the_order_is_fixed_for_ever():
    def order(seed, epoch):
        steps = Plan([1] * 8, tokens_per_step=8, tokens_per_batch=8, seed=seed, epoch=epoch)
        return steps[0][0]

    assert order(0, 0) != order(0, 1) != order(1, 0)
    assert order(0, 0) != order(2**32, 0)
    assert order(7, 3) == [6, 4, 5, 7, 3, 0, 1, 2]


@given(lengths_of, st.integers(5, 60), st.data())
@settings(deadline=None)
def test_resuming_anywhere_continues_identically(lengths, per_step, data):
    examples = examples_of(lengths)

    def run(count, start):
        loader = Loader(examples, per_step, 20, seed=3, start=start)
        return [([batch.origins for batch in batches], state) for batches, state in islice(loader, count)]

    total = 2 * Loader(examples, per_step, 20, seed=3).steps_in_epoch(0) + 2
    straight = run(total, LoaderState())
    stop = data.draw(st.integers(1, total - 1))
    saved = json.loads(json.dumps(dataclasses.asdict(straight[stop - 1][1])))
    assert run(total - stop, LoaderState(**saved)) == straight[stop:]


def test_counting_steps():
    loader = Loader(examples_of([10] * 10), 20, 20, seed=0)
    assert loader.steps_in_epoch(0) == 5
    assert [loader.total_steps(epochs) for epochs in (0.01, 0.5, 1.0, 2.0, 2.1)] == [1, 3, 5, 10, 11]


@given(st.integers(1, 40), st.integers(0, 600))
@settings(deadline=None)
def test_steps_in_a_part_of_an_epoch_are_exact(count, hundredths):
    """Against whole numbers alone; every tenth and hundredth of up to six epochs."""
    loader = Loader(examples_of([10] * count), 10, 10, seed=0)
    assert loader.total_steps(max(hundredths, 1) / 100) == max(1, -(-max(hundredths, 1) * count // 100))


def test_all_tenths_of_ten_steps():
    loader = Loader(examples_of([10] * 10), 10, 10, seed=0)
    assert [loader.total_steps(tenths / 10) for tenths in range(1, 60)] == list(range(1, 60))
    assert [loader.total_steps(float(f"{n / 100:.2f}")) for n in range(1, 600)] == [-(-n // 10) for n in range(1, 600)]


@pytest.mark.parametrize("epochs", [1e5, 1e6, 1e15])
def test_any_number_of_epochs_is_counted_at_once(epochs):
    """As many as it must be: each epoch has 3 or 4 steps, by the order of its documents."""
    loader = Loader(examples_of([7, 5, 5, 3, 3, 8, 1, 9]), 14, 14, seed=0)
    began = time.monotonic()
    total = loader.total_steps(epochs)
    mean = sum(loader.steps_in_epoch(epoch) for epoch in range(1000)) / 1000
    assert time.monotonic() - began < 2 and total == pytest.approx(epochs * mean, rel=1e-9)
    assert sum(loader.steps_in_epoch(epoch) for epoch in range(900)) == loader.total_steps(900.0)


@pytest.mark.parametrize("state", [LoaderState(0, 5), LoaderState(-1, 0), LoaderState(0, -1)])
def test_a_position_that_does_not_exist_is_refused(state):
    with pytest.raises(ValueError, match="not a position"):
        Loader(examples_of([10] * 10), 20, 20, seed=0, start=state)


def test_no_examples_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Loader([], 20, 20, seed=0)
