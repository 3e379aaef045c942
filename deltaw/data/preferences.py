"""The forms that preferences come in: two answers to one prompt, or one answer that was judged.

    pairs    {"prompt", "chosen", "rejected"}      texts, or messages; the prompt under any name that a form knows
             {"chosen", "rejected"}                whole conversations, or texts: what both begin with is the prompt
    judged   {"prompt", "completion", "label"}     or any other row with one answer, and a column that judges it

A row of two answers is two rows with one answer each, and those are what forms.py knows: system prompts, context,
history, tools, pairs of strings as chats or as laid out, and `data.form`, `data.columns` and `data.join` mean here what
they mean there. What is trained is the answer alone: turns that both answers share are part of the prompt, and of a
judged conversation all but the last answer are.

Decisions.
- `prompt` beside strings is taken as it stands, `question` or `instruction` as what a user asks: as in forms.py.
- Where chosen and rejected are whole conversations, a `prompt` beside them repeats what they begin with (so the common
  data sets have it) and isn't used. Where their first turns differ there is no common prompt, and the row is refused.
- Texts without a prompt are cut behind the last blank that both have in common, so that no token spans the cut.
- Two equal answers prefer nothing: refused.
- A label is true or false, in JSON's words, as 1 or 0, or as a text that says so, since CSV has only texts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deltaw.config import DataConfig, Shape
from deltaw.data.columns import Columns, Fields
from deltaw.data.document import Chat, Document, Judged, Message, Pair, Single, parsed
from deltaw.data.forms import SAMPLE, SHAREGPT_ROLES, Form, Reads, form_of
from deltaw.data.row import Row
from deltaw.errors import InputError, Rejected
from deltaw.files.strict_json import json_kind
from deltaw.show.text import one_line

ANSWERS = {  # the column that asks: what the answer to it is called in forms.py
    "prompt": "completion",
    "question": "answer",
    "query": "response",
    "instruction": "output",
    "input": "output",
    "source": "target",
}
BOTH, LABELS = ("chosen", "rejected"), ("label", "kto_tag")
TRUE, FALSE = ("true", "1", "yes", "1.0"), ("false", "0", "no", "0.0")
Values = dict[str, Any]


def form_for(shape: Shape, rows: Sequence[Row], data: DataConfig, *, templated: bool, reads: Reads = "auto") -> Form:
    """The form of rows that are to give `shape`; any: pairs where they are, else one answer. Raises InputError."""
    columns = Columns({str(name): column for name, column in data.columns.items()})
    sample = [Fields(row.value, columns) for row in rows[:SAMPLE]]
    paired = sum(_has(fields, *BOTH) for fields in sample) * 2 > len(sample)
    if shape == "one" or (shape == "any" and not paired):
        return form_of(rows, data, templated=templated, reads=reads)
    columns.check(rows)
    label = next((name for name in LABELS if sum(_has(fields, name) for fields in sample) * 2 > len(sample)), "")
    if not paired and not (label and shape == "judged"):
        raise _unknown(rows, shape)
    own = Form("pairs" if paired else "judged", "", BOTH if paired else (label,), _not_yet, names=columns)
    singles = [_singles(own, row, label, paired) for row in rows[:SAMPLE]]
    first = [Row(values[0], row.origin) for row, values in zip(rows, singles, strict=False) if values]
    if not first:
        raise InputError(f"{rows[0].origin}: {_why_not(own, rows[0], label, paired)}", fix="mend the rows")
    if templated and reads == "auto" and data.form == "auto" and columns.renames("prompt"):
        reads = "chat"  # a column that is only mapped to that name isn't laid out
    inner = form_of(first, data.model_copy(update={"columns": {}}), templated=templated, reads=reads)

    def convert(fields: Fields) -> Pair | Judged:
        answers, desirable = _taken(fields, label, paired)
        whose = BOTH if paired else ("",)
        documents = [_normalised(inner, values, name) for name, values in zip(whose, answers, strict=True)]
        for name in documents[0].unused:
            fields.leave(name)
        if not paired:
            return Judged(_last_alone(documents[0]), desirable)
        if documents[0] == documents[1]:
            raise Rejected("chosen and rejected are the same")
        return Pair(*_without_common(*documents))

    return replace(own, description=_description(own, inner, first[0], label), convert=convert, note=inner.note)


def _not_yet(fields: Fields) -> Document:
    raise NotImplementedError


def _has(fields: Fields, *names: str) -> bool:
    return all(fields.peek(name) is not None for name in names)


def _unknown(rows: Sequence[Row], shape: str) -> InputError:
    there = one_line(", ".join(dict.fromkeys(str(column) for row in rows[:SAMPLE] for column in row.value)), 300)
    wanted = "a chosen and a rejected answer"
    names = "{prompt: …, chosen: …, rejected: …}"
    if shape == "judged":
        wanted, names = "an answer and a label (or a chosen and a rejected answer)", "{…, label: …}"
    return InputError(
        f"{rows[0].origin}: this objective weighs answers, so a row has {wanted}, and these have the columns {there}",
        fix=f"say which is which, as in data.columns: {names}; or train on the answers alone: objective: sft",
    )


def _singles(form: Form, row: Row, label: str, paired: bool) -> list[Values]:
    try:
        return _taken(Fields(row.value, form.names), label, paired)[0]
    except Rejected:
        return []


def _why_not(form: Form, row: Row, label: str, paired: bool) -> str:
    try:
        _taken(Fields(row.value, form.names), label, paired)
    except Rejected as rejected:
        return str(rejected)
    return "can't be read"


def _normalised(inner: Form, values: Values, name: str) -> Single:
    """`name`: which of two answers it is, for what is wrong with it."""
    try:
        (single, _), *_ = inner.normalise(Row(values, "")).answers
        return single
    except Rejected as rejected:
        raise Rejected(f"{name}: {rejected}" if name else str(rejected)) from None


def _taken(fields: Fields, label: str, paired: bool) -> tuple[list[Values], bool]:
    """A row with one answer for each, and how that is judged. Raises Rejected."""
    values = fields.take_all()
    if not paired:
        return [values], _judgement(values.pop(label, None), label)
    chosen, rejected = (_answer(values.pop(name, None), name) for name in BOTH)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _of_texts(values, chosen, rejected), True
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise Rejected("one of chosen and rejected is a text, the other messages")
    return _of_messages(values, chosen, rejected), True


def _answer(value: Any, name: str) -> str | list[Message]:
    """A text, or messages (one may stand alone), in the words of OpenAI."""
    if isinstance(value, str) and value.lstrip().startswith(("[{", '{"')):  # a table's cell that holds messages
        try:
            cell = parsed(value, name)
        except Rejected:
            cell = value
        value = cell if _are_messages(cell) else value
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise Rejected(f"{name} is {json_kind(value)}, neither a text nor messages")
    if not all({"role", "from"} & {*one} for one in messages):
        raise Rejected(f"{name}: a message has no role")
    return [_message(one) for one in messages]


def _are_messages(value: Any) -> bool:
    messages = [value] if isinstance(value, dict) else value
    return isinstance(messages, list) and all(isinstance(one, dict) and {"role", "from"} & {*one} for one in messages)


def _message(message: Message) -> Message:
    """In OpenAI's words, where it is in ShareGPT's."""
    if "role" in message or "from" not in message:
        return {key: value for key, value in message.items() if value is not None}
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker = str(message["from"])
    return {**rest, "role": SHAREGPT_ROLES.get(speaker.lower(), speaker), "content": message.get("value")}


def _judgement(value: Any, label: str) -> bool:
    word = str(value).strip().casefold()
    if word not in (*TRUE, *FALSE):
        raise Rejected(f"{label} is {value!r:.40}, neither true nor false")
    return word in TRUE


def _of_texts(values: Values, chosen: str, rejected: str) -> list[Values]:
    for asks, answers in ANSWERS.items():
        if values.get(asks) is not None:
            return [{**values, answers: text} for text in (chosen, rejected)]
    for name, key in (("messages", "content"), ("conversations", "value")):
        if isinstance(turns := values.get(name), list):
            speaker = {"role": "assistant"} if key == "content" else {"from": "gpt"}
            return [{**values, name: [*turns, {**speaker, key: text}]} for text in (chosen, rejected)]
    shared = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))
    cut = next((at for at in range(min(shared, len(rejected)), 0, -1) if chosen[at - 1].isspace()), 0)
    cut = len(chosen[:cut].rstrip())  # the blank is the answer's: a prompt is asked without it
    if not cut:
        raise Rejected("there is no prompt, and chosen and rejected have no beginning in common")
    return [{**values, "prompt": text[:cut], "completion": text[cut:]} for text in (chosen, rejected)]


def _of_messages(values: Values, chosen: list[Message], rejected: list[Message]) -> list[Values]:
    """Answers by themselves go behind the row's prompt; whole conversations have it in them."""
    if chosen[0].get("role") == "assistant" and rejected[0].get("role") == "assistant":
        before = _prompt(values)
    else:
        before = chosen[: _common(chosen[:-1], rejected[:-1])]
        if not any(message.get("role") != "system" for message in before):
            raise Rejected("chosen and rejected don't begin with the same prompt")
        chosen, rejected = chosen[len(before) :], rejected[len(before) :]
        for name in (*ANSWERS, "messages", "conversations"):
            values.pop(name, None)  # it repeats what they begin with
    return [{**values, "prompt": before, "completion": answer} for answer in (chosen, rejected)]


def _prompt(values: Values) -> list[Message]:
    """The row's prompt as messages, taken out of it."""
    for name in (*ANSWERS, "messages", "conversations"):
        prompt = values.pop(name, None)
        if isinstance(prompt, str) and prompt.strip():
            return [{"role": "user", "content": prompt}]
        if isinstance(prompt, list) and prompt and all(isinstance(one, dict) for one in prompt):
            return [_message(one) for one in prompt]
    raise Rejected("chosen and rejected are answers, and there is no prompt")


def _last_alone(document: Single) -> Single:
    """Of a chat only the last answer is judged."""
    if not isinstance(document, Chat):
        return document
    last = max(number for number, message in enumerate(document.messages) if message["role"] == "assistant")
    return replace(document, messages=asked_only(document.messages[:last]) + document.messages[last:])


def _without_common(chosen: Single, rejected: Single) -> tuple[Single, Single]:
    """Both, with the turns that they share as a part of the prompt."""
    if not isinstance(chosen, Chat) or not isinstance(rejected, Chat):
        return chosen, rejected
    common = _common(chosen.messages, rejected.messages)
    return tuple(  # type: ignore[return-value]
        replace(one, messages=asked_only(one.messages[:common]) + one.messages[common:]) for one in (chosen, rejected)
    )


def _common(some: Sequence[Message], others: Sequence[Message]) -> int:
    """How many messages both begin with."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(some), len(others)))


def asked_only(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Turns of which no answer is trained."""
    return tuple({**message, "weight": 0} if message["role"] == "assistant" else message for message in messages)


def _description(form: Form, inner: Form, first: Row, label: str) -> str:
    names = {name: str(form.names.given.get(name, name)) for name in (*BOTH, *LABELS)}
    as_what = "chats" if isinstance(inner.normalise(first).answers[0][0], Chat) else "texts"
    if form.name == "judged":
        return f"judged answers: {inner.description}, {names[label]} judges it"
    return f"pairs of answers, as {as_what}: {names['chosen']} is preferred to {names['rejected']}"
