"""`objective.reward`: what it may be, what a run records of it, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deltaw.config import load_config
from deltaw.config.reward import KINDS, parse_rewards
from deltaw.errors import InputError
from deltaw.rewards.opening import OPENERS

GOOD: list[Any] = [
    "number_equal",
    "judge.py:good",
    "reasoning-gym:chain_sum",
    {"function": "judge.py:good", "seconds": 2},
    {"kind": "number_equal", "tolerance": 0.01, "against": "gold", "tag": "answer"},
    {"kind": "json_schema", "schema": {"type": "object", "properties": {"a": {"const": None}}}},
    {"kind": "regex", "pattern": "^\\d+$", "whole": True},
    ["number_equal", {"kind": "format", "weight": -0.2}, {"kind": "length", "free": 3, "most": 9}],
]


@pytest.mark.parametrize("value", GOOD, ids=str)
def test_a_run_records_what_it_was_given_and_reads_it_again(value: Any, tmp_path: Path) -> None:
    """Also the place of a function's file, which is looked for beside the run file."""
    (tmp_path / "judge.py").write_text("")
    raw = {"base": "b", "output": "o", "data": {"train": "t"}, "objective": {"kind": "grpo", "reward": value}}
    (tmp_path / "run.yaml").write_text(yaml.dump(raw))
    config = load_config(tmp_path / "run.yaml")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text(config.to_yaml())
    assert load_config(elsewhere / "config.yaml").objective == config.objective
    for reward in config.objective.reward or ():
        assert Path(getattr(reward, "function", "/")).is_absolute()


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("numberequal", "number_equal"), ("math", "number_equal"), ("PER", "phoneme_error_rate"), 
        ("judge.py", ":function"),
        ({"kind": "regex"}, "pattern"), ({"kind": "regex", "pattern": "("}, "pattern"), ([], "empty"), (3, "kind"),
        ({"kind": "f1", "tolerance": 0.1}, "tolerance"), ({"kind": "number_equal", "tol": 1}, "tolerance"),
        (["a.py:f", "b.py:f"], "two rewards"), ({"kind": "length", "free": 9, "most": 3}, "most"), 
        ({"weight": 2}, "kind"),
        ({"kind": "exact_match", "weight": 0}, "weight"), ({"kind": "exact_match", "tag": "<a>"}, "tag"),
        ({"kind": "exact_match", "weight": float("nan")}, "exact_match"), ({"kind": ["f1"]}, "kind"),
        ({"kind": "format", "tags": ["a", "a"]}, "twice"),
        ({"kind": "json_schema", "schema": {}, "against": "x"}, "against"),
    ],
    ids=str,
)  # fmt: skip
def test_what_isnt_a_reward_is_refused_with_what_may_be_meant(value: Any, hint: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_rewards(value)
    assert hint in str(refused.value) and len(str(refused.value).splitlines()) <= 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([*KINDS, "kind"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "weight", "pattern", "x"]), inner)
    ),
    max_leaves=6,
)


@given(JSON)
def test_nothing_makes_it_crash(value: Any) -> None:
    try:
        parse_rewards(value)
    except InputError as error:
        assert "\0" not in str(error)


def test_every_kind_can_be_opened() -> None:
    assert OPENERS.keys() == KINDS.keys()
