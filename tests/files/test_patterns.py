"""PEFT's rule for its patterns, held to PEFT: which key it takes for a module, over keys that hypothesis makes."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from deltaw.errors import InputError
from deltaw.files import patterns
from deltaw.files.patterns import LINEAR, first_matches

PATHS = (
    "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.shared_expert.gate_proj", "transformer.h.1.attn.c_attn", "a.b",
    "axb", "layers", "model.layers.0.mlp.down_proj.weight",
)  # fmt: skip
PIECES = st.sampled_from(
    ["q_proj", "gate_proj", "layers", "self_attn", "model", "mlp", "0", "1", "11", "a", "b", "x", ".", r"\.", "^", "$",
     "|", "(", ")", "(?:", "(?=", "(?!", "(?<=", "*", "+", "?", "*?", "{1,2}", "[01]", "[^0]", r"\d", r"\w+", ".*",
     r"\1", r"\2", r"\b", "(?i:Q)", "_proj"]
)  # fmt: skip
LITERAL = st.lists(
    st.sampled_from(["q_proj", "layers", "1", "11", "a", ".", r"\.", "^", "$", "-", "_proj"]), min_size=1
)
LITERAL = LITERAL.map("".join)
KEYS = st.lists(PIECES, min_size=1, max_size=6).map("".join)


def by_peft(keys: list[str], path: str) -> str | None:
    key = get_pattern_key(keys, path)
    return key if key in keys else None


@settings(max_examples=150, deadline=None)
@given(keys=st.lists(KEYS, min_size=1, max_size=3, unique=True))
def test_the_key_is_the_one_that_peft_takes(keys: list[str]) -> None:
    try:
        wanted = {path: key for path in PATHS if (key := by_peft(keys, path))}
    except re.error:
        with pytest.raises(InputError):
            first_matches(keys, PATHS)
        return
    assert first_matches(keys, PATHS) == wanted


@given(keys=st.lists(LITERAL, min_size=1, max_size=4, unique=True))
def test_plain_keys_need_no_process(keys: list[str]) -> None:
    assert all(LINEAR.fullmatch(key) for key in keys)
    assert first_matches(keys, PATHS) == {path: key for path in PATHS if (key := by_peft(keys, path))}


def test_an_anchor_means_the_whole_path() -> None:
    paths = ["model.layers.0.self_attn.q_proj", "q_proj"]
    assert first_matches(["^q_proj"], paths) == {"q_proj": "^q_proj"}
    assert first_matches(["^layers.0.self_attn.q_proj"], paths) == {}
    assert first_matches(["q_proj$", "q_proj"], paths) == dict.fromkeys(paths, "q_proj$")


def test_the_first_key_wins_across_both_ways_of_matching() -> None:
    paths = ["x.q_proj", "x.k_proj", "x.v_proj"]
    taken = first_matches(["v_proj", "(q|v)_proj", "k_proj", "q_proj"], paths)
    assert taken == {"x.v_proj": "v_proj", "x.q_proj": "(q|v)_proj", "x.k_proj": "k_proj"}


def test_a_path_that_is_a_key_as_it_stands_is_that_key() -> None:
    """PEFT looks the path itself up where nothing matched: `c++` is no regular expression for it."""
    assert get_pattern_key(["m.c[0]"], "m.c[0]") == "m.c[0]"
    assert first_matches(["m.c[0]"], ["m.c[0]", "m.c0"]) == {"m.c[0]": "m.c[0]", "m.c0": "m.c[0]"}


@pytest.mark.parametrize("key", ["(.*)*q_proj", "(a+)+$b", "((a|a)*)*b", r"(a|aa)+\2c", "(x+x+)+y|(a*)*b"])
def test_what_takes_for_ever_is_refused_by_name_within_a_second(key: str) -> None:
    began = time.perf_counter()
    with pytest.raises(InputError) as caught:
        first_matches(["fine", key], ["a" * 900 + "." + "x" * 900])
    assert repr(key) in caught.value.what and time.perf_counter() - began < 1 + patterns.SECONDS


@pytest.mark.parametrize("key", ["[q", "(", "(?", "*a", "a{2,1}", "(?P<x", "(?i)q", "(" * 5000 + ")" * 5000])
def test_what_is_no_regular_expression_is_refused_by_name(key: str) -> None:
    with pytest.raises(InputError) as caught:
        first_matches([key], PATHS)
    assert repr(key)[:70] in caught.value.what and len(caught.value.what) < 400


def test_memory_is_bounded() -> None:
    with pytest.raises(InputError):
        first_matches(
            ["((((a{1,65000}){1,65000}){1,65000}){1,65000}){1,65000}|" + "b" * 900_000 + "(x|y)*" * 50_000], PATHS
        )
