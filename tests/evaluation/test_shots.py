"""Examples in front of what is asked: the same for all rows, none the row's own, and the figures a plain pass has."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.config.tasks import TaskConfig
from deltaw.data.row import Row
from deltaw.errors import InputError, Rejected
from deltaw.evaluation.choices import likelihoods
from deltaw.evaluation.shots import Shot, asks, behind, chosen
from deltaw.evaluation.task_rows import Asked, TaskRows
from deltaw.model import Model, open_model
from deltaw.named import Named
from deltaw.show.progress import QUIET
from tests.tiny import tiny_base


def shot_of(row: Row) -> Shot:
    if row.value["a"] == 0:
        raise Rejected("it has none")
    return Shot(f"ask {row.value['a']}", "answer")


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(0, 5), st.integers(0, 3), st.sets(st.integers(0, 9)))
def test_examples_are_distinct_and_hang_on_seed_and_content_alone(
    values: list[int], count: int, seed: int, avoided: set[int]
) -> None:
    rows = [Row({"a": value}, f"x:{n}") for n, value in enumerate(values)]
    own = {asks(f"ask {value}") for value in avoided}
    possible = set(values) - avoided - {0}
    if len(possible) < count:
        with pytest.raises(InputError):
            chosen(rows, shot_of, count, seed, own)
        return
    shots = chosen(rows, shot_of, count, seed, own)
    assert len({shot.prompt for shot in shots}) == count and not {asks(shot.prompt) for shot in shots} & own
    assert shots == chosen(rows[::-1], shot_of, count, seed, own)


def test_how_they_stand_in_front() -> None:
    shots = [Shot("a", "b"), Shot("c ", "d"), Shot("e", " f")]
    assert behind("x", shots) == "a b\n\nc d\n\ne f\n\nx" and behind("x", []) == "x"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]
    told = behind(chat, [Shot("a", " b"), Shot([*chat[:1], {"role": "user", "content": "c"}], "d")])
    assert [(one["role"], one["content"]) for one in told] == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "x"),
    ]  # fmt: skip
    with pytest.raises(InputError):
        behind("x", [Shot(chat, "b")])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny_base(tmp_path_factory.mktemp("base"), max_position_embeddings=512)
    return open_model(folder, dtype="float32", device="cpu")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [{"question": f"what is {n}?", "choices": [f"it is {n}", "no"], "answer": n % 2} for n in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def asked(model: Model, **task: Any) -> list[Asked]:
    config = TaskConfig.model_validate({"name": "t", **task})
    named = Named(str(model.base.source.directory))
    rows, problems = TaskRows.read(config, named).asked(model, named, QUIET)
    assert not problems
    return rows


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("form", ["choices", "generate"])
def test_every_row_has_the_same_and_never_itself(model: Model, rows: Path, form: str, chat: bool) -> None:
    how: dict[str, Any] = {"data": str(rows), "form": form, "chat": chat, "prompt": "Q: {question}\nA:"}
    plain, shown = asked(model, **how), asked(model, **how, shots=3)
    assert len(shown) == len(plain) - 3
    for row in shown:
        (alone,) = [one for one in plain if one.origin == row.origin]
        assert row.prompt.count("Q: ") == 4 and row.prompt.count(alone.prompt.split("Q: ")[1].split("\n")[0]) == 1
        assert row.choices == alone.choices and row.behind == alone.behind
        assert row.ends == ("" if chat else "\n\n")
    first = [row.prompt.partition("Q: ")[2].rpartition("Q: ")[0] for row in shown]
    assert len(set(first)) == 1
    assert asked(model, **how, shots=3, seed=1)[0].prompt != shown[0].prompt
    assert [row.ids for row in asked(model, **how, shots=3, limit=4)] == [
        row.ids for row in shown if row.origin in {one.origin for one in asked(model, **how, shots=3, limit=4)}
    ]


def test_rows_of_another_file_leave_all_to_be_asked(model: Model, rows: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    extra = {"question": "why?", "choices": ["so", "no"], "answer": 0}
    other.write_text(rows.read_text() + json.dumps(extra) + "\n")
    how: dict[str, Any] = {"data": str(rows), "form": "choices", "chat": False, "prompt": "{question}"}
    shown = asked(model, **how, shots=1, shots_from=str(other))
    assert len(shown) == 12 and all(row.prompt.startswith("why? so\n\n") for row in shown)
    with pytest.raises(InputError):  # the others are asked themselves
        asked(model, **how, shots=2, shots_from=str(other))
    numbers = {n: (row.ids, row.behind) for n, row in enumerate(shown)}
    sums = dict(likelihoods(model, numbers, adapter=False))
    for n, row in enumerate(shown):
        one = dict(likelihoods(model, {n: (row.ids, row.behind)}, adapter=False))
        assert sums[n] == pytest.approx(one[n], abs=1e-3)


CHATS: dict[str, Any] = {
    "messages": lambda n: {"messages": [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{n} + 1"},
                                        {"role": "assistant", "content": f"sum {n + 1}"}]},
    "conversations": lambda n: {"conversations": [{"from": "human", "value": f"{n} + 1"},
                                                  {"from": "gpt", "value": f"sum {n + 1}"}]},
}  # fmt: skip


@pytest.mark.parametrize("kind", CHATS)
def test_chats_are_shown_with_the_answers_that_they_end_with(model: Model, kind: str) -> None:
    data = [CHATS[kind](n) for n in range(4)]
    plain, shown = asked(model, data=data, chat=True), asked(model, data=data, chat=True, shots=2)
    truths = {row.origin: row.truth.removesuffix("<|im_end|>").strip() for row in plain}
    assert len(shown) == 2 and [row.truth for row in shown] == [truths[row.origin] for row in shown]
    for row in shown:
        assert row.prompt.count("sum ") == 2 and row.truth not in row.prompt
    with pytest.raises(InputError, match=r"rows given:1 can't be: it has no answer"):
        asked(model, data=[{"prompt": "a"}], shots=1)


def test_rows_that_are_all_shown_leave_none_to_ask(model: Model, rows: Path) -> None:
    how: dict[str, Any] = {"data": str(rows), "form": "choices", "prompt": "{question}"}
    assert len(asked(model, **how, shots=11)) == 1
    for count in (12, 13):
        with pytest.raises(InputError, match="shots"):
            asked(model, **how, shots=count)


@pytest.mark.parametrize(
    "task",
    [
        {"shots": 3},
        {"data": "x.jsonl", "shots_from": "y.jsonl"},
        {"data": "x.jsonl", "shots": 2, "metrics": ["pass_at_1"]},
        {"data": "x.jsonl", "shots": 65},
    ],
)
def test_what_makes_no_sense_is_refused(task: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TaskConfig.model_validate({"name": "t", **task})
