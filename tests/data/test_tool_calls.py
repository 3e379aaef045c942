"""Calls of tools: what a template writes is read back, however it comes in pieces, and all else is text."""

import copy
import json
import re
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.document import checked_messages
from deltaw.data.render import Renderer
from deltaw.data.tool_calls import CallForm, CallSplitter, ToolCall
from tests.data.calling import TEMPLATES, called, renderer, tool
from tests.data.toys import TEMPLATED, toy

NAMES = ("get", "get_all", "the weather", 'a "quoted" <b>')
USER = {"role": "user", "content": 'Call <tool_call> {"name": "get"} now'}
texts = st.text('ab"\\{}[]<>|\n é😀', max_size=12)
values = st.recursive(
    st.one_of(texts, st.integers(), st.booleans(), st.none(), st.sampled_from(["</tool_call>", "<tool_call>", "]"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
arguments = st.dictionaries(texts, values, max_size=3)
calls = st.lists(st.tuples(st.sampled_from(NAMES[:3]), arguments), min_size=1, max_size=3)


def form(name: str) -> CallForm:
    found = renderer(name).chats.call_form
    assert found is not None
    return found


def split(
    form: CallForm, text: str, places: Any = (), names: Any = NAMES, most: int = 128
) -> tuple[str, list[ToolCall]]:
    """An answer's text and its calls, where it comes in pieces."""
    splitter = CallSplitter(form, names, most)
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    parts = [part for a, b in pairwise(ends) for part in splitter.push(text[a:b])] + splitter.end()
    found = [part for part in parts if isinstance(part, ToolCall)]
    assert splitter.count == len(found) and "" not in parts
    return "".join(part for part in parts if isinstance(part, str)), found


def written(name: str, *made: tuple[str, Any], content: str = "") -> str:
    """What the model would have to write for this answer, as the text that a server decodes of it."""
    render = renderer(name)
    messages = checked_messages([USER, called(*made, content=content)])
    template, guard = render.chats._template, render.chats._guarded
    with_it = template.render(guard(messages), [], generation_prompt=False).replace("\ufdd0", "")
    prompt = template.render(guard(messages[:1]), [], generation_prompt=True).replace("\ufdd0", "")
    assert with_it.startswith(prompt.rstrip("\n"))
    ids = render.tokenizer(with_it[len(prompt.rstrip("\n")) :], add_special_tokens=False)["input_ids"]
    return render.decode(ids, shown=frozenset(form(name).tokens.values())).removesuffix("\n")


@pytest.mark.parametrize(
    ("name", "before", "between", "after"),
    [
        ("qwen", "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        ("hermes", "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        ("llama", "", None, ""),
        ("mistral", "<|endoftext|>[", ", ", "]"),
        ("deepseek", "<calls><call>function<sep>", "\n```</call>\n<call>function<sep>", "\n```</call></calls>"),
        ("named", "<|endoftext|>", "<|endoftext|>", ""),
    ],
)
def test_the_form_is_found(name: str, before: str, between: str | None, after: str) -> None:
    found = form(name)
    assert (found.before.lstrip("\n"), found.between, found.after) == (before, between, after)
    assert ("<|endoftext|>" in found.tokens) == ("<|endoftext|>" in before)
    assert found.preamble == ("<think>\n\n</think>\n\n" if name == "qwen" else "")


@pytest.mark.parametrize(
    ("file", "before", "middle", "tokens"),
    [
        ("qwen2_5", "<tool_call>\n", '", "arguments": ', 0),
        ("qwen3", "<tool_call>\n", '", "arguments": ', 0),
        ("qwen3_vl", "<tool_call>\n", '", "arguments": ', 0),
        ("llama3_1", "", '", "parameters": ', 0),
        ("llama3_2", "", '", "parameters": ', 0),
        ("deepseekv3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", 5),
        ("gptoss", " to=functions.", "<|channel|>commentary json<|message|>", 2),
        ("qwen3_5_think", None, "", 0),  # arguments in tags
        ("lfm2_2_5", None, "", 0),  # as Python
        ("gemma4", None, "", 0),
        ("phi3", None, "", 0),
    ],
)
def test_the_form_of_models_own_templates(file: str, before: str | None, middle: str, tokens: int) -> None:
    """Templates as models were published with them, which TRL brings along; their control tokens by their look."""
    found = find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else Path()
    if not (folder / f"{file}.jinja").is_file():
        pytest.skip("TRL isn't there, or has no such template")
    tokenizer = copy.deepcopy(toy("bos"))
    tokenizer.chat_template = (folder / f"{file}.jinja").read_text(encoding="utf-8")
    special = sorted({*re.findall(r"<[|｜][^<>{}\n|｜]+[|｜]>", tokenizer.chat_template)})
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    chats = Renderer(tokenizer).chats
    assert chats is not None
    form = chats.call_form
    assert (form is None) == (before is None)
    if form is not None:
        assert (form.before, form.middle, len(form.tokens)) == (before, middle, tokens)


@pytest.mark.parametrize("kind", TEMPLATED)
def test_a_template_that_writes_no_calls_has_no_form(kind: str) -> None:
    chats = Renderer(toy(kind)).chats
    assert chats is not None and chats.call_form is None and not chats.takes_tools


@pytest.mark.parametrize("name", TEMPLATES)
@given(calls=calls, places=st.lists(st.integers(0, 300), max_size=20))
def test_what_a_template_writes_is_read_back(name: str, calls: list[tuple[str, Any]], places: list[int]) -> None:
    made = calls[:1] if form(name).between is None else calls
    text, found = split(form(name), written(name, *made), places)
    assert text.strip() == form(name).preamble.strip()
    assert [(call.name, json.loads(call.arguments)) for call in found] == made


@pytest.mark.parametrize("name", TEMPLATES)
@given(data=st.data())
def test_however_it_comes_the_same_comes_of_it(name: str, data: st.DataObject) -> None:
    """Of what models write of all kinds: calls, halves of them, other functions, text."""
    own = form(name)
    whole = [written(name, ("get", {"a": 1}), *([] if own.between is None else [("other", {"b": "}"})]))]
    bits = [
        own.before,
        own.between or "",
        own.after,
        own.head,
        own.middle,
        own.foot,
        "get",
        "other",
        "{",
        "}",
        "[",
        '"',
    ]
    bits += ['{"name": "get", "arguments": {}}', "{}", " ", "\n", "a", "<", "\\", ",", "</tool_call>", "\0"]
    pieces = data.draw(st.lists(st.sampled_from([*bits, *whole]), max_size=10))
    text = "".join(pieces)
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    at_once = split(own, text)
    assert split(own, text, places) == at_once == split(own, text, range(len(text)))
    if not at_once[1]:
        assert at_once[0] == text  # nothing is lost


def test_text_before_between_and_behind_calls_is_kept() -> None:
    call = '<tool_call>{"arguments":{"a":[1,2]},"name":"get"}</tool_call>'
    found = ToolCall("get", '{"a": [1, 2]}')
    assert split(form("qwen"), f"I look.\n{call}\n{call}") == ("I look.", [found, found])
    assert split(form("qwen"), f"{call}\n\n so \n{call} there <tool_call>") == (
        "\n\n so there <tool_call>",
        [found] * 2,
    )
    assert split(form("qwen"), call.removesuffix("</tool_call>")) == ("", [found])
    bare = '{"name": "get", "parameters": {"a": [1, 2]}}'
    assert split(form("llama"), f" {bare}") == ("", [found])
    assert split(form("llama"), f"{bare}\n{bare}") == ("", [found, found])
    assert split(form("llama"), f"It is {bare}") == (f"It is {bare}", [])
    listed = '<|endoftext|> [{"name": "get", "arguments": {"a": [1,2]}}]'
    assert split(form("mistral"), f"Well.{listed}") == ("Well.", [found])
    assert split(form("mistral"), 'so [ {"name"') == ('so [ {"name"', [])


@pytest.mark.parametrize(
    "inner",
    [
        '{"name": "none of these", "arguments": {}}',
        '{"name": "get"}',
        '{"name": ["get"], "arguments": {}}',
        '{"name": "get", "arguments": [1]}',
        '{"name": "get", "arguments": "{}"}',
        '{"name": "get", "name": "get", "arguments": {}}',
        '{"name": "get", "arguments": {"a": NaN}}',
        '{"name": "get", "arguments": {"a": 1e999}}',
        '{"name": "get", "arguments": {"a": "\\ud800"}}',
        '{"name": "get", "arguments": {"a": ' + "9" * 5000 + "}}",
        '{"name": "get", "arguments": ' + '{"a":' * 3000 + "1" + "}" * 3000 + "}",
        '{"name": "get", "arguments": {"a": 1}',
        '{"name": "get", "arguments": {a: 1}}',
        "get",
        "",
    ],
    ids=lambda inner: inner[:60],
)
def test_what_is_no_call_stays_text(inner: str) -> None:
    text = f"So: <tool_call>\n{inner}\n</tool_call>"
    assert split(form("qwen"), text) == (text, [])
    assert split(form("llama"), inner) == (inner, [])


def test_the_last_call_that_there_may_be_ends_the_answer() -> None:
    text = "So." + written("qwen", ("get", {}), ("get_all", {})).partition("</think>")[2].strip()
    for places in ([], range(len(text))):
        assert split(form("qwen"), text + "And?", places, most=1) == ("So.", [ToolCall("get", "{}")])
        assert split(form("qwen"), text + "And?", places)[0] == "So.And?"


@pytest.mark.parametrize(
    "bit", ['<tool_call>{"', "<tool_call>{", "<", " ", "<tool_call>{} ", '<tool_call>{"name": "get", "arguments": {}}']
)
def test_no_answer_takes_long(bit: str) -> None:
    began = time.process_time()
    text = bit * (100_000 // len(bit))
    split(form("qwen"), text, range(0, len(text), 4))
    assert time.process_time() - began < 3


def test_ids_and_results_of_calls_go_into_the_template() -> None:
    messages = [
        USER,
        called(("get", '{"a": "é"}')),  # OpenAI's form
        {"role": "tool", "tool_call_id": "abcdefg00", "content": [{"type": "text", "text": "<tool_call>4"}]},
    ]
    for name in ("qwen", "hermes"):
        ids = renderer(name).prompt_ids(checked_messages(messages), [tool("get", a={"type": "string"})])
        text = renderer(name).decode(ids, skip_special=False)
        assert (
            '{"name": "get", "arguments": {"a": "é"}}' in text and "<tool_response><tool_call>4</tool_response>" in text
        )
