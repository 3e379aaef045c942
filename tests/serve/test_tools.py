"""Calls of tools by the real `openai` client: answers that must be calls, answers that happen to have some, and what is
refused by name. Each adapter here has the chat template of another family of models."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from deltaw.generate.grammar import Grammars, _parts, _written
from tests.data.calling import TEMPLATES, called, renderer, tool
from tests.data.toys import toy
from tests.serve.canaries import Canaries
from tests.serve.serving import KEY, Running, serving
from tests.tiny import tiny_base

pytest.importorskip("llguidance", reason="pip install 'deltaw[serve]'")
CHAT, HELLO = "/v1/chat/completions", [{"role": "user", "content": "Is it warm in Rome?"}]
CITY = {"enum": ["Rome", "Paris"]}
TOOLS = [tool("weather", city=CITY, days={"type": "integer", "minimum": 0, "maximum": 9}), tool("wait")]
FAMILIES = [name for name, (_, kind) in TEMPLATES.items() if kind == "chatml"]
REQUIRED = {"tools": TOOLS, "tool_choice": "required"}
WEATHER = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    canaries = Canaries(tmp_path_factory.mktemp("calling"))
    canaries.base = tiny_base(canaries.folder / "base", max_position_embeddings=2048)
    folder = canaries.folder / "adapters"
    for seed, name in enumerate(FAMILIES):
        canaries.save(folder / name, seed)
        (folder / name / "chat_template.jinja").write_text(TEMPLATES[name][0])
    canaries.save(folder / "bare", 1)
    bare = TEMPLATES["qwen"][0].replace("<tool_call>\n", "").replace("\n</tool_call>", "")
    (folder / "bare/chat_template.jinja").write_text(bare)
    canaries.save(folder / "tools-only", 2)
    (folder / "tools-only/chat_template.jinja").write_text(
        "{{ tools | tojson if tools }}" + toy("chatml").chat_template
    )
    with serving(canaries.base, folder) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{running.address}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def saying(running: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the model answer with a text, the control tokens in it as such."""
    tokenizer = running.model.renderer.tokenizer
    submit, grammars = running.worker.submit, Grammars(tokenizer)

    def say(text: str) -> None:
        source = "start: " + _written(_parts(text, {"<|endoftext|>": tokenizer.convert_tokens_to_ids("<|endoftext|>")}))
        grammar = grammars._kept(frozenset(running.model.renderer.stop_ids), source)
        monkeypatch.setattr(running.worker, "submit", lambda ask: submit(replace(ask, grammar=grammar)))

    return say


def valid(call: Any) -> bool:
    given = json.loads(call.function.arguments)
    if call.function.name == "wait":
        return given == {}
    return call.function.name == "weather" and given["city"] in CITY["enum"] and 0 <= given["days"] <= 9


@pytest.mark.parametrize("model", [*FAMILIES, "bare"])
def test_an_answer_that_must_be_calls_is_calls(client: OpenAI, model: str) -> None:
    how = {"model": model, "messages": HELLO, **REQUIRED, "temperature": 1.0, "seed": 7, "n": 2, "max_tokens": 900}
    answer = client.chat.completions.create(**how)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.tool_calls, choice
        assert all(map(valid, choice.message.tool_calls)) and (choice.message.content or "<think>").startswith(
            "<think>"
        )
        ids = [call.id for call in choice.message.tool_calls]
        assert len({*ids}) == len(ids) and all(len(id) == 9 and id.isalnum() for id in ids)
    how["n"] = 1
    one = client.chat.completions.create(**how, parallel_tool_calls=False)
    assert all(len(choice.message.tool_calls) == 1 and valid(choice.message.tool_calls[0]) for choice in one.choices)
    named = client.chat.completions.create(**{**how, "tool_choice": WEATHER})
    for choice in named.choices:
        (call,) = choice.message.tool_calls
        assert valid(call) and call.function.name == "weather" and choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("model", FAMILIES)
def test_a_stream_comes_to_the_same(client: OpenAI, model: str) -> None:
    how = {"model": model, "messages": HELLO, **REQUIRED, "temperature": 1.0, "seed": 3, "max_tokens": 900}
    (whole,) = client.chat.completions.create(**how).choices
    with client.chat.completions.stream(**how) as stream:  # openai's own way of putting a stream together
        events = list(stream)
        (streamed,) = stream.get_final_completion().choices
    made = [
        [(call.function.name, call.function.arguments) for call in each.message.tool_calls]
        for each in (whole, streamed)
    ]
    assert made[0] == made[1] and streamed.finish_reason == whole.finish_reason == "tool_calls"
    assert (streamed.message.content or None) == whole.message.content
    assert sum(event.type == "tool_calls.function.arguments.done" for event in events) == len(made[0])


SAID = {
    "qwen": 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
    '\n<tool_call>{"arguments":{},"name":"wait"}</tool_call>',
    "mistral": 'I look.<|endoftext|>[{"name": "weather", "arguments": {"city": "Rome", "days": 3}}, '
    '{"name": "wait", "arguments": {}}]',
    "deepseek": 'I look.\n<calls><call>function<sep>weather\n```json\n{"city": "Rome", "days": 3}\n```</call>\n'
    "<call>function<sep>wait\n```json\n{}\n```</call></calls>",
}


@pytest.mark.parametrize("model", SAID)
def test_calls_in_a_free_answer_are_found(client: OpenAI, saying: Callable[[str], None], model: str) -> None:
    saying(SAID[model])
    how = {"model": model, "messages": HELLO, "tools": TOOLS, "n": 2, "logprobs": True}
    answer = client.chat.completions.create(**how)
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**how, stream=True)]
    assert answer.usage.prompt_tokens == len(renderer(model).prompt_ids(HELLO, TOOLS))
    expected = [("weather", {"city": "Rome", "days": 3}), ("wait", {})]
    for choice in answer.choices:
        made = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
        assert (choice.message.content, made, choice.finish_reason) == ("I look.", expected, "tool_calls")
        own = [part for part in parts if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in own) == "I look."
        calls = [call for part in own for call in part.delta.tool_calls or ()]
        assert [call.index for call in calls] == [0, 1] and all(call.id and call.type == "function" for call in calls)
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == expected
        assert own[-1].finish_reason == "tool_calls"
        told = [token.token for part in own if part.logprobs for token in part.logprobs.content]
        assert told == [token.token for token in choice.logprobs.content] and len(told) > 60
    shown = answer.choices[0].message.model_dump(exclude_none=True)
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "4"} for call in shown["tool_calls"]]
    saying("It is 4.")
    last = client.chat.completions.create(model=model, messages=[*HELLO, shown, *results], tools=TOOLS)
    message = last.choices[0].message
    assert (message.content, message.tool_calls, last.choices[0].finish_reason) == ("It is 4.", None, "stop")


def test_openais_own_types_come_back(client: OpenAI, saying: Callable[[str], None]) -> None:
    class Weather(BaseModel):
        city: Literal["Rome", "Paris"]
        days: int

    saying(SAID["qwen"].partition("</tool_call>")[0])
    own = openai.pydantic_function_tool(Weather, name="weather")
    answer = client.chat.completions.parse(model="qwen", messages=HELLO, tools=[own])
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Weather(city="Rome", days=3)


def test_what_is_no_call_of_a_tool_that_was_sent_stays_text(client: OpenAI, saying: Callable[[str], None]) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    for text, more in (
        (call.replace("weather", "rain"), {"tools": TOOLS}),
        (call[:-15] + ",", {"tools": TOOLS}),
        (call, {"tools": TOOLS, "tool_choice": "none"}),
        (call, {}),
        (call, {"tools": TOOLS, "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
    ):
        saying(text)
        (choice,) = client.chat.completions.create(model="qwen", messages=HELLO, **more).choices
        assert (choice.message.content, choice.message.tool_calls) == (text, None)
        assert choice.finish_reason == "stop"
    saying(call.replace("weather", "rain"))
    parts = client.chat.completions.create(model="qwen", messages=HELLO, tools=TOOLS, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == call.replace("weather", "rain")
    saying(call)
    (cut,) = client.chat.completions.create(model="qwen", messages=HELLO, tools=TOOLS, max_tokens=9).choices
    assert cut.finish_reason == "length" and call.startswith(cut.message.content) and cut.message.tool_calls is None
    two = f"{call}\n{call}"
    saying(two)
    how = {"model": "qwen", "messages": HELLO, "tools": TOOLS, "parallel_tool_calls": False}
    (one,) = client.chat.completions.create(**how).choices
    assert (len(one.message.tool_calls), one.message.content, one.finish_reason) == (1, None, "tool_calls")
    (ended,) = client.chat.completions.create(**how, max_tokens=len(call) + 8).choices
    assert (len(ended.message.tool_calls), ended.finish_reason) == (1, "tool_calls")
    (stopped,) = client.chat.completions.create(model="qwen", messages=HELLO, tools=TOOLS, stop="</tool_call>").choices
    assert len(stopped.message.tool_calls) == 1 and stopped.message.content is None


def test_a_call_in_a_question_is_no_call(client: OpenAI, saying: Callable[[str], None]) -> None:
    asked = [{"role": "user", "content": SAID["mistral"] + SAID["qwen"] + "<|im_end|>"}]
    for model in FAMILIES:
        saying("No.")
        (choice,) = client.chat.completions.create(model=model, messages=asked, tools=TOOLS).choices
        assert (choice.message.content, choice.message.tool_calls) == ("No.", None)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": "required", "tools": []}),
        ("tool_choice", {"tool_choice": "weather", "tools": TOOLS}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "rain"}}, "tools": TOOLS}),
        ("tool_choice", {"tool_choice": {"type": "function", "name": "weather"}, "tools": TOOLS}),
        ("tool_choice", {"tool_choice": {}, "tools": TOOLS}),
        ("tool_choice", {"tool_choice": {**WEATHER, "also": 1}, "tools": TOOLS}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": ["weather"]}}, "tools": TOOLS}),
        ("tool_choice", {**REQUIRED, "model": "tools-only"}),
        ("tools", {"tools": TOOLS, "model": "base"}),
        ("tools", {"tools": TOOLS * 65}),
        ("tools", {**REQUIRED, "tools": TOOLS * 2}),
        ("tools", {**REQUIRED, "tools": [{"name": "weather"}]}),
        ("tools", {**REQUIRED, "tools": [{"type": "function", "function": {"name": ""}}]}),
        ("tools", {**REQUIRED, "tools": [{"type": "function", "function": {"name": "a\0"}}]}),
        ("tools", {**REQUIRED, "tools": [{"type": "function", "function": {"name": "a" * 200}}]}),
        ("tools", {**REQUIRED, "tools": [{**WEATHER, "function": {"name": "a", "parameters": []}}]}),
        ("tools", {**REQUIRED, "tools": [{**WEATHER, "function": {"name": "a", "parameters": {"type": "array"}}}]}),
        ("tools", {**REQUIRED, "tools": [tool("a"), tool("b", x={"not": {}})]}),
        ("tools", {**REQUIRED, "tools": [tool("b", x={"type": "string", "pattern": "(a+)+$"})]}),
        ("tools", {**REQUIRED, "tools": [tool(f"f{i}", **{f"p{j}": {} for j in range(50)}) for i in range(50)]}),
        ("messages", {"model": "base", "messages": [*HELLO, called(("wait", {}))]}),
        ("response_format", {**REQUIRED, "response_format": {"type": "json_object"}}),
    ],
    ids=lambda given: given if isinstance(given, str) else json.dumps(given)[:70],
)  # fmt: skip
def test_what_can_not_be_done_is_refused_by_name(running: Running, field: str, body: dict[str, Any]) -> None:
    sent = {"model": "qwen", "messages": HELLO, "max_tokens": 4, **body}
    if sent["model"] == "base":
        sent["model"] = running.model.base.source.public_name
    status, answer = running.post(CHAT, **sent)
    assert status == 400 and answer["error"]["param"] == field and len(answer["error"]["message"]) < 300, answer
    if "not" in json.dumps(body.get("tools")):
        assert "tools[1].function.parameters.properties.x" in answer["error"]["message"]


@pytest.mark.parametrize("name", ["ünïcode", 'a"b', "a\\b", "<|im_end|>", "get weather", "%json {}", '" | "x'])
def test_a_function_may_have_any_name(client: OpenAI, name: str) -> None:
    for model in ("qwen", "deepseek"):
        how = {"model": model, "messages": HELLO, "tools": [tool(name), tool("x")], "max_tokens": 400, "seed": 1}
        chosen = {"type": "function", "function": {"name": name}}
        (choice,) = client.chat.completions.create(**how, tool_choice=chosen).choices
        assert choice.message.tool_calls, choice
        assert [call.function.name for call in choice.message.tool_calls] == [name]


def test_schemas_of_functions_keep_their_references(client: OpenAI) -> None:
    class City(BaseModel):
        name: Literal["Rome", "Paris"]
        twin: "City | None"

    own = {"type": "function", "function": {"name": "city", "parameters": City.model_json_schema()}}
    how = {"model": "qwen", "messages": HELLO, "tools": [own], "tool_choice": "required", "max_tokens": 1200}
    (choice,) = client.chat.completions.create(**how, seed=2, temperature=0.5).choices
    for call in choice.message.tool_calls:
        City.model_validate_json(call.function.arguments)
