"""The verifiers: a row's own answer is worth their maximum, and no text makes them crash or leave their range."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deltaw.config.evaluate import METRICS
from deltaw.config.reward import parse_rewards
from deltaw.data.row import Row
from deltaw.errors import InputError, RunError
from deltaw.evaluation.numbers import last_number
from deltaw.rewards.opening import Rewards, looked_at, rewards_of
from deltaw.rewards.scored import Asked

KINDS: list[Any] = [
    *METRICS,
    {"kind": "number_equal", "tolerance": 0.5},
    {"kind": "exact_match", "tag": "answer"},
    {"kind": "number_equal", "tag": "x"},
    "json_schema",
    {"kind": "json_schema", "schema": {"type": ["object", "number"], "minimum": 3}},
    "format",
    {"kind": "format", "tags": ["a"]},
    {"kind": "length", "free": 3, "most": 10},
]
PIECES = [
    "<answer>",
    "</answer>",
    "<think>",
    "\\boxed{",
    "####",
    "$1,000.5",
    "1/2",
    "-",
    "{",
    "}",
    '"a": 1',
    "[",
    "1e999",
    " ",
]
TEXTS = st.text(max_size=30) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
ROW = Row({"prompt": "how many?", "answer": "so it is 42 or more"}, "rows.jsonl:7")


def opened(config: Any, row: Row = ROW) -> Rewards:
    return rewards_of(parse_rewards(config), [row])


def value(rewards: Rewards, text: str, row: Row = ROW) -> float:
    return rewards([Asked("how many?", text, row.value, origin=row.origin)])[0].total


@pytest.mark.parametrize("config", KINDS, ids=str)
@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
def test_no_text_makes_it_crash_or_leave_its_range(config: Any, text: str) -> None:
    (reward,) = parse_rewards(config)
    worth = value(opened(config), text)
    assert reward.LOW <= worth <= reward.HIGH


@pytest.mark.parametrize("kind", METRICS)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXTS.filter(str.strip), min_size=1, max_size=3), number=st.integers(-(10**9), 10**9))
def test_a_rows_own_answer_is_worth_the_maximum(kind: str, texts: list[str], number: int) -> None:
    """Any of several, in a tag where that is asked for."""
    right = [f"{text} it is {number}" for text in texts] if kind == "number_equal" else texts
    assume(kind != "number_equal" or all(last_number(text) is not None for text in right))  # an empty \boxed{}
    row = Row({"prompt": "?", "gold": right}, "rows.jsonl:1")
    rewards = opened({"kind": kind, "against": "gold"}, row)
    assert all(value(rewards, text, row) == 1 for text in right)
    if all("<" not in text for text in right):
        tagged = opened({"kind": kind, "against": "gold", "tag": "final"}, row)
        assert all(value(tagged, f"hm <final>no</final> <final> {text}</final>.", row) == 1 for text in right)
        assert value(tagged, right[0], row) == 0


def test_the_preview_shows_own_answers_in_the_tags_that_are_asked_for() -> None:
    rewards = opened([{"kind": "number_equal", "tag": "answer"}, {"kind": "format", "weight": 0.5}])
    (look,) = rewards.look([ROW])
    assert look.own is not None and (look.own.total, look.empty.total) == (1.5, 0)
    wrong = opened([{"kind": "format", "tags": ["a"], "weight": -1}])
    assert "warning" in looked_at(wrong.look([ROW]))[-1] and "warning" not in looked_at([look])[-1]


TRUTHS = {
    "a chat": {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "7"}]},
    "shared": {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "7"}]},
    "a completion": {"prompt": "?", "completion": "7"},
    "capitals": {"Question": "?", "Answer": "7"},
    "an ideal": {"input": "?", "ideal": "7"},
    "a label": {"text": "?", "label": 7},
    "a pair": {"prompt": "?", "chosen": "7", "rejected": "8"},
    "alpaca": {"instruction": "?", "input": "8", "output": "7"},
}


@pytest.mark.parametrize("name", TRUTHS)
def test_the_truth_is_the_rows_own_answer(name: str) -> None:
    row = Row(TRUTHS[name], "rows.jsonl:1")
    rewards = opened("exact_match", row)
    assert (value(rewards, "7", row), value(rewards, "8", row)) == (1, 0)


def test_columns_and_fields_within_fields_are_found() -> None:
    row = Row({"frage": "?", "antwort": "7", "meta": {"right": 7.5}}, "rows.jsonl:1")
    columns = {"prompt": "frage", "completion": "antwort"}
    with rewards_of(parse_rewards("exact_match"), [row], columns=columns) as rewards:
        assert value(rewards, "7", row) == 1
    assert value(opened({"kind": "number_equal", "against": "meta.right"}, row), "$7.50", row) == 1


@pytest.mark.parametrize(
    ("config", "row"),
    [
        ("exact_match", {"prompt": "?"}), ("number_equal", {"prompt": "?", "answer": "none"}),
        ({"kind": "f1", "against": "gold"}, {"prompt": "?", "answer": "7"}),
        ({"kind": "f1", "against": "gold"}, {"prompt": "?", "gold": ["7", None]}),
        ({"kind": "f1", "against": "gold"}, {"prompt": "?", "gold": ""}), ("pass_at_1", {"prompt": "?"}),
        ({"kind": "json_schema", "against": "gold"}, {"prompt": "?", "gold": {"type": "text"}}),
        ({"kind": "json_schema", "against": "gold"}, {"prompt": "?", "gold": "{"}),
        ("reasoning_gym", {"question": "?", "answer": "7"}),
    ],
    ids=str,
)  # fmt: skip
def test_rows_without_a_truth_are_counted_before_work(config: Any, row: dict[str, Any]) -> None:
    with pytest.raises(InputError) as refused:
        rewards_of(parse_rewards(config), [Row(row, "rows.jsonl:1"), Row(row, "rows.jsonl:2")])
    assert "2 of 2 rows" in str(refused.value) and "rows.jsonl:1" in str(refused.value)


def test_error_rates_are_worth_what_is_right_and_never_less_than_nothing() -> None:
    row = Row({"prompt": "c a t ->", "completion": " K AE T"}, "rows.jsonl:1")
    rewards = opened("phoneme_error_rate", row)
    assert [value(rewards, text, row) for text in (" K AE T", "K AE", "", "K " * 9)] == [1, 1 - 1 / 3, 0, 0]


def test_format_and_length() -> None:
    texts = ["<think>a</think><answer>b</answer>", " <think></think>\n<answer>\n</answer> "]
    wrong = [
        "<answer>b</answer><think>a</think>",
        texts[0] * 2,
        texts[0] + ".",
        "<think>a<answer>b</answer></think>",
        "",
    ]
    assert [value(opened("format"), text) for text in (*texts, *wrong)] == [1, 1, 0, 0, 0, 0, 0]
    length = opened({"kind": "length", "free": 10, "most": 20})
    assert [value(length, "x" * size) for size in (0, 10, 15, 20, 99)] == [0, 0, -0.5, -1, -1]


@pytest.fixture(scope="module")
def pattern() -> Iterator[Rewards]:
    with opened({"kind": "regex", "pattern": r"(?i)^(a+)+b?$", "seconds": 0.5}) as rewards:
        yield rewards


def test_a_pattern_that_never_ends_is_an_error_that_names_it(pattern: Rewards) -> None:
    assert [value(pattern, text) for text in ("AAa", "aab", "x", "")] == [1, 1, 0, 0]
    with pytest.raises(RunError, match=r"a\+.*rows\.jsonl:7"):
        value(pattern, "a" * 40 + "c")
    assert value(pattern, "a") == 1


@settings(max_examples=20, deadline=None)
@given(text=TEXTS)
def test_a_pattern_takes_any_text(pattern: Rewards, text: str) -> None:
    assert value(pattern, text) in (0, 1)


def test_programs_pass_their_rows_tests() -> None:
    row = Row({"prompt": "def add(a, b):\n", "test": "assert add(1, 2) == 3", "entry_point": "add"}, "rows.jsonl:1")
    rewards = opened("pass_at_1", row)
    asked = [Asked("?", text, row.value) for text in ("    return a + b\n", "    return a - b\n", "\0")]
    assert [scored.total for scored in rewards(asked)] == [1, 0, 0]


def test_several_are_added_with_their_weights_and_told_apart() -> None:
    rewards = opened(["exact_match", {"kind": "length", "free": 0, "most": 100, "weight": 2, "name": "short"}])
    (scored,) = rewards([Asked("?", "x" * 50, ROW.value)])
    assert (scored.total, scored.parts) == (-1, {"exact_match": 0, "short": -0.5}) and math.isfinite(scored.total)
