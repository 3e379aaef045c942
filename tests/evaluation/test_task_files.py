"""A task file: whatever stands in it, it is taken or refused in at most five lines."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.config.tasks import CHOICES, GENERATE, JudgeConfig, TaskConfig, load_tasks
from deltaw.errors import InputError

WORDS = ["choices", "generate", "a.jsonl", "{a}", "$NOPE", "x.py:f", *GENERATE, *CHOICES]
KEYS = [*TaskConfig.model_fields, *JudgeConfig.model_fields, "path", "weight", "metrcs", "num_fewshot"]
leaf = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False) | st.sampled_from(WORDS)
value = st.recursive(
    leaf | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
NAME = {"name": st.sampled_from("ab")}
task = st.fixed_dictionaries(NAME, optional={name: value for name in TaskConfig.model_fields if name not in NAME})
file = st.fixed_dictionaries({"tasks": st.lists(task, max_size=3)}, optional={"judge": value, "task": value})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "tasks.yaml"


@settings(max_examples=40)
@given(raw=file)
def test_whatever_stands_in_it(path: Path, raw: dict) -> None:
    path.write_text(json.dumps(raw))
    try:
        load_tasks(path)
    except InputError as error:
        assert len(str(error).splitlines()) <= 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tasks:\n  - name: a\n    metrcs: [f1]\n", ["tasks.yaml:3", "metrics"]),
        ("tasks:\n  - name: a\n    num_fewshot: 3\n", ["tasks.yaml:3", "shots"]),
        ("tasks:\n  - name: a\n  - name: a\n", ["two tasks are called a"]),
        ("tasks: []\n", ["empty"]),
        ("- name: a\n", ["mapping"]),
        ("tasks:\n  - name: a\n    metrics: [acc]\n", ["tasks.yaml:3", "exact_match"]),
        ("tasks:\n  - {name: a, form: choices, data: x, metrics: [acc_norm]}\n", ["accuracy_norm"]),
        ("tasks:\n  - {name: a, form: choices, data: x, metrics: [f1]}\n", ["f1", "accuracy"]),
        ("tasks:\n  - {name: a, data: x, metrics: [pass_at_1, f1]}\n", ["alone"]),
        ("tasks:\n  - {name: a, data: x, form: choices, max_new_tokens: 3}\n", ["max_new_tokens"]),
        ("tasks:\n  - name: a\njudge: {url: 'http://h/v1', model: m}\n", ["judge does nothing"]),
    ],
)
def test_what_is_wrong_is_named(path: Path, text: str, words: list[str]) -> None:
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load_tasks(path)
    assert all(word in str(refused.value) for word in words), refused.value
