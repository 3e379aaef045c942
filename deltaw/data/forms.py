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
- A column beside those is used as its form's users mean it: `system` goes in front (unless the messages begin
  with one), `history` is earlier turns (trained, as where it comes from; pairs with one are therefore chat), dolly's
  `context` follows the instruction, a question's precedes it, with a blank line between. Every other column that
  says something is named in `unused`: what is taken is taken out of the row (`Fields`), so nothing is left out unseen.
- Fields of a message that aren't known here go to the template; `left_out.py` says which of them it writes.
- Preference data is refused by name; treating `chosen` as a completion would silently be another method.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltaw.data.document import ROLES, Chat, Completion, Document, Message, Text, checked_chat, list_of_objects, parsed
from deltaw.data.row import Row, says_something
from deltaw.errors import InputError, Rejected
from deltaw.files.strict_json import json_kind

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
SYSTEM_NAMES = ("system", "system_prompt")
SAMPLE = 1000  # rows looked at to recognise the form


class Fields:
    """A row's columns, to be taken one by one; `rest` names those that nobody took."""

    def __init__(self, value: dict[str, Any]) -> None:
        self._left = dict(value)
        self._more: list[str] = []

    def take(self, name: str) -> Any:
        """The column's value, which is thereby used; None where there is none."""
        return self._left.pop(name, None)

    def peek(self, name: str) -> Any:
        """The column's value, which isn't thereby used."""
        return self._left.get(name)

    def take_text(self, *names: str) -> str | None:
        """The first of these columns that is a text, not blank; anything else stays where it is."""
        for name in names:
            value = self._left.get(name)
            if isinstance(value, str) and value.strip():
                return str(self.take(name))
        return None

    def leave(self, name: str) -> None:
        """A part of a column that was taken isn't used."""
        self._more.append(name)

    def rest(self) -> tuple[str, ...]:
        """What is left and says something."""
        return (*(str(name) for name, value in self._left.items() if says_something(value)), *self._more)


@dataclass(frozen=True)
class Form:
    """A recognised form. `columns` are those a row must have, `also` those it may; `description` is for people."""

    name: str
    description: str
    columns: tuple[str, ...]
    convert: Callable[[Fields], Document]
    also: tuple[str, ...] = ()

    def matches(self, value: dict[str, Any]) -> bool:
        """Whether the row has the columns (null counts as absent: tables fill up with it)."""
        return all(value.get(column) is not None for column in self.columns)

    def normalise(self, row: Row) -> Document:
        """The row as a document. Raises Rejected, with a reason, on a row of another form or a malformed one."""
        if not self.matches(row.value):
            missing = [column for column in self.columns if row.value.get(column) is None]
            raise Rejected(f"no {' and no '.join(missing)} (the form of this source is {self.description})")
        fields = Fields(row.value)
        document = self.convert(fields)
        return replace(document, unused=fields.rest())


def detect_form(rows: Sequence[Row], wanted: str = "auto") -> Form:
    """The form that most of the first rows have; `wanted` (`data.form`) narrows the choice.

    Raises InputError when no form fits, naming the columns there are, and on preference data.
    """
    sample = [row.value for row in rows[:SAMPLE]]
    if not sample:
        raise InputError("no rows, so no form to recognise")
    if 2 * sum("chosen" in value and "rejected" in value for value in sample) > len(sample):
        fix = "train on the chosen answers: rename chosen to completion and drop rejected"
        raise InputError(f"{rows[0].origin}: preference data (chosen, rejected) isn't supported yet", fix=fix)
    told = any(says_something(value.get("history")) for value in sample)
    forms = [form for form in FORMS if wanted in ("auto", form.name, _also(form))]
    forms = [form for form in forms if told or "history" not in form.columns]
    counts = [sum(form.matches(value) for value in sample) for form in forms]
    if not max(counts, default=0):
        columns = ", ".join(sorted({str(column) for value in sample for column in value})[:12]) or "none"
        kind = "known form" if wanted == "auto" else f"{wanted} form"
        known = "; ".join(sorted({" + ".join(form.columns) for form in forms}))
        raise InputError(
            f"{rows[0].origin}: no {kind} in the columns {columns}", fix=f"rename the columns to one of: {known}"
        )
    form = forms[counts.index(max(counts))]
    also = [name for name in form.also if any(says_something(value.get(name)) for value in sample)]
    return replace(form, description=f"{form.description} (with {', '.join(also)})") if also else form


def _also(form: Form) -> str:
    """`data.form: chat` means anything that is a conversation."""
    return "chat" if form.name == "sharegpt" else form.name


def _chat(row: Fields) -> Chat:
    messages = list_of_objects(row.take("messages"), "messages")
    return checked_chat(_with_system(messages, row), row.take("tools"))


def _sharegpt(row: Fields) -> Chat:
    messages = []
    for number, turn in enumerate(list_of_objects(row.take("conversations"), "conversations"), 1):
        rest = {key: value for key, value in turn.items() if value is not None}
        speaker, content = _either(rest, number, "from", "role"), _either(rest, number, "value", "content")
        if not isinstance(speaker, str) or speaker.lower() not in SHAREGPT_ROLES:
            raise Rejected(f"turn {number}: unknown speaker {speaker!r}")
        messages.append({**rest, "role": SHAREGPT_ROLES[speaker.lower()], "content": content})
    return checked_chat(_with_system(messages, row), row.take("tools"))


def _either(turn: Message, number: int, *names: str) -> Any:
    """What a turn has under one of two names, taken out of it."""
    values = [turn.pop(name) for name in names if name in turn]
    if any(value != values[0] for value in values):
        raise Rejected(f"turn {number} has two of them: {' and '.join(names)}")
    return values[0] if values else None


def _evals(row: Fields) -> Chat:
    prompt, ideal = list_of_objects(row.take("input"), "input"), row.take("ideal")
    if isinstance(ideal, list) and ideal:
        if len(ideal) > 1:
            row.leave("ideal[1:]")  # other answers that would be right
        ideal = ideal[0]
    answer = {"role": "assistant", "content": ideal}
    return checked_chat([*_untrained(_with_system(prompt, row)), answer], row.take("tools"))


def _alpaca(row: Fields) -> Chat:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    if not isinstance(row.peek("input") or "", str):
        raise Rejected(f"input is {json_kind(row.peek('input'))}, not a text")
    extra = row.take_text("input", "context")
    return _talk(row, f"{instruction}\n\n{extra}" if extra else instruction, output)


def _talk(row: Fields, question: str, answer: str) -> Chat:
    """A question and its answer behind the row's earlier turns."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return checked_chat(_with_system([*_history(row.take("history")), *turns], row), row.take("tools"))


def _history(value: Any) -> list[Message]:
    """Earlier turns: pairs of a question and its answer, or messages."""
    turns: list[Message] = []
    for item in parsed(value, "history") or ():
        if isinstance(item, dict):
            turns.append(item)
        elif isinstance(item, list) and len(item) == 2:
            turns += ({"role": role, "content": text} for role, text in zip(("user", "assistant"), item, strict=True))
        else:
            raise Rejected("history isn't a list of pairs [question, answer]")
    return turns


def _with_system(messages: list[Message], row: Fields) -> list[Message]:
    """`messages` behind the row's system text. Where they begin with one it stays unused."""
    if messages and messages[0].get("role") == "system":
        return messages
    system = row.take_text(*SYSTEM_NAMES)
    return [{"role": "system", "content": system}, *messages] if system else messages


def _text(column: str) -> Callable[[Fields], Document]:
    def convert(row: Fields) -> Text:
        text = _string(row, column)
        if not text.strip():
            raise Rejected(f"{column} is empty")
        return Text(text)

    return convert


def _pair(given: str, wanted: str) -> Callable[[Fields], Document]:
    def convert(row: Fields) -> Document:
        prompt, answer = row.take(given), row.take(wanted)
        if isinstance(prompt, list):
            if isinstance(answer, str):
                answer = [{"role": "assistant", "content": answer}]
            before = _untrained(_with_system(list_of_objects(prompt, given), row))
            return checked_chat([*before, *list_of_objects(answer, wanted)], row.take("tools"))
        given_text, completion = _with_context(row, prompt, given), _checked_string(answer, wanted)
        if not completion.strip():
            raise Rejected(f"{wanted} is empty")
        system = row.take_text(*SYSTEM_NAMES)
        return Completion(f"{system}\n\n{given_text}" if system else given_text, completion)

    return convert


def _told_pair(given: str, wanted: str) -> Callable[[Fields], Document]:
    def convert(row: Fields) -> Chat:
        question = _with_context(row, row.take(given), given)
        return _talk(row, question, _string(row, wanted))

    return convert


def _with_context(row: Fields, value: Any, given: str) -> str:
    """What is asked, with what it is asked about."""
    parts = [_checked_string(value, given), row.take_text(*_contexts(given))]
    if given in ("question", "query"):
        parts.reverse()
    return "\n\n".join(part for part in parts if part)


def _untrained(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "weight": 0} for message in messages]


def _string(row: Fields, column: str) -> str:
    return _checked_string(row.take(column), column)


def _checked_string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise Rejected(f"{column} is {json_kind(value)}, not a text")
    return value


def _contexts(given: str) -> tuple[str, ...]:
    return ("context", "input") if given == "instruction" else ("context",)


# In order of preference: a row that has the columns of two forms is the earlier one's.
FORMS = (
    Form("chat", "chat: messages[].role / content", ("messages",), _chat, SYSTEM_NAMES),
    Form("sharegpt", "chat: conversations[].from / value", ("conversations",), _sharegpt, SYSTEM_NAMES),
    Form("chat", "chat: input[] -> messages, ideal -> the answer", ("input", "ideal"), _evals, SYSTEM_NAMES),
    Form(
        "alpaca",
        "alpaca: instruction (+ input) -> user, output -> assistant",
        ("instruction", "output"),
        _alpaca,
        ("history", *SYSTEM_NAMES),
    ),
    *(
        Form(
            "chat",
            f"chat: history + {given} -> user, {wanted} -> assistant",
            (given, wanted, "history"),
            _told_pair(given, wanted),
            (*_contexts(given), *SYSTEM_NAMES),
        )
        for given, wanted in PAIR_NAMES
    ),
    *(
        Form(
            "completion",
            f"completion: {given} -> prompt, {wanted} -> completion",
            (given, wanted),
            _pair(given, wanted),
            (*_contexts(given), *SYSTEM_NAMES),
        )
        for given, wanted in PAIR_NAMES
    ),
    *(Form("text", f"text: {column}", (column,), _text(column)) for column in TEXT_NAMES),
)
