"""How a chat template writes calls of tools, found by a probe. No model is known by its name.

The template writes an answer with two planted calls (with one, where it takes no two) and an answer in words. What the
first has beyond what the two have in common is the form (tool_calls.py). It is one only if it reads back what was
planted: a template that writes no calls, or not as JSON, has none.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deltaw.data.tool_calls import HOLE, CallForm, CallSplitter, ToolCall
from deltaw.data.turns import ANSWER
from deltaw.errors import Rejected
from deltaw.files.template import Asked

ARGUMENTS = {"qzkey": "qzvalue"}
PARAMETERS = {"type": "object", "properties": {"qzkey": {"type": "string", "description": "qz"}}}
CALL_ID = "qzcall123"  # nine letters and digits: what Mistral's templates want
NAMES = "qznameone", "qznametwo"

Texts = list[str | Rejected] | Rejected


def probes(offering: bool = True) -> list[Asked]:
    """What a template is asked to write: two calls, one, and an answer in words, each with its generation prompt."""
    functions = [{"name": name, "description": "qz", "parameters": PARAMETERS} for name in NAMES]
    calls = [{"id": CALL_ID, "type": "function", "function": {"name": name, "arguments": ARGUMENTS}} for name in NAMES]
    answers: list[dict[str, Any]] = [{"content": "", "tool_calls": calls[:count]} for count in (2, 1)]
    user = {"role": "user", "content": "qz"}
    offered = [{"type": "function", "function": function} for function in functions] if offering else []
    return [
        Asked([user, {"role": "assistant", **answer}], offered, [(2, False), (1, True)])
        for answer in (*answers, {"content": ANSWER})
    ]


def find_form(written: Sequence[Texts], tokens: Mapping[str, int], end_of_turn: str) -> CallForm | None:
    """The form of what a template wrote of the `probes`; None where it has none that can be read. `tokens`: the control
    tokens that there are, `end_of_turn` the one that ends an answer."""
    *called, plain = written
    for texts, names in zip(called, (NAMES, NAMES[:1]), strict=True):
        if isinstance(texts, Rejected) or isinstance(plain, Rejected):
            continue
        form = _form(texts, str(plain[0]), names, tokens, end_of_turn)
        if form is not None and _reads_back(form, names):
            return form
    return None


class _Planted(NamedTuple):
    """A planted call in a text: how it is written, and where it begins and ends."""

    how: tuple[str, str, str, tuple[str, str] | None]  # head, middle, foot, keys
    begin: int
    end: int


def _form(
    texts: Sequence[str | Rejected], plain: str, names: Sequence[str], tokens: Mapping[str, int], end_of_turn: str
) -> CallForm | None:
    text, prompt = str(texts[0]), texts[1]
    begin = _parting(text, plain, tokens)
    calls: list[_Planted] = []
    for name in names:
        call = _planted(text, calls[-1].end if calls else begin, name)
        if call is None or call.how != (calls or [call])[0].how:
            return None
        calls.append(call)
    tail = text[calls[-1].end :]
    ends = [at for name in tokens if (at := tail.rfind(name)) >= 0]
    turn = tail.find(end_of_turn) if end_of_turn else -1
    opened = isinstance(prompt, str) and text[:begin].startswith(prompt)
    around = [
        text[begin : calls[0].begin],
        text[calls[0].end : calls[-1].begin],
        tail[: turn if turn >= 0 else max(ends, default=len(tail))],
        *calls[0].how[:3],
    ]
    before, between, after, head, middle, foot = (part.replace(CALL_ID, HOLE) for part in around)
    preamble = text[len(str(prompt)) : begin] if opened else ""
    own = {name: id for name, id in tokens.items() if name in "\n".join((*around, preamble))}
    two = between if calls[1:] else None
    return CallForm(before, two, after, head, middle, foot, calls[0].how[3], preamble, own)


def _parting(text: str, plain: str, tokens: Mapping[str, int]) -> int:
    """Where two texts part, never inside a control token."""
    pairs = enumerate(zip(text, plain, strict=False))
    at = next((i for i, (one, other) in pairs if one != other), min(len(text), len(plain)))
    begun = (
        place for name in tokens for place in range(max(0, at - len(name) + 1), at) if text.startswith(name, place)
    )
    return min(begun, default=at)


def _planted(text: str, at: int, name: str) -> _Planted | None:
    """The call of this name behind `at`."""
    begin = text.find(name, at)
    brace = text.rfind("{", at, text.find(json.dumps(*ARGUMENTS), begin) + 1) if begin >= 0 else -1
    value, end = _decoded(text, brace) if brace > begin else (None, 0)
    if value != ARGUMENTS:
        return None
    middle = text[begin + len(name) : brace]
    opening = text.rfind("{", at, begin)
    while opening >= 0:
        value, closing = _decoded(text, opening)
        if isinstance(value, dict) and closing >= end:
            keys = [key for wanted in (name, ARGUMENTS) for key, item in value.items() if item == wanted]
            if len(keys) == 2:
                head, foot = text[opening:begin], text[end:closing]
                return _Planted((head, middle, foot, (keys[0], keys[1])), opening, closing)
        opening = text.rfind("{", at, opening)
    return _Planted(("", middle, "", None), begin, end)


def _decoded(text: str, at: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except ValueError:
        return None, 0


def _reads_back(form: CallForm, names: Sequence[str]) -> bool:
    """Whether the splitter finds the planted calls in what the form writes of them."""
    if form.keys is None and form.bare:
        return False  # an answer that begins with a function's name would be a call
    arguments = json.dumps(ARGUMENTS)
    calls = [form.head + form.named(name) + form.middle + arguments + form.foot for name in names]
    text = (form.before + (form.between or "").join(calls) + form.after).replace(HOLE, CALL_ID)
    splitter = CallSplitter(form, names)
    return [*splitter.push(text), *splitter.end()] == [ToolCall(name, arguments) for name in names]
