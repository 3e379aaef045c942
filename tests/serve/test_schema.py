"""`response_format`: the real client gets values of its own types, and a hostile schema is refused by name, soon."""

import json
import sys
import time
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.serve.serving import KEY, Running

pytest.importorskip("llguidance", reason="pip install 'deltaw[serve]'")
CHAT, HELLO = "/v1/chat/completions", [{"role": "user", "content": "Who is it? Answer in JSON."}]
SOON = 5.0


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{running.address}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=9)


class Person(BaseModel):
    colour: Colour
    tall: bool
    pet: Pet | None
    codes: list[int] = Field(max_length=0)


def held(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


ENUM = held({"enum": ["one", "two", "three"]})


@pytest.mark.parametrize("model", ["one", "two"])
def test_the_clients_own_types_come_back(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=HELLO, response_format=Person, temperature=1.0, seed=3, n=3, max_tokens=220
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Person)
        assert choice.message.parsed.codes == [] and choice.message.refusal is None
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_streams_seeds_stops_and_logprobs_are_as_without(client: OpenAI) -> None:
    how = {"model": "one", "messages": HELLO, "response_format": ENUM, "temperature": 1.0, "seed": 5, "n": 3}
    whole = client.chat.completions.create(**how, logprobs=True, top_logprobs=2)
    again = client.chat.completions.create(**how)
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**how, stream=True)]
    for choice, other in zip(whole.choices, again.choices, strict=True):
        assert json.loads(choice.message.content) in ("one", "two", "three")
        assert choice.message.content == other.message.content and choice.finish_reason == "stop"
        streamed = "".join(part.delta.content or "" for part in parts if part.index == choice.index)
        assert streamed == choice.message.content
        told = choice.logprobs.content
        assert "".join(token.token for token in told) == choice.message.content
        assert min(token.logprob for token in told) < -2  # the model's own, which would have said something else
    cut = client.chat.completions.create(**{**how, "n": 1, "temperature": 0}, stop=["e", "o"])
    assert cut.choices[0].message.content in ('"', '"tw', '"thr')
    short = client.chat.completions.create(**{**how, "n": 1}, max_tokens=1)
    assert short.choices[0].finish_reason == "length"


def test_json_object_is_an_object_and_text_is_text(client: OpenAI) -> None:
    how = {"model": "one", "messages": HELLO, "temperature": 0, "max_tokens": 30}
    begun = client.chat.completions.create(**how, response_format={"type": "json_object"})
    assert begun.choices[0].message.content.startswith("{")
    plain = client.chat.completions.create(**how)
    assert client.chat.completions.create(**how, response_format={"type": "text"}).choices == plain.choices


def test_others_beside_it_get_what_they_get(running: Running) -> None:
    plain = {"model": "two", "messages": HELLO, "temperature": 0, "max_tokens": 12}
    before = running.post(CHAT, **plain)[1]["choices"]
    running.post(CHAT, model="two", messages=HELLO, response_format=ENUM, temperature=0)
    assert running.post(CHAT, **plain)[1]["choices"] == before


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_schema"},
        {"type": "json"},
        {},
        {"type": []},
        {"type": "json_object", "schema": {}},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": True}},
        {"type": "json_schema", "json_schema": {"schema": {}, "strictly": 1}},
        held({"type": "string", "pattern": "(a+)+$"}),
        held({"type": "object", "patternProperties": {"a": {}}}),
        held({"type": "integer", "multipleOf": 62_615_533}),
        held({"not": {}}),
        held({"x-guidance": {"lenient": True}, "not": {}}),
        held({"$ref": "http://example.org/x"}),
        held({"$ref": "file:///etc/passwd"}),
        held({"$ref": "#/$defs/none"}),
        held({"$ref": "#"}),
        held({"type": "thing"}),
        held({"enum": []}),
        held({"enum": 3}),
        held({"type": "integer", "minimum": 5, "maximum": 3}),
        held({"properties": 3}),
        held({"anyOf": {}}),
        held({"items": 3}),
        held({"type": "string", "maxLength": 10**9}),
        held({"type": "string", "maxLength": -1}),
        held({"type": "string", "maxLength": True}),
        held({"type": "string", "format": "nonsense"}),
        held({"type": "array", "uniqueItems": True}),
        held({"properties": {str(i): {} for i in range(101)}}),
        held({"enum": list(range(1001))}),
        held({"const": "x" * 1001}),
        held({"anyOf": [{"type": "integer"}] * 2001}),
        held({"allOf": [{"anyOf": [{"properties": {f"{i}.{j}": {}}, "required": [f"{i}.{j}"]} for j in range(3)]}
                        for i in range(9)]}),
    ],
    ids=lambda given: json.dumps(given)[:60],
)  # fmt: skip
def test_what_can_not_be_kept_is_refused_by_name(running: Running, given: Any) -> None:
    began = time.monotonic()
    status, answer = running.post(CHAT, model="one", messages=HELLO, response_format=given, max_tokens=4)
    assert status == 400 and len(answer["error"]["message"]) < 600, answer
    assert time.monotonic() - began < SOON
    assert running.post("/v1/completions", model="one", prompt="a", max_tokens=1, response_format=ENUM)[0] == 400


KEYWORDS = [
    *(
        "type",
        "properties",
        "required",
        "items",
        "anyOf",
        "allOf",
        "oneOf",
        "enum",
        "const",
        "format",
        "minimum",
        "not",
    ),
    *("additionalProperties", "$ref", "$defs", "prefixItems", "maximum", "minLength", "maxLength", "minItems"),
    *("maxItems", "multipleOf", "pattern"),
]
VALUES = st.recursive(
    st.one_of(
        st.sampled_from(
            ["string", "object", "array", "integer", "number", "date-time", "uri", "#/$defs/a", "#", "(a+)+$"]
        ),
        st.sampled_from([0, 1, -1, 1000, 10_000, 1e300, 0.001, True, False, None, 2**70]),
        st.text(max_size=3),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=5),
        st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    ),
    max_leaves=25,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYWORDS), VALUES, max_size=6))
def test_no_schema_takes_long_or_does_harm(running: Running, schema: dict[str, Any]) -> None:
    began = time.monotonic()
    body = {"model": "one", "messages": HELLO, "response_format": held(schema), "max_tokens": 20, "seed": 1}
    status, answer = running.post(CHAT, **body)
    assert status in (200, 400) or "schema" in answer["error"]["message"], answer
    assert time.monotonic() - began < SOON and not running.said
    if status == 200 and answer["choices"][0]["finish_reason"] == "stop":
        json.loads(answer["choices"][0]["message"]["content"])


def test_without_the_library_it_says_what_to_install(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    status, answer = running.post(CHAT, model="one", messages=HELLO, response_format=ENUM)
    assert status == 400 and "pip install" in answer["error"]["message"]
    assert running.post(CHAT, model="one", messages=HELLO, max_tokens=1)[0] == 200


def test_a_refusal_is_the_clients_error(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="one", messages=HELLO, response_format=held({"not": {}}))
    assert refused.value.param == "response_format" and "not" in refused.value.message
