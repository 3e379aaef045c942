"""What a template doesn't write of a row: refused where the training would be wrong, counted otherwise."""

import copy
import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import CHATML, toy

from deltaw.config import DataConfig
from deltaw.data.document import Chat
from deltaw.data.forms import detect_form
from deltaw.data.left_out import Survey
from deltaw.data.prepare import prepare
from deltaw.data.render import Renderer
from deltaw.data.row import Row
from deltaw.errors import InputError, Rejected
from deltaw.files.template import Asked, Template

TOOL = {"type": "function", "function": {"name": "depth", "description": "How deep", "parameters": {"x": 1}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "depth", "arguments": {"dock": 3}}}


def user(text="q", **fields):
    return {"role": "user", "content": text, **fields}


def answer(text="a", **fields):
    return {"role": "assistant", "content": text, **fields}


def chatml(inside):
    """ChatML with `inside` in place of a message's content."""
    return CHATML.replace("message.content", f"({inside})")


def render(source, *messages, tools=()):
    tokenizer = copy.deepcopy(toy("chatml"))
    tokenizer.chat_template = source
    row = Row({"messages": list(messages), "tools": list(tools)}, "o")
    return Renderer(tokenizer).render_all([detect_form([row]).normalise(row)], ["o"])[0]


WITH_CALLS = chatml("message.content + (message.tool_calls | tojson if message.tool_calls else '')")


@pytest.mark.parametrize(
    ("source", "messages", "lost"),
    [
        (CHATML, (user(), answer(tool_calls=[CALL])), "message 2: .* answer's tool_calls;"),
        (CHATML, (user(), answer(None, tool_calls=[CALL])), "message 2: .* answer's tool_calls;"),
        (CHATML, (user(), answer(function_call={"name": "f"})), "message 2: .* answer's function_call;"),
        (CHATML, (user(), answer(tool_calls=[CALL], weight=0), user(), answer()), "message 2: .* answer's tool_calls"),
        (
            chatml("(message.tool_calls | tojson) if message.tool_calls else message.content"),
            (user(), answer("Let me look", tool_calls=[CALL])),
            "message 2: .* answer's content;",
        ),
        (
            chatml("message.content + (message.tool_calls[0].function.name if message.tool_calls else '')"),
            (user(), answer(tool_calls=[CALL])),
            r"answer's tool_calls\[\].function.arguments;",
        ),
        (
            chatml("message.content + (message.tool_calls[0] | tojson if message.tool_calls else '')"),
            (user(), answer(tool_calls=[CALL, CALL])),
            r"answer's tool_calls\[\].function.name;",
        ),
        (
            chatml("message.content if message.role != 'tool' else ''"),
            (user(), answer(), {"role": "tool", "content": "7"}, answer()),
            "message 3: .* tool message's content;",
        ),
        (
            "{% for message in messages if message.role != 'system' %}" + CHATML.split("%}", 1)[1],
            ({"role": "system", "content": "s"}, user(), answer()),
            "message 1: .* system message's content;",
        ),
        (chatml("message.content[0].text | default('')"), (user(), answer()), "message 1: .* user message's content;"),
    ],
)
def test_a_row_is_refused_where_what_is_said_or_called_is_not_written(source, messages, lost):
    rejected = render(source, *messages, tools=[TOOL])
    assert isinstance(rejected, Rejected)
    assert str(rejected).startswith("message ")
    with pytest.raises(Rejected, match=lost):
        raise rejected


@pytest.mark.parametrize(
    ("source", "messages", "left_out"),
    [
        (CHATML, (user(), answer()), ()),
        (CHATML, (user(), answer(reasoning_content="r")), ("messages[].reasoning_content",)),
        (CHATML, (user(name="n"), answer(loss=False)), ("messages[].name", "messages[].loss")),
        (CHATML, (user(seen=3, empty="", none=None, blank=[]), answer()), ("messages[].seen",)),
        (WITH_CALLS, (user(), answer(tool_calls=[CALL])), ()),
        (
            chatml("message.content + (message.tool_calls[0].function | tojson if message.tool_calls else '')"),
            (user(), answer(tool_calls=[CALL])),
            ("messages[].tool_calls[].id",),
        ),
        (chatml("message.content + (message.name or '')"), (user(name="n"), answer()), ()),
        (
            chatml("message.content.split('</think>')[-1]"),
            (user(), answer("<think>x</think>a")),
            ("a part of messages[].content",),
        ),
        (chatml("message.content.split('</think>')[-1]"), (user(), answer("a")), ()),
        (chatml("message.content | upper"), (user(), answer()), ()),
        (chatml("message.content ~ (message.flag or '')"), (user(flag=True), answer()), ()),
    ],
)
def test_what_else_is_not_written_is_named(source, messages, left_out):
    assert render(source, *messages).left_out == left_out


@pytest.mark.parametrize("cut", ["[:9]", " | truncate(12, true)", "[-9:]", ".split('.')[0]"])
def test_an_answer_too_long_for_a_template_is_refused_and_a_short_one_is_not(cut):
    source = chatml(f"(message.content{cut})")
    assert render(source, user(), answer("short")).left_out == ()
    for long in ("one and two. three and four, five", "one. and two three and four, five"):
        rejected = render(source, user(), answer(long))
        assert "message 2: the chat template doesn't write all of the answer's content" in str(rejected)


def test_tools_that_are_not_written_are_named():
    assert render(CHATML, user(), answer(), tools=[TOOL, TOOL]).left_out == ("tools",)
    names = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CHATML
    expected = ("tools[].function.description", "tools[].function.parameters")
    assert render(names, user(), answer(), tools=[TOOL]).left_out == expected
    assert render("{{ tools | tojson }}" + CHATML, user(), answer(), tools=[TOOL]).left_out == ()


PICKY = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.type != 'function' or c.id | length != 6 %}"
    "{{ raise_exception('no such call') }}{% endif %}{% endfor %}{% endfor %}" + WITH_CALLS
)


def test_a_template_that_is_particular_about_values_leaves_nothing_out():
    assert render(PICKY, user(), answer(tool_calls=[CALL]), tools=[TOOL]).left_out == ("tools",)


def test_thoughts_of_earlier_turns_are_shown_in_time():
    source = CHATML.replace(
        "message.content", "(message.content if loop.last else message.content.split('</think>')[-1])"
    )
    example = render(source, user(), answer("<think>x</think>a"), user(), answer("b"))
    assert (example.left_out, example.untrained_turns) == ((), 1)


@given(data=st.data(), known=st.sets(st.sampled_from(["name", "thinking", "note", "score", "flag"])))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_of_any_fields_those_are_named_that_the_template_does_not_write(data, known):
    values = {"name": "n", "thinking": "deep", "note": {"a": ["b"]}, "score": 3, "flag": True}
    writes = " ~ ".join(
        ["message.content", *(f"((message.{name} | tojson) if '{name}' in message else '')" for name in sorted(known))]
    )
    fields = [data.draw(st.sets(st.sampled_from(sorted(values)))) for _ in range(4)]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": "x", **{name: values[name] for name in sorted(names)}}
        for i, names in enumerate(fields)
    ]
    lost = set().union(*fields) - known
    named = render(chatml(writes), *messages).left_out
    assert {name.split(".")[1] for name in named} == lost


def test_a_shape_is_tried_once(monkeypatch):
    written = []
    original = Template.render_rows
    monkeypatch.setattr(Template, "render_rows", lambda self, rows: written.append(len(rows)) or original(self, rows))
    survey = Survey(Template("{{ tools | tojson }}" + WITH_CALLS, {}))
    numbers = itertools.count()

    def row():
        n = next(numbers)
        call = {"function": {"name": f"f{n}", "arguments": {f"k{n}": f"v{n}", f"l{n}": n}}}
        tool = {"function": {"name": f"f{n}", "parameters": {"properties": {f"k{n}": {"type": "string"}}}}}
        return Asked([user(f"q{n}"), answer(f"a{n}", tool_calls=[call])], [tool] * (1 + n % 3), [])

    rows = [row() for _ in range(50)]
    texts = [[message["content"] for message in row.messages] for row in rows]
    assert {loss.fields for loss in survey.of(rows, texts)} == {()}
    assert sum(written) == 1


def test_the_losses_are_counted_and_said(tmp_path):
    rows = [{"messages": [user(), answer(**({"reasoning_content": f"r{i}"} if i % 4 == 0 else {}))]} for i in range(20)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = prepare(DataConfig(train=str(path)), Renderer(toy("chatml"))).report
    assert report.left_out == {"messages[].reasoning_content": 0.25}
    assert report.warnings[-1] == "the chat template leaves out: messages[].reasoning_content (25% of rows)"
    path.write_text("".join(json.dumps({"messages": [user(), answer(tool_calls=[CALL])]}) + "\n" for _ in rows))
    with pytest.raises(InputError, match="20 of 20 rows can't be used") as raised:
        prepare(DataConfig(train=str(path)), Renderer(toy("chatml")))
    assert "data.template" in str(raised.value)


def test_a_template_that_wants_arguments_as_text_gets_text():
    joined = chatml("message.content + (('{' + c.function.name + ': ' + c.function.arguments + '}') if c else '')")
    joined = joined.replace("{{ '<|im_start|>'", "{% set c = (message.tool_calls or [none])[0] %}{{ '<|im_start|>'", 1)
    for inside in (joined, joined.replace(" + c.function.arguments + ", " ~ c.function.arguments ~ ")):
        for arguments in ({"dock": 3}, '{"dock":3}'):
            call = {"function": {"name": "f", "arguments": arguments}}
            example = render(inside, user(), answer(tool_calls=[call]))
            assert '{f: {"dock": 3}}' in Renderer(toy("chatml")).decode(example.tokens)


def test_a_chat_is_a_document_of_plain_values():
    assert Chat((user(),), unused=("id",)) == Chat((user(),))
