"""Choices: which is right, what is asked, and likelihoods against the model's own logits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.adapter.attach import attach
from deltaw.config import AdapterSpec
from deltaw.errors import Rejected
from deltaw.evaluation.choices import Choices, choices_of, likelihoods, texts_behind
from deltaw.evaluation.programs import checks_of
from deltaw.model import Model, open_model
from tests.tiny import tiny_base

TEXTS = ["Oslo", "Rome", "Paris"]


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"choices": TEXTS, "answer": 2}, 2),
        ({"choices": TEXTS, "answer": "C"}, 2),
        ({"choices": TEXTS, "answer": "Paris"}, 2),
        ({"choices": [f" {text}" for text in TEXTS], "answer": "Rome"}, 1),
        ({"endings": TEXTS, "label": "1"}, 1),  # HellaSwag: a number as a text
        ({"choices": {"text": TEXTS, "label": ["A", "B", "C"]}, "answerkey": "B"}, 1),  # ARC
        ({"choices": {"text": TEXTS, "label": ["1", "2", "3"]}, "answerkey": "1"}, 0),  # ARC, labelled from 1
        ({"options": ["3", "1", "2"], "answer": "1"}, 1),  # a choice of that text comes first
        ({"choices": TEXTS, "answer": 2.0}, 2),  # a table's column of numbers that lacks some
        ({"choices": TEXTS, "answer": "2.0"}, 2),
        ({"choices": json.dumps(TEXTS), "answer": 2}, 2),  # a table's cell
        ({"choices": repr({"text": TEXTS, "label": ["1", "2", "3"]}), "answer": "3"}, 2),
    ],
)
def test_the_right_one_however_it_is_named(row: dict, gold: int) -> None:
    assert choices_of(row).gold == gold


@pytest.mark.parametrize(
    "row",
    [
        {"question": "?"},
        {"choices": TEXTS},
        {"choices": TEXTS, "answer": 3},
        {"choices": TEXTS, "answer": -1},
        {"choices": TEXTS, "answer": True},
        {"choices": TEXTS, "answer": "D"},
        {"choices": TEXTS, "answer": "oslo"},
        {"choices": ["a"], "answer": 0},
        {"choices": ["a", "a"], "answer": 0},
        {"choices": ["a", " "], "answer": 0},
        {"choices": "abc", "answer": 0},
        {"choices": "['a' 'b']", "answer": 0},
        {"choices": "[" * 9999, "answer": 0},
        {"choices": TEXTS, "answer": 1.5},
        {"choices": TEXTS, "answer": float("nan")},
    ],
)
def test_what_is_no_row_of_choices(row: dict) -> None:
    with pytest.raises(Rejected):
        choices_of(row)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 4) | st.floats(allow_nan=False) | st.text("ABab1 ", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["text", "label", "choices"]), inner, max_size=3)
    ),
    max_leaves=8,
)
COLUMNS = ["choices", "options", "answer", "label", "test", "test_list", "entry_point", "test_setup_code"]


@settings(max_examples=80)
@given(st.dictionaries(st.sampled_from(COLUMNS), json_values, max_size=4))
def test_any_row_is_taken_or_rejected(row: dict) -> None:
    for read in (choices_of, lambda value: checks_of(value, "")):
        try:
            taken = read(row)
        except Rejected:
            continue
        assert not isinstance(taken, Choices) or 0 <= taken.gold < len(taken.texts)


def test_each_metric_by_hand() -> None:
    choices = Choices((" aé", "bbbb", "cccccccc"), 0)
    assert choices.lengths == {"accuracy": [1] * 3, "accuracy_norm": [2, 4, 8], "accuracy_bytes": [3, 4, 8]}
    assert choices.scores([-3.0, -4.0, -9.0]) == {"accuracy": 1, "accuracy_norm": 0, "accuracy_bytes": 1}  # ties: first
    assert Choices(choices.texts, 2).scores([-3.0, -4.0, -7.0]) == {
        "accuracy": 0, "accuracy_norm": 1, "accuracy_bytes": 1
    }  # fmt: skip


@settings(max_examples=40)
@given(st.text("ab ", max_size=6), st.lists(st.text("cd ", min_size=1, max_size=4), min_size=2, max_size=3))
def test_a_blank_stands_between_and_none_is_lost(prompt: str, texts: list[str]) -> None:
    asked, behind = texts_behind(prompt, Choices(tuple(texts), 0))
    for text, whole in zip(texts, behind, strict=True):
        joined = asked + whole
        assert joined.replace(" ", "") == (prompt + text).replace(" ", "")
        if prompt.strip():
            assert not asked.endswith(" ") and whole[0].isspace()  # lm-eval's border
    messages = [{"role": "user", "content": "?"}]
    assert texts_behind(messages, Choices((" a ", "b"), 0)) == (messages, ["a", "b"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    opened = open_model(tiny_base(tmp_path_factory.mktemp("choices") / "base"), dtype="float32")
    generator = torch.Generator().manual_seed(0)
    attached = attach(opened.base.model, AdapterSpec(rank=4, alpha=64), generator=generator)
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_(0, 0.2, generator=generator)
    return Model(opened.base, opened.renderer, opened.forward, attached)


def test_likelihoods_are_the_models_own(model: Model) -> None:
    random = np.random.default_rng(0)
    rows = {n: (random.integers(5, 60, 3 + n).tolist(), [random.integers(5, 60, k).tolist() for k in (1, 4, 2)])
            for n in range(5)}  # fmt: skip
    seen = {}
    for adapter in (True, False):
        given = seen[adapter] = dict(likelihoods(model, rows, adapter=adapter))
        assert set(given) == set(rows)
        for n, (prompt, choices) in rows.items():
            for choice, sum_ in zip(choices, given[n], strict=True):
                assert sum_ == pytest.approx(_plain(model, prompt, choice, adapter), abs=1e-4)
    assert all(abs(a - b) > 1e-3 for n in rows for a, b in zip(seen[True][n], seen[False][n], strict=True))


def _plain(model: Model, prompt: list[int], choice: list[int], adapter: bool) -> float:
    assert model.attached is not None
    with torch.no_grad():
        if adapter:
            logits = model.base.model(input_ids=torch.tensor([prompt + choice])).logits[0]
        else:
            with model.attached.disabled():
                logits = model.base.model(input_ids=torch.tensor([prompt + choice])).logits[0]
    logp = logits.double().log_softmax(-1)
    return float(sum(logp[len(prompt) + at - 1, token] for at, token in enumerate(choice)))


def test_the_recipes_rows_can_be_used() -> None:
    file = Path(__file__).parents[2] / "recipes/which.jsonl"
    rows = [choices_of(json.loads(line)) for line in file.read_text().splitlines()]
    assert len(rows) == 120 and {row.gold for row in rows} == {0, 1, 2, 3}
