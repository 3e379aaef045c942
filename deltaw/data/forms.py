"""The forms that fine-tuning data comes in -> three kinds of document.

    Text         one text                                 {"text"}
    Completion   a prompt and what must follow it         {"prompt", "completion"} and pairs under other names
    Chat         messages, perhaps tools                  {"messages"}, ShareGPT, alpaca, evals' {"input", "ideal"}

The form is recognised from the columns of the first rows, once for the whole source, and said in one line
that the preview and the report show ("completion: question -> prompt, answer -> completion"): a guess that
is shown can be corrected with `data.form`. A row of another form is then a problem of its own, never
guessed at row by row.

Decisions.
- Alpaca rows become chat (instruction, blank line, input -> user; output -> assistant), so that the model's
  own template lays them out and `chat` and every server meet the trained layout. The Stanford prompt text
  was rejected: whoever serves the adapter would have to know it.
- Prompt and completion are joined with nothing between: a separator belongs into the data, where inference
  sees it.
- Message lists under prompt / completion are a chat of which only the completion is trained. OpenAI's
  `weight: 0` on a message says the same and is how it is stored here.
- Preference data is refused by name; treating `chosen` as a completion would silently be another method.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.data.row import Rejected, Row
from deltaw.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **dict(zip(ROLES, ROLES, strict=True)),
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
}
TEXT_NAMES = ("text", "content", "document")
PAIR_NAMES = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("input", "output"),
    ("source", "target"),
)
SAMPLE = 1000  # rows looked at to recognise the form
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """A text, all of it trained."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """What is given, and what must follow."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages with `role` and `content`; one with `weight: 0` is not trained. `tools` are JSON schemas."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


Document = Text | Completion | Chat


@dataclass(frozen=True)
class Form:
    """A recognised form. `columns` are those a row must have; `description` is the mapping, for people."""

    name: str
    description: str
    columns: tuple[str, ...]
    convert: Callable[[dict[str, Any]], Document]

    def matches(self, value: dict[str, Any]) -> bool:
        """Whether the row has the columns (null counts as absent: tables fill up with it)."""
        return all(value.get(column) is not None for column in self.columns)

    def normalise(self, row: Row) -> Document:
        """The row as a document. Raises Rejected, with a reason, on a row of another form or a malformed one."""
        if not self.matches(row.value):
            missing = [column for column in self.columns if row.value.get(column) is None]
            raise Rejected(f"no {' and no '.join(missing)} (the form of this source is {self.description})")
        return self.convert(row.value)


def detect_form(rows: Sequence[Row], wanted: str = "auto") -> Form:
    """The form that most of the first rows have; `wanted` (`data.form`) narrows the choice.

    Raises InputError when no form fits, naming the columns there are, and on preference data.
    """
    sample = [row.value for row in rows[:SAMPLE]]
    if not sample:
        raise InputError("no rows, so no form to recognise")
    if 2 * sum("chosen" in value and "rejected" in value for value in sample) > len(sample):
        fix = "train on the chosen answers: rename chosen to completion and drop rejected"
        raise InputError(f"{rows[0].origin}: preference data (chosen, rejected) is not supported yet", fix=fix)
    forms = [form for form in FORMS if wanted in ("auto", form.name, _also(form))]
    counts = [sum(form.matches(value) for value in sample) for form in forms]
    if not max(counts, default=0):
        columns = ", ".join(sorted({str(column) for value in sample for column in value})[:12]) or "none"
        kind = "known form" if wanted == "auto" else f"{wanted} form"
        known = "; ".join(sorted({" + ".join(form.columns) for form in forms}))
        raise InputError(f"{rows[0].origin}: no {kind} in the columns {columns}", fix=f"name them {known}")
    return forms[counts.index(max(counts))]


def _also(form: Form) -> str:
    """`data.form: chat` means anything that is a conversation."""
    return "chat" if form.name == "sharegpt" else form.name


def _chat(value: dict[str, Any]) -> Chat:
    return _checked_chat(value["messages"], value.get("tools"))


def _sharegpt(value: dict[str, Any]) -> Chat:
    turns = _list_of_objects(value["conversations"], "conversations")
    messages = []
    for number, turn in enumerate(turns, 1):
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or speaker.lower() not in SHAREGPT_ROLES:
            raise Rejected(f"turn {number}: unknown speaker {speaker!r}")
        content = turn.get("value", turn.get("content"))
        messages.append({"role": SHAREGPT_ROLES[speaker.lower()], "content": content, "weight": turn.get("weight")})
    if isinstance(value.get("system"), str) and value["system"] and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": value["system"]})
    return _checked_chat(messages, value.get("tools"))


def _evals(value: dict[str, Any]) -> Chat:
    ideal = value["ideal"][0] if isinstance(value["ideal"], list) and value["ideal"] else value["ideal"]
    prompt = _list_of_objects(value["input"], "input")
    return _checked_chat([*_untrained(prompt), {"role": "assistant", "content": ideal}], None)


def _alpaca(value: dict[str, Any]) -> Chat:
    instruction, output = _string(value, "instruction"), _string(value, "output")
    extra = _string(value, "input") if value.get("input") else ""
    messages = [{"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction}]
    if value.get("system"):
        messages.insert(0, {"role": "system", "content": _string(value, "system")})
    return _checked_chat([*messages, {"role": "assistant", "content": output}], None)


def _text(column: str) -> Callable[[dict[str, Any]], Document]:
    def convert(value: dict[str, Any]) -> Text:
        text = _string(value, column)
        if not text.strip():
            raise Rejected(f"{column} is empty")
        return Text(text)

    return convert


def _pair(given: str, wanted: str) -> Callable[[dict[str, Any]], Document]:
    def convert(value: dict[str, Any]) -> Document:
        if isinstance(value[given], list):
            answer = value[wanted]
            if isinstance(answer, str):
                answer = [{"role": "assistant", "content": answer}]
            context = _untrained(_list_of_objects(value[given], given))
            return _checked_chat([*context, *_list_of_objects(answer, wanted)], value.get("tools"))
        prompt, completion = _string(value, given), _string(value, wanted)
        if not completion.strip():
            raise Rejected(f"{wanted} is empty")
        return Completion(prompt, completion)

    return convert


def _checked_chat(messages: Any, tools: Any) -> Chat:
    checked = tuple(
        _message(message, number) for number, message in enumerate(_list_of_objects(messages, "messages"), 1)
    )
    if not any(message["role"] == "assistant" for message in checked):
        raise Rejected("no assistant message, so nothing to train on")
    return Chat(checked, _tools(tools))


def _message(message: Message, number: int) -> Message:
    where = f"message {number}"
    role, content = message.get("role"), message.get("content")
    if role is None:
        raise Rejected(f"{where} has no role")
    if role not in ROLES:
        raise Rejected(f"{where}: unknown role {role!r}; known: {', '.join(ROLES)}")
    calls = bool(message.get("tool_calls"))
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        what = "has no content" if content is None else f"has a {type(content).__name__} as content, not a text"
        raise Rejected(f"{where} {what}")
    if role == "assistant" and not content.strip() and not calls:
        raise Rejected(f"{where} is an empty answer")
    if message.get("weight") not in (None, 0, 1):
        raise Rejected(f"{where} has the weight {message['weight']!r}; known: 0 (not trained), 1")
    return {**{key: value for key, value in message.items() if value is not None}, "content": content}


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(tools, str):  # tables keep it as a JSON text
        try:
            tools = json.loads(tools or "[]")
        except (ValueError, RecursionError):
            raise Rejected("tools is a text, but not JSON") from None
    if tools is None or tools == []:
        return ()
    return tuple(_list_of_objects(tools, "tools"))


def _untrained(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "weight": 0} for message in messages]


def _list_of_objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Rejected(f"{name} is a {type(value).__name__}, not a list")
    if not value:
        raise Rejected(f"{name} is empty")
    wrong = next((number for number, item in enumerate(value, 1) if not isinstance(item, dict)), None)
    if wrong:
        raise Rejected(f"{name}: item {wrong} is a {type(value[wrong - 1]).__name__}, not an object")
    return value


def _string(value: dict[str, Any], column: str) -> str:
    if not isinstance(value[column], str):
        raise Rejected(f"{column} is a {type(value[column]).__name__}, not a text")
    return value[column]


# In order of preference: a row that has the columns of two forms is the earlier one's.
FORMS = (
    Form("chat", "chat: messages[].role / content", ("messages",), _chat),
    Form("sharegpt", "chat: conversations[].from / value", ("conversations",), _sharegpt),
    Form("chat", "chat: input[] -> messages, ideal -> the answer", ("input", "ideal"), _evals),
    Form(
        "alpaca",
        "alpaca: instruction (+ input) -> user, output -> assistant",
        ("instruction", "output"),
        _alpaca,
    ),
    *(
        Form(
            "completion",
            f"completion: {given} -> prompt, {wanted} -> completion",
            (given, wanted),
            _pair(given, wanted),
        )
        for given, wanted in PAIR_NAMES
    ),
    *(Form("text", f"text: {column}", (column,), _text(column)) for column in TEXT_NAMES),
)
