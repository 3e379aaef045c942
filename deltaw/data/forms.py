"""The forms that fine-tuning data comes in -> three kinds of document.

    Text         one text                                 {"text"}
    Completion   a prompt and what must follow it         {"prompt", "completion"} and pairs under other names
    Chat         messages, perhaps tools                  {"messages"}, ShareGPT, alpaca, evals' {"input", "ideal"}, …

The form is recognised from the columns of the first rows, once for the whole source, and said in one line
that the preview and the report show ("chat: question -> user, answer -> assistant"): a guess that
is shown can be corrected with `data.form`. A row of another form is then a problem of its own, never
guessed at row by row.

Decisions.
- A pair (question and answer, instruction and response, …) is a chat where the base has a chat template, since that
  is how such a model is asked, by `chat` and by every server. Without a template it is a prompt and a completion.
- `prompt` and `completion`, if a file calls them so itself, are taken as they stand on any base: whoever writes these
  names has laid the text out (TRL and the first fine-tuning services take them so), and a run on such a file goes on.
  A file whose columns `data.columns` maps to these names has not been laid out: it is a pair like any other.
- `data.form: chat | completion` overrules both. The note that is printed says which reading it is and how to get the
  other. What was trained is recorded by the template in the adapter's files, so that it is asked in the same way.
- Between such a prompt and its completion stands nothing: a separator belongs into the data, where inference sees it.
  Other pairs aren't written to be glued ("in 0out 0"): where they meet without a blank a line break goes between. It
  is the completion's first character: the model writes it, and a prompt is asked as it stands in the table. `data.join`
  is another separator, for any pair.
- Alpaca rows are pairs with an optional input (instruction, blank line, input -> user; output -> assistant). The
  Stanford prompt text was rejected: whoever serves the adapter would have to know it.
- Message lists under prompt / completion are a chat of which only the completion is trained. OpenAI's
  `weight: 0` on a message says the same and is how it is stored here.
- A column beside those is used as its form's users mean it: `system` goes in front (unless the messages begin
  with one), `history` is earlier turns (trained, as where it comes from; pairs with one are therefore chat), dolly's
  `context` follows the instruction, a question's precedes it, with a blank line between. Every other column that
  says something is named in `unused`: what is taken is taken out of the row (`Fields`), so nothing is left out unseen.
- Fields of a message that aren't known here go to the template; `left_out.py` says which of them it writes.
- Preferences (preferences.py) are refused by name where answers aren't weighed; treating `chosen` as a completion would
  silently be another method.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from deltaw.config import DataConfig
from deltaw.data.columns import UNNAMED, Columns, Fields
from deltaw.data.document import ROLES, Chat, Completion, Document, Message, Text, checked_chat, list_of_objects, parsed
from deltaw.data.row import Row, says_something
from deltaw.errors import InputError, Rejected
from deltaw.files.strict_json import json_kind
from deltaw.show.text import one_line

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
LAID_OUT = ("prompt", "completion")
PAIR_NAMES = (
    *product(("prompt", "question", "query", "instruction"), ("completion", "response", "answer", "output")),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
    ("q", "a"),
    ("user", "assistant"),
)
SYSTEM_NAMES = ("system", "system_prompt")
Reads = Literal["auto", "chat", "completion"]
SAMPLE = 1000  # rows looked at to recognise the form


@dataclass(frozen=True)
class Form:
    """A recognised form. `columns` are those a row must have, `also` those it may, by the names known here; `names`
    says what they are called in the source. `description` and `note` are for people; `pair`: of a question and its
    answer."""

    name: str
    description: str
    columns: tuple[str, ...]
    convert: Callable[[Fields], Document]
    also: tuple[str, ...] = ()
    pair: bool = False
    names: Columns = UNNAMED
    note: str = ""

    def matches(self, fields: Fields) -> bool:
        """Whether the row has the columns (null counts as absent: tables fill up with it)."""
        return all(fields.peek(column) is not None for column in self.columns)

    def normalise(self, row: Row) -> Document:
        """The row as a document. Raises Rejected, with a reason, on a row of another form or a malformed one."""
        fields = Fields(row.value, self.names)
        missing = [self.names.given.get(name, name) for name in self.columns if fields.peek(name) is None]
        if missing:
            raise Rejected(f"no {' and no '.join(missing)} (the form of this source is {self.description})")
        document = self.convert(fields)
        return replace(document, unused=fields.rest())


def detect_form(
    rows: Sequence[Row],
    wanted: str = "auto",
    *,
    columns: Columns = UNNAMED,
    join: str | None = None,
    templated: bool = True,
    reads: Reads = "auto",
) -> Form:
    """The form that most of the first rows have. `wanted` (`data.form`) narrows the choice; `columns`, `join`: those of
    the data section; `templated`: the base has a chat template; `reads`: how pairs are read where nothing else says it.

    Raises InputError when no form fits, naming the columns there are, and on preference data.
    """
    if not rows:
        raise InputError("no rows, so no form to recognise")
    columns.check(rows)
    sample = [Fields(row.value, columns) for row in rows[:SAMPLE]]
    if 2 * sum(None not in map(fields.peek, ("chosen", "rejected")) for fields in sample) > len(sample):
        fix = "set objective: {kind: dpo} (or ipo, orpo, simpo, kto); or rename chosen to completion and drop rejected"
        raise InputError(f"{rows[0].origin}: preferences (chosen, rejected), which objective: sft can't weigh", fix=fix)
    told = any(says_something(fields.peek("history")) for fields in sample)
    chats = templated and reads != "completion"
    pairs = wanted == "chat" or told or (chats and (join is None or reads == "chat"))
    alpaca = chats and (not join or reads == "chat")
    forms = [form for form in known_forms(columns, join) if wanted in (form.name, *_choices(form, alpaca, pairs))]
    if wanted == "auto" and not told and reads != "chat" and not columns.renames(*LAID_OUT):
        forms = [form for form in forms if form.name != "chat" or form.columns != LAID_OUT]
    forms = _with_all(forms, columns)
    counts = [sum(form.matches(fields) for fields in sample) for form in forms]
    if not max(counts, default=0):
        raise _unknown(rows, forms, wanted)
    form = forms[counts.index(max(counts))]
    if join and reads == "auto" and form.name != "completion":
        fix = "leave it out" + (", or set data.form: completion" if form.pair else "")
        raise InputError(f"data.join does nothing: the rows are read as {form.name}", fix=fix)
    return _described(form, rows[: len(sample)], sample, chosen=wanted == "auto" and templated)


def form_of(rows: Sequence[Row], data: DataConfig, *, templated: bool, reads: Reads = "auto") -> Form:
    """`detect_form` with the settings of a data section. Rows that come rendered need no template and no join."""
    join = "" if data.join is None and data.rendered else data.join
    columns = Columns({str(name): column for name, column in data.columns.items()})
    return detect_form(
        rows, data.form, columns=columns, join=join, templated=templated and not data.rendered, reads=reads
    )


def _choices(form: Form, alpaca: bool, pairs: bool) -> tuple[str, ...]:
    """Words of `data.form` that let this form be chosen, beside its name. `alpaca`, `pairs`: may be read as chats."""
    if form.name == "chat" and form.pair:
        return ("auto",) if pairs else ()
    if form.name == "alpaca":
        return ("auto", "chat") if alpaca else ("chat",)
    return ("auto", "chat") if form.name == "sharegpt" else ("auto",)


def _with_all(forms: Sequence[Form], columns: Columns) -> list[Form]:
    """The forms that use every column which was given a name."""
    fitting = [form for form in forms if set(columns.given) <= {*form.columns, *form.also, "tools"}]
    if forms and not fitting:
        raise InputError(
            f"data.columns names {', '.join(columns.given)}, which no form has together",
            fix="name prompt and completion, messages, or text, and perhaps system, context, history or tools",
        )
    return fitting


def _unknown(rows: Sequence[Row], forms: Sequence[Form], wanted: str) -> InputError:
    there = list(dict.fromkeys(str(column) for row in rows[:SAMPLE] for column in row.value))
    kind = "known form" if wanted == "auto" else f"{wanted} form"
    roles = ["text"] if wanted == "text" else list(LAID_OUT)
    example = ", ".join(f"{role}: {column}" for role, column in zip(roles, there, strict=False))
    known = "messages; prompt + completion; question + answer; instruction + output; text"
    if wanted != "auto":
        known = "; ".join(dict.fromkeys(" + ".join(form.columns) for form in forms[:4]))
    return InputError(
        f"{rows[0].origin}: no {kind} in the columns {one_line(', '.join(there[:12]), 300) or 'none'}",
        fix=f"say which is which, as in data.columns: {{{one_line(example)}}}, or rename them to one of: {known}",
    )


def _described(form: Form, rows: Sequence[Row], sample: Sequence[Fields], *, chosen: bool) -> Form:
    """The form with the source's own names in its description, and a note where it was `chosen` of two for a pair."""
    first = next(row for row, fields in zip(rows, sample, strict=True) if form.matches(fields))
    names = {name: name for name in form.columns} | form.names.of(first.value)
    description = form.description.format(**{name: one_line(str(names[name]), 40) for name in form.columns})
    also = [name for name in form.also if any(says_something(fields.peek(name)) for fields in sample)]
    if also:
        description += f" (with {', '.join(also)})"
    note = ""
    if form.pair and chosen and isinstance(Fields(first.value, form.names).peek(form.columns[0]), str):
        given, wanted = (one_line(str(names[name]), 40) for name in form.columns)
        note = f"{given} and {wanted} are rendered as a chat; data.form: completion joins them as text"
        if form.name == "completion":
            note = f"{given} and {wanted} are joined as text; data.form: chat renders them with the chat template"
    return replace(form, description=description, note=note)


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


def _pair(given: str, wanted: str, as_chat: bool, join: str | None) -> Callable[[Fields], Document]:
    """`join`: None is a line break where there is no blank."""

    def convert(row: Fields) -> Document:
        prompt, answer = row.take(given), row.take(wanted)
        if isinstance(prompt, list):
            if isinstance(answer, str):
                answer = [{"role": "assistant", "content": answer}]
            before = _untrained(_with_system(list_of_objects(prompt, given), row))
            return checked_chat([*before, *list_of_objects(answer, wanted)], row.take("tools"))
        question, completion = _with_context(row, prompt, given), _checked_string(answer, wanted)
        if as_chat:
            return _talk(row, question, completion)
        if not completion.strip():
            raise Rejected(f"{wanted} is empty")
        system = row.take_text(*SYSTEM_NAMES)
        text = f"{system}\n\n{question}" if system else question
        glued = bool(text) and not (text[-1].isspace() or completion[0].isspace())
        return Completion(text, ("\n" if glued else "") + completion if join is None else join + completion)

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


def _pairs(given: str, wanted: str, columns: Columns, join: str | None) -> tuple[Form, Form]:
    """A pair as a chat, and as a prompt and its completion."""
    also = (*_contexts(given), *SYSTEM_NAMES)
    if join is None and (given, wanted) == LAID_OUT and not columns.renames(*LAID_OUT):
        join = ""
    chat = f"chat: {{{given}}} -> user, {{{wanted}}} -> assistant"
    completion = f"completion: {{{given}}} -> prompt, {{{wanted}}} -> completion"
    return (
        Form("chat", chat, (given, wanted), _pair(given, wanted, True, join), ("history", *also), pair=True),
        Form("completion", completion, (given, wanted), _pair(given, wanted, False, join), also, pair=True),
    )


def known_forms(columns: Columns = UNNAMED, join: str | None = None) -> list[Form]:
    """In order of preference: a row that has the columns of two forms is the earlier one's."""
    alpaca = "alpaca: {instruction} -> user, {output} -> assistant"
    pairs = [_pairs(given, wanted, columns, join) for given, wanted in PAIR_NAMES]
    forms = [
        Form("chat", "chat: {messages}[].role / content", ("messages",), _chat, SYSTEM_NAMES),
        Form("sharegpt", "chat: {conversations}[].from / value", ("conversations",), _sharegpt, SYSTEM_NAMES),
        Form("chat", "chat: {input}[] -> messages, {ideal} -> the answer", ("input", "ideal"), _evals, SYSTEM_NAMES),
        Form(
            "alpaca",
            alpaca,
            ("instruction", "output"),
            _alpaca,
            ("input", "context", "history", *SYSTEM_NAMES),
            pair=True,
        ),
        *(chat for chat, _ in pairs),
        *(completion for _, completion in pairs),
        *(Form("text", f"text: {{{column}}}", (column,), _text(column)) for column in TEXT_NAMES),
    ]
    return [replace(form, names=columns) for form in forms]


FORMS = tuple(known_forms())
