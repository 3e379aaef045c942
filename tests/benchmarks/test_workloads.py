"""The benchmarks' data: the same every time, of the lengths and the supervision that its module states."""

import numpy as np
import pytest

from benchmarks import workloads
from benchmarks.workloads import batches, filled, grouped, pieces, supervised, tokens, workload
from deltaw.data.example import Example


def example(length: int, trained: int = 1) -> Example:
    return Example(np.arange(length, dtype=np.int32), np.arange(length) >= length - trained, f"row:{length}")


def flat(step: list[Example]) -> list[list[int]]:
    return [[*row.tokens.tolist(), *row.loss_mask.tolist()] for row in step]


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_a_workload_depends_on_name_and_seed_alone(name: str) -> None:
    once, again, other = (workload(name, 3, seed) for seed in (0, 0, 1))
    assert [flat(step) for step in once] == [flat(step) for step in again]
    assert [flat(step) for step in once] != [flat(step) for step in other]


def test_rows_are_prepared_alike_every_time() -> None:
    """Which the cache of those that a workload draws from would hide."""
    once, again = (workloads._rows.__wrapped__("builtin:sarcasm", 40) for _ in range(2))
    assert flat(once) == flat(again) and once is not again


def test_dense_is_four_rows_of_512_all_supervised() -> None:
    for step in workload("dense", 55):
        assert [len(row.tokens) for row in step] == [512] * 4
        assert supervised(step) == 4 * 511


def test_words_are_about_768_tokens_half_supervised() -> None:
    steps = workload("words", 50)
    total = sum(map(tokens, steps))
    assert {len(step) for step in steps} == {45}
    assert 720 <= total / 50 <= 816
    assert 0.45 <= sum(map(supervised, steps)) / total <= 0.55


def test_chats_are_sixteen_with_two_supervised_tokens_each() -> None:
    for step in workload("chats", 50):
        assert len(step) == 16
        assert supervised(step) == 32
        assert all(40 <= len(row.tokens) <= 80 for row in step)


def test_long_texts_are_of_many_lengths() -> None:
    steps = workload("long", 20)
    lengths = [len(row.tokens) for step in steps for row in step]
    assert min(lengths) >= 512 and max(lengths) <= 2048 and len(set(lengths)) > len(lengths) / 2
    assert all(supervised(step) == tokens(step) - len(step) for step in steps)
    assert all(tokens(step) <= 4096 for step in steps)


@pytest.mark.parametrize("name", ["words", "chats"])
def test_grouping_leaves_little_padding(name: str) -> None:
    steps = workload(name, 50)
    padded = sum(len(step) * max(len(row.tokens) for row in step) for step in steps)
    assert padded / sum(map(tokens, steps)) < 1.1


def test_a_workload_begins_again_when_it_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "two", lambda seed: [[example(5)], [example(6)]])
    assert [tokens(step) for step in workload("two", 5)] == [5, 6, 5, 6, 5]


def test_an_unknown_workload_is_named() -> None:
    with pytest.raises(ValueError, match=r"no workload 'sparse'; known: dense, words, chats, long, few"):
        workload("sparse", 1)


def test_grouped_keeps_every_row_once_but_a_short_last_step() -> None:
    rows = [example(length) for length in range(5, 28)]
    steps = grouped(rows, 4, seed=0)
    seen = [len(row.tokens) for step in steps for row in step]
    assert len(steps) == 5 and len(set(seen)) == len(seen) == 20
    assert all(max(len(r.tokens) for r in s) - min(len(r.tokens) for r in s) == 3 for s in steps)


def test_filled_and_batches_keep_within_their_limit() -> None:
    rows = [example(length) for length in (900, 800, 700, 600, 500, 3000)]
    steps = filled(rows, 2000, seed=3)
    assert sorted(len(row.tokens) for step in steps for row in step) == [500, 600, 700, 800, 900, 3000]
    assert all(tokens(step) <= 2000 or len(step) == 1 for step in steps)
    cut = batches(rows, 1700)
    assert [row.origin for batch in cut for row in batch] == [row.origin for row in rows]
    assert [tokens(batch) for batch in cut] == [1700, 1300, 500, 3000]


def test_pieces_are_whole_texts_where_they_fit() -> None:
    found = pieces([range(511), range(512), range(2048), range(9000)], np.random.RandomState(0))
    assert [len(piece) for piece in found[:2]] == [512, 2048]
    assert all(512 <= len(piece) <= 2048 for piece in found)
    cut = [number for piece in found[2:] for number in piece]
    assert cut == list(range(len(cut))) and len(cut) > 9000 - 512
