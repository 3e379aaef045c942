"""Forms: what is recognised, what it becomes, and that a malformed row is refused with its reason."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.config.data import ColumnName
from deltaw.data.columns import Columns
from deltaw.data.forms import FORMS, LAID_OUT, PAIR_NAMES, Chat, Completion, Text, detect_form
from deltaw.data.preferences import BOTH, LABELS
from deltaw.data.row import Row
from deltaw.errors import InputError, Rejected

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
MUTED = ({**USER, "weight": 0}, ANSWER)


def rows(*values) -> list[Row]:
    return [Row(value, f"t.jsonl:{number}") for number, value in enumerate(values, 1)]


def normalise(value, wanted="auto"):
    (row,) = rows(value)
    return detect_form([row], wanted).normalise(row)


@pytest.mark.parametrize(
    ("value", "document"),
    [
        ({"text": "t"}, Text("t")),
        ({"content": "t", "id": 3}, Text("t")),
        ({"prompt": "p", "completion": "c"}, Completion("p", "c")),
        ({"question": "q", "answer": "a", "text": None}, Chat((USER, ANSWER))),
        ({"instruction": "q", "response": "a"}, Chat((USER, ANSWER))),
        ({"q": "q", "A": "a"}, Chat((USER, ANSWER))),
        ({" Question": "q", "ANSWER ": "a"}, Chat((USER, ANSWER))),
        ({"Prompt": "p", "COMPLETION": "c"}, Completion("p", "c")),
        ({"System Prompt": "s", "input": "q", "output": "a"}, Chat((SYSTEM, USER, ANSWER))),
        ({"messages": [USER, ANSWER], "tools": None}, Chat((USER, ANSWER))),
        ({"messages": [USER, ANSWER], "tools": [{"name": "t"}]}, Chat((USER, ANSWER), ({"name": "t"},))),
        ({"messages": [USER, ANSWER], "tools": '[{"name": "t"}]'}, Chat((USER, ANSWER), ({"name": "t"},))),
        ({"messages": [{**USER, "name": None}, ANSWER]}, Chat((USER, ANSWER))),
        ({"instruction": "q", "input": "", "output": "a"}, Chat((USER, ANSWER))),
        ({"instruction": "q", "output": "a"}, Chat((USER, ANSWER))),
        ({"instruction": "q", "input": "i", "output": "a"}, Chat(({**USER, "content": "q\n\ni"}, ANSWER))),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, Chat((USER, ANSWER))),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]},
            Chat((USER, {**ANSWER, "weight": 0})),
        ),
        (
            {"instruction": "q", "output": "a", "history": [["q", "a"]], "system": "s"},
            Chat((SYSTEM, USER, ANSWER, USER, ANSWER)),
        ),
        ({"instruction": "q", "output": "a", "history": '[["q", "a"]]'}, Chat((USER, ANSWER, USER, ANSWER))),
        ({"instruction": "q", "output": "a", "history": [USER, ANSWER]}, Chat((USER, ANSWER, USER, ANSWER))),
        ({"instruction": "q", "context": "c", "output": "a"}, Chat(({**USER, "content": "q\n\nc"}, ANSWER))),
        ({"query": "q", "response": "a", "history": [["q", "a"]]}, Chat((USER, ANSWER, USER, ANSWER))),
        ({"prompt": "q", "response": "a", "history": []}, Chat((USER, ANSWER))),
        ({"prompt": "q", "completion": "a", "history": []}, Completion("q", "a")),
        ({"prompt": "q", "completion": "a", "history": [["q", "a"]]}, Chat((USER, ANSWER, USER, ANSWER))),
        ({"instruction": "q", "context": "c", "response": "a"}, Chat(({**USER, "content": "q\n\nc"}, ANSWER))),
        ({"instruction": "q", "context": "", "response": "a"}, Chat((USER, ANSWER))),
        ({"instruction": "q", "input": "c", "response": "a"}, Chat(({**USER, "content": "q\n\nc"}, ANSWER))),
        ({"question": "q", "context": "c", "answer": "a"}, Chat(({**USER, "content": "c\n\nq"}, ANSWER))),
        ({"prompt": "q", "completion": "a", "system": "s"}, Completion("s\n\nq", "a")),
        ({"system_prompt": "s", "question": "q", "response": "a"}, Chat((SYSTEM, USER, ANSWER))),
        ({"prompt": [USER], "completion": [ANSWER], "system": "s"}, Chat(({**SYSTEM, "weight": 0}, *MUTED))),
        ({"messages": [USER, ANSWER], "system": "s"}, Chat((SYSTEM, USER, ANSWER))),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            Chat((SYSTEM, USER, ANSWER)),
        ),
        (
            {"conversations": [{"from": "human", "value": "q", "name": "n"}, {"from": "gpt", "value": "a"}]},
            Chat(({**USER, "name": "n"}, ANSWER)),
        ),
        ({"input": [USER], "ideal": "a"}, Chat(({**USER, "weight": 0}, ANSWER))),
        ({"input": [USER], "ideal": ["a", "b"]}, Chat(({**USER, "weight": 0}, ANSWER))),
        ({"prompt": [USER], "completion": [ANSWER]}, Chat(({**USER, "weight": 0}, ANSWER))),
        ({"prompt": [USER], "completion": "a"}, Chat(({**USER, "weight": 0}, ANSWER))),
    ],
)
def test_every_form_in_use(value, document):
    assert normalise(value) == document


def test_a_tool_call_may_have_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert normalise({"messages": [USER, call]}).messages[1]["content"] == ""


def test_the_mapping_is_said():
    described = detect_form(rows({"Question": "q", "answer": "a"})).description
    assert described == "chat: Question -> user, answer -> assistant"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"messages": [{"content": "q"}, ANSWER]}, "message 1 has no role"),
        ({"messages": [{"role": "owner", "content": "q"}, ANSWER]}, "unknown role 'owner'"),
        ({"messages": [{"role": ["user"], "content": "q"}, ANSWER]}, "unknown role"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "message 1 has a number as its content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]}, "vision"),
        ({"messages": [{"role": "user", "content": [3]}, ANSWER]}, "a part of its content is a number"),
        ({"messages": [{"role": "user"}, ANSWER]}, "message 1 has no content"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "q"}, "messages is a string"),
        ({"messages": [USER, "a"]}, "item 2 is a string"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, "empty answer"),
        ({"messages": [USER, {**ANSWER, "weight": "0"}]}, "message 2 has the weight '0'"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "not JSON"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "unknown speaker 'alien'"),
        ({"text": 3}, "text is a number"),
        ({"text": "  "}, "text is empty"),
        ({"prompt": "p", "completion": ""}, "completion is empty"),
        ({"prompt": ["p"], "completion": "c"}, "item 1 is a string"),
        ({"input": "q", "ideal": "a"}, "input is a string"),
    ],
)
def test_a_malformed_row_is_refused_with_the_reason(value, reason):
    with pytest.raises(Rejected, match=reason):
        normalise(value)


def test_mixed_schemas_take_the_commoner_and_refuse_the_other():
    mixed = rows({"text": "t"}, {"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"})
    form = detect_form(mixed)
    assert form.name == "completion"
    with pytest.raises(Rejected, match="no prompt and no completion"):
        form.normalise(mixed[0])


def test_a_wanted_form_overrules():
    both = {"text": "t", "prompt": "p", "completion": "c"}
    assert normalise(both) == Completion("p", "c")
    assert normalise(both, "text") == Text("t")
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert normalise(shared, "chat") == normalise(shared, "sharegpt") == Chat((USER, ANSWER))
    with pytest.raises(InputError, match="no chat form in the columns text"):
        normalise({"text": "t"}, "chat")


def test_unknown_columns_are_named():
    with pytest.raises(InputError, match=r"t.jsonl:1: no known form in the columns label, score"):
        detect_form(rows({"label": 1, "score": 2}))


def test_preferences_are_refused_by_name_where_answers_are_not_weighed():
    with pytest.raises(InputError, match="objective"):
        detect_form(rows({"prompt": "p", "chosen": "a", "rejected": "b"}))


@pytest.mark.parametrize(
    ("value", "unused"),
    [
        ({"text": "t"}, ()),
        ({"text": "t", "id": 3, "url": None, "tags": [], "meta": {"a": None}, "note": " "}, ("id",)),
        ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, ("category",)),
        ({"question": "q", "answer": "a", "context": {"title": "t"}}, ("context",)),
        ({"prompt": "p", "completion": "c", "tools": [{"name": "t"}]}, ("tools",)),
        ({"messages": [USER, ANSWER], "tools": [{"name": "t"}], "source": "s"}, ("source",)),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "another"}, ("system",)),
        ({"messages": [USER, ANSWER], "system": "s", "system_prompt": "s2"}, ("system_prompt",)),
        ({"instruction": "q", "output": "a", "label": 0, "flag": False}, ("label", "flag")),
        ({"input": [USER], "ideal": ["a", "b"]}, ("ideal[1:]",)),
    ],
)
def test_columns_that_go_nowhere_are_named(value, unused):
    assert normalise(value).unused == unused


columns = st.from_regex(r"[a-z]{8}", fullmatch=True) | st.sampled_from(["system", "system_prompt", "context", "title"])


@given(form=st.sampled_from(FORMS), column=columns, text=st.from_regex(r"[0-9]{8}", fullmatch=True))
def test_whatever_a_column_is_called_it_is_used_or_named(form, column, text):
    given = {"messages": [USER, ANSWER], "conversations": [{"from": "gpt", "value": "a"}], "ideal": "a"}
    value = {name: given.get(name, "q") for name in form.columns} | {column: text}
    value |= {"history": [["q", "a"]]} if "history" in form.columns else {}
    value |= {"input": [USER]} if "ideal" in form.columns else {}
    document = form.normalise(Row(value, "t.jsonl:1"))
    assert (column in document.unused) != (text in repr(document))


@pytest.mark.parametrize("column", ["system", "context", "history", "input"])
def test_what_else_is_used_is_said(column):
    plain = {"instruction": "q", "output": "a"} if column == "history" else {"instruction": "q", "response": "a"}
    other = {column: [["x", "y"]] if column == "history" else "x"}
    assert column not in detect_form(rows(plain)).description.split("(with ")[-1].split(" -> ")[0]
    assert column in detect_form(rows(plain, plain | other)).description.split("(with ")[1]


def test_a_history_that_some_rows_have_makes_all_of_them_chat():
    values = (
        {"prompt": "q", "response": "a", "history": []},
        {"prompt": "q", "response": "a", "history": [["q", "a"]]},
    )
    form = detect_form(rows(*values))
    assert [form.normalise(row) for row in rows(*values)] == [Chat((USER, ANSWER)), Chat((USER, ANSWER, USER, ANSWER))]


def test_arguments_are_objects_also_where_they_come_as_text():
    def calls(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return normalise({"messages": [USER, {**ANSWER, "tool_calls": [call]}]}).messages[1]["tool_calls"]

    assert calls('{"a": 1}') == calls({"a": 1}) == [{"function": {"name": "f", "arguments": {"a": 1}}}]
    for text in ("", "{", "[1]", "7", '{"a": 1, "a": 2}', '{"a": NaN}'):
        assert calls(text) == [{"function": {"name": "f", "arguments": text}}]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"instruction": "q", "output": "a", "history": ["x"]}, "history isn't a list of pairs"),
        ({"instruction": "q", "output": "a", "history": "{"}, "history is a text, but not JSON"),
        (
            {"conversations": [{"from": "gpt", "value": "a", "content": "b"}]},
            "turn 1 has two of them: value and content",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": 3}]}, "tool_calls is a number"),
    ],
)
def test_what_stands_beside_is_checked_too(value, reason):
    with pytest.raises(Rejected, match=reason):
        normalise(value)


def read(values, wanted="auto", **options):
    """(form, documents) of a source."""
    form = detect_form(rows(*values), wanted, **options)
    return form, [form.normalise(row) for row in rows(*values)]


@pytest.mark.parametrize("pair", PAIR_NAMES)
def test_a_pair_is_a_chat_where_there_is_a_template_and_never_glued_where_there_is_none(pair):
    value = dict(zip(pair, ("in 0", "out 0"), strict=True))
    laid_out = pair == LAID_OUT
    form, (chat,) = read([value])
    assert isinstance(chat, Completion) == laid_out
    assert pair[0] in form.note and ("data.form: chat" in form.note) == laid_out
    form, (plain,) = read([value], templated=False)
    assert plain == Completion("in 0", "out 0" if laid_out else "\nout 0") and not form.note
    (_, (as_chat,)), (_, (as_text,)) = read([value], "chat"), read([value], "completion")
    assert as_chat == Chat(({**USER, "content": "in 0"}, {**ANSWER, "content": "out 0"}))
    assert as_text == plain
    assert read([value], join=" -> ")[1] == [Completion("in 0", " -> out 0")]


@pytest.mark.parametrize(("prompt", "completion"), [("in ", "out"), ("in", " out"), ("in\n", "out"), ("", "out")])
def test_what_is_apart_already_stays_as_it_is(prompt, completion):
    value = {"question": prompt, "answer": completion}
    assert read([value], templated=False)[1] == [Completion(prompt, completion)]


def test_alpaca_needs_no_template():
    value = {"instruction": "q", "input": "i", "output": "a"}
    assert read([value], templated=False)[1] == [Completion("q\n\ni", "\na")]
    assert read([value], "alpaca", templated=False)[1] == read([value])[1]


def test_how_an_adapter_was_trained_decides_for_what_it_is_measured_on():
    laid_out, pair, alpaca = (
        {"prompt": "q", "completion": "a"},
        {"q": "q", "a": "a"},
        {"instruction": "q", "output": "a"},
    )
    for value in (laid_out, pair, alpaca):
        assert read([value], reads="chat")[1] == [Chat((USER, ANSWER))]
        assert isinstance(read([value], reads="completion")[1][0], Completion)


MAPPED = [
    ({"prompt": "frage", "completion": "antwort"}, {"frage": "q", "antwort": "a", "thema": "x"}, ("thema",)),
    ({"prompt": "Frage", "completion": "antwort"}, {" FRAGE ": "q", "antwort": "a"}, ()),
    ({"prompt": "completion", "completion": "prompt"}, {"completion": "q", "prompt": "a"}, ()),
    ({"question": "frage"}, {"frage": "q", "answer": "a", "question": "another"}, ("question",)),
    ({"instruction": "i", "output": "o"}, {"i": "q", "o": "a"}, ()),
    ({"messages": "talk"}, {"talk": [USER, ANSWER], "text": "t"}, ("text",)),
]


@pytest.mark.parametrize(("names", "value", "unused"), MAPPED)
def test_columns_under_other_names(names, value, unused):
    _, (document,) = read([value], columns=Columns(names))
    assert document == Chat((USER, ANSWER)) and document.unused == unused


def test_a_named_column_decides_the_form():
    value = {"body": "t", "question": "q", "answer": "a", "rules": "s"}
    assert read([value], columns=Columns({"text": "body"}))[1] == [Text("t")]
    assert read([value], columns=Columns({"system": "rules"}))[1] == [Chat((SYSTEM, USER, ANSWER))]
    with pytest.raises(InputError, match="no form has together"):
        read([value], columns=Columns({"text": "body", "prompt": "question"}))


def test_a_column_that_does_not_exist_is_named_with_those_that_do():
    values = [{"frage": "q", "antwort": "a"}]
    for names in ({"prompt": "frge", "completion": "antwort"}, {"prompt": "frage", "completion": "x"}):
        with pytest.raises(InputError) as refused:
            read(values, columns=Columns(names))
        assert "data.columns" in refused.value.what and "frage, antwort" in refused.value.fix
        assert ("'frage'" in refused.value.fix) == ("frge" in names.values())
    _, documents = read(
        [{"prompt": "q", "completion": "a"}], columns=Columns(MAPPED[0][0])
    )  # they have the names already
    assert documents == [Chat((USER, ANSWER))]


@given(form=st.sampled_from(FORMS), data=st.data())
def test_capitals_and_blanks_around_a_name_do_not_matter(form, data):
    value = {name: {"messages": [USER, ANSWER], "conversations": [{"from": "gpt", "value": "a"}]}.get(name, "q")
             for name in form.columns}  # fmt: skip
    value |= {"input": [USER]} if "ideal" in form.columns else {}
    dressed = {
        data.draw(st.sampled_from([name, name.upper(), f" {name.title()}  ", f"{name}\t"])): item
        for name, item in value.items()
    }
    assert form.normalise(Row(dressed, "t:1")) == form.normalise(Row(value, "t:1"))
    assert read([dressed])[1] == read([value])[1]


def test_a_join_that_does_nothing_is_refused():
    for value in ({"text": "t"}, {"messages": [USER, ANSWER]}):
        with pytest.raises(InputError, match=r"data\.join"):
            read([value], join=" ")


def test_every_column_that_can_be_named_is_known_to_a_form():
    known = {name for form in FORMS for name in (*form.columns, *form.also)} | {"tools", *BOTH, *LABELS}
    assert set(get_args(ColumnName)) <= known
