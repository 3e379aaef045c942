"""reasoning-gym: rows that are the same each time, and its scorers on whatever a model writes."""

from collections.abc import Iterator

import pytest

from deltaw.config.reward import parse_rewards
from deltaw.data.gym_worker import MADE_OF_OTHERS, entries_of
from deltaw.data.read import read_rows
from deltaw.data.row import Row
from deltaw.errors import InputError
from deltaw.rewards.opening import Rewards, rewards_of
from deltaw.rewards.scored import Asked

pytest.importorskip("reasoning_gym")
JUNK = ["", "  ", "12", "-1/0", "x+1", "((((", r"\boxed{3}", "[1,2", "None", "{}", "1e999", "\0", "ü" * 50, "\ud800"]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows("reasoning-gym:countdown:size=3,seed=5")[0]


@pytest.fixture(scope="module")
def rewards(rows: list[Row]) -> Iterator[Rewards]:
    with rewards_of(parse_rewards({"kind": "reasoning_gym", "task": "countdown", "seconds": 1.0}), rows) as opened:
        yield opened


def asked(row: Row, text: str) -> Asked:
    return Asked(row.value["question"], text, row.value, origin=row.origin)


def test_own_answers_are_worth_one_and_no_text_is(rows: list[Row], rewards: Rewards) -> None:
    for row in rows:
        worth = [one.total for one in rewards([asked(row, text) for text in (f" {row.value['answer']}\n", *JUNK)])]
        assert worth[0] == 1 and all(0 <= one < 1 for one in worth[1:])
    assert [row.origin for row in rows] == [f"countdown/seed-5:{number}" for number in (1, 2, 3)]


@pytest.mark.slow
def test_what_takes_for_ever_is_told_and_holds_nobody_up(rows: list[Row], rewards: Rewards) -> None:
    late, behind = rewards([asked(rows[0], "9**9**9**9"), asked(rows[0], rows[0].value["answer"])])
    assert (late.total, late.parts["countdown.unreadable"], behind.total) == (0, 1, 1)


def test_another_seed_gives_other_rows() -> None:
    """The package's own next seed would give the same but one."""
    one, other = ({row["question"] for row in entries_of("countdown", 20, seed, {})} for seed in (1, 2))
    assert len(one) == 20 and not one & other


@pytest.mark.parametrize(
    ("task", "options", "word"),
    [("chain_sums", {}, "chain_sum"), ("chain_sum", {"max_term": 3}, "max_terms"), ("composite", {}, "composite"),
     ("chain_sum", {"max_terms": "x"}, "str")],
)  # fmt: skip
def test_what_there_isnt_is_refused_with_what_there_is(task: str, options: dict[str, object], word: str) -> None:
    with pytest.raises(InputError) as refused:
        entries_of(task, 3, 0, options)
    assert word in str(refused.value)


@pytest.mark.parametrize(("name", "word"), [("x:size=0", "size"), ("x:3", "option=")])
def test_a_source_is_refused_likewise(name: str, word: str) -> None:
    with pytest.raises(InputError) as refused:
        read_rows(f"reasoning-gym:{name}")
    assert word in str(refused.value) and len(str(refused.value).splitlines()) <= 5


@pytest.mark.slow
def test_every_task_scores_its_own_answers_and_survives_any_text() -> None:
    """Each task's rows are the same when they are made again: also those that hang on the order of sets."""
    from reasoning_gym.factory import DATASETS

    for task in (name for name in DATASETS if name not in MADE_OF_OTHERS):
        rows, again = (read_rows(f"reasoning-gym:{task}:size=3,seed=1")[0] for _ in range(2))
        assert rows == again, task
        with rewards_of(parse_rewards("reasoning_gym"), rows) as rewards:
            own = [str(rows[0].value["answer"])] if rows[0].value["answer"] is not None else []
            worth = [one.total for one in rewards([asked(rows[0], text) for text in (*own, *JUNK)])]
        assert worth[: len(own)] == [1] * len(own) and all(0 <= one <= 1 for one in worth), task
