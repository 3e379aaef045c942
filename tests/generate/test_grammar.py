"""Answers that are held to a schema are valid under it, and everything else about them is as without."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deltaw.errors import InputError, RunError
from deltaw.generate.engine import Engine, Event
from deltaw.generate.grammar import Grammars, Guide
from deltaw.generate.sampling import RowsFailed, Sampling
from deltaw.model import Model, open_model
from tests.tiny import tiny_base

pytest.importorskip("llguidance", reason="pip install 'deltaw[serve]'")
PROMPT = (5, 6, 7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny_base(tmp_path_factory.mktemp("base"), max_position_embeddings=512)
    return open_model(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def grammars(model: Model) -> Grammars:
    return Grammars(model.renderer.tokenizer)


def valid(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """JSON Schema's meaning of the keywords that are taken, written down once more."""
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(valid(value, one, root) for one in schema["anyOf"])
    if "oneOf" in schema:
        return sum(valid(value, one, root) for one in schema["oneOf"]) == 1
    if "enum" in schema or "const" in schema:
        return any(value == one and type(value) is type(one) for one in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        if not isinstance(value, list) or not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9):
            return False
        return all(valid(one, schema.get("items", {}), root) for one in value)
    if kind == "object":
        own = schema.get("properties", {})
        if not isinstance(value, dict) or not set(schema.get("required", ())) <= value.keys():
            return False
        if schema.get("additionalProperties") is False and not value.keys() <= own.keys():
            return False
        return all(valid(one, own.get(name, {}), root) for name, one in value.items())
    if kind == "string":
        return isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)
    if kind in ("integer", "number"):
        numbers = (int,) if kind == "integer" else (int, float)
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        return isinstance(value, numbers) and not isinstance(value, bool) and low <= value <= high
    return {"boolean": isinstance(value, bool), "null": value is None, None: True}[kind]


LEAVES = st.one_of(
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-99, 99),
        st.integers(0, 999),
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"$ref": "#/$defs/own"}, {"const": 'it\'s "so" — é'}]),
    st.lists(st.one_of(st.text(max_size=4), st.integers(), st.none()), min_size=1, max_size=3, unique=True).map(
        lambda values: {"enum": values}
    ),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda items, most: {"type": "array", "items": items, "maxItems": most, "minItems": most // 2},
            inner,
            st.integers(0, 3),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"oneOf": some}),
        st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3).flatmap(
            lambda own: (
                st.lists(st.sampled_from(sorted(own)), unique=True).map(
                    lambda required: {
                        "type": "object",
                        "properties": own,
                        "required": required,
                        "additionalProperties": False,
                    }
                )
                if own
                else st.just({"type": "object", "properties": {}, "additionalProperties": False})
            )
        ),
    ),
    max_leaves=5,
)


def decoded(engine: Engine) -> dict[int, list[Event]]:
    events: dict[int, list[Event]] = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    return events


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


@settings(max_examples=15, deadline=None)
@given(SCHEMAS, st.integers(0, 2**30), st.sampled_from([0.0, 1.0, 2.0]))
def test_what_ends_by_itself_is_valid(
    model: Model, grammars: Grammars, schema: dict[str, Any], seed: int, temperature: float
) -> None:
    """With rows beside it that aren't held to anything, and get what they get without it."""
    root = {**schema, "$defs": {"own": {"type": "integer", "minimum": 0, "maximum": 9}}}
    stops = frozenset(model.renderer.stop_ids)
    try:
        grammar = grammars.of(root, stops)
    except InputError:  # branches of a oneOf that may overlap
        assume("oneOf" not in str(schema))
        raise
    sampling = Sampling(max_new_tokens=200, temperature=temperature, top_p=0.9, seed=seed)
    plain, engine = Sampling(max_new_tokens=12, temperature=1.0, seed=seed), Engine(model.base.model)
    held = [engine.add(PROMPT, sampling, stops, number=n, guide=grammar.begin()) for n in range(2)]
    beside = engine.add(PROMPT, plain, stops, number=0)
    events = decoded(engine)
    alone = Engine(model.base.model)
    alone.add(PROMPT, plain, stops, number=0)
    assert tokens(events[beside]) == tokens(decoded(alone)[0])
    for id in held:
        ids = tokens(events[id])
        if len(ids) < 200:
            text = model.renderer.decode(ids)
            assert valid(json.loads(text), root, root), (root, text)


NAMED = {"type": "object", "properties": {"<|im_end|>": {"type": "null"}}, "required": ["<|im_end|>"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "a<|im_end|>b"},
        {"enum": ["<|endoftext|>b", "<|endoftext|>c"]},
        {**NAMED, "additionalProperties": False},
    ],
    ids=str,
)
def test_control_tokens_that_a_schema_names_are_texts(model: Model, grammars: Grammars, schema: dict[str, Any]) -> None:
    stops, engine = frozenset(model.renderer.stop_ids), Engine(model.base.model)
    grammar = grammars.of(schema, stops)
    for n in range(4):
        engine.add(PROMPT, Sampling(max_new_tokens=90, temperature=1.0, seed=n), stops, guide=grammar.begin())
    for events in decoded(engine).values():
        ids = tokens(events)
        assert not set(ids) & set(model.renderer.tokenizer.all_special_ids)
        assert valid(json.loads(model.renderer.decode(ids)), schema, schema)


BRANCHES = {
    "type": [{"type": "string", "maxLength": 2}, {"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}],
    "kind": [
        {"type": "object", "properties": {"kind": {"const": kind}, "n": {"enum": [1, 2]}}, "required": ["kind"],
         "additionalProperties": False}
        for kind in ("a", "b")
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BRANCHES)
def test_one_of_branches_that_no_two_values_share(model: Model, grammars: Grammars, name: str) -> None:
    schema = {"oneOf": BRANCHES[name]}
    stops, engine = frozenset(model.renderer.stop_ids), Engine(model.base.model)
    grammar = grammars.of(schema, stops)
    for n in range(8):
        sampling = Sampling(max_new_tokens=150, temperature=1.0, seed=1)
        engine.add(PROMPT, sampling, stops, number=n, guide=grammar.begin())
    answers = [model.renderer.decode(tokens(events)) for events in decoded(engine).values()]
    assert all(valid(json.loads(text), schema, schema) for text in answers) and len({*answers}) > 1
    with pytest.raises(InputError, match="oneOf"):
        grammars.of({"oneOf": [*BRANCHES[name], BRANCHES[name][0]]}, stops)


def test_most_answers_do_end(model: Model, grammars: Grammars) -> None:
    """Whatever the model would rather say: a random one never writes JSON."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "ages": {"type": "array", "maxItems": 2,
                       "items": {"type": "integer", "minimum": 0, "maximum": 120}}},
        "required": ["name", "ages"],
        "additionalProperties": False,
    }  # fmt: skip
    stops, engine = frozenset(model.renderer.stop_ids), Engine(model.base.model)
    grammar = grammars.of(schema, stops)
    for n in range(16):
        engine.add(
            PROMPT, Sampling(max_new_tokens=150, temperature=1.0, seed=1), stops, number=n, guide=grammar.begin()
        )
    answers = [model.renderer.decode(tokens(events)) for events in decoded(engine).values()]
    ended = [text for text in answers if text.endswith("}")]
    assert len(ended) >= 14 and all(valid(json.loads(text), schema, schema) for text in ended)
    assert len(set(answers)) > 8  # each its own way


def test_logprobs_are_the_models_own_and_a_bias_counts_among_what_is_allowed(model: Model, grammars: Grammars) -> None:
    stops = frozenset(model.renderer.stop_ids)
    grammar = grammars.of({"enum": ["aaa", "bbb"]}, stops)
    engine = Engine(model.base.model)
    (b,) = model.renderer.tokenizer("b", add_special_tokens=False)["input_ids"]
    engine.add(PROMPT, Sampling(max_new_tokens=9), stops, logprobs=0, guide=grammar.begin())
    engine.add(PROMPT, Sampling(max_new_tokens=9), stops, bias={b: 100.0}, guide=grammar.begin())
    events = decoded(engine)
    assert model.renderer.decode(tokens(events[1])) == '"bbb"'
    ids = tokens(events[0])
    with torch.inference_mode():
        logp = model.base.model(torch.tensor([[*PROMPT, *ids]])).logits[0].float().log_softmax(-1)
    for place, (token, event) in enumerate(zip(ids, events[0], strict=False)):
        assert event.logprobs is not None
        assert event.logprobs.token == pytest.approx(float(logp[len(PROMPT) - 1 + place, token]), abs=1e-4)


def test_a_row_whose_guide_fails_is_named_and_the_others_go_on(
    model: Model, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Guide):
        def allowed(self, vocabulary: int) -> torch.Tensor:
            raise RunError("it took too long")

    engine = Engine(model.base.model)
    bad = engine.add(PROMPT, Sampling(max_new_tokens=5), guide=Failing(None))
    good = engine.add(PROMPT, Sampling(max_new_tokens=5))
    with pytest.raises(RowsFailed) as failed:
        engine.step()
    assert failed.value.rows == (bad,)
    engine.cancel(bad)
    assert len(tokens(decoded(engine)[good])) == 5
