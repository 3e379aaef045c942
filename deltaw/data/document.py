"""The kinds of document that a row can become, and what must hold for a chat.

    Text         one text, all of it trained
    Completion   a prompt and what must follow it
    Chat         messages, perhaps tools; `weight: 0` on a message says that it isn't trained
    Pair         two of these with one prompt: the answer that was chosen, and the one that was rejected
    Judged       one of these, whose answer was found desirable or not
    Question     one of these that is only asked, whether its row has an answer or not

A content may come in parts, as `[{"type": "text", "text": …}]`; all else than text in one is refused by name.

Fields of a message that aren't known here are kept: the template may write them, and `left_out.py` says which of them
it doesn't. The arguments of a tool call are an object, also where the row has them as JSON text (OpenAI's form):
templates write them with `tojson`, and a text would be quoted once more.
"""

import ast
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from deltaw.base.parts import ANSWERED, ASKED, CHOSEN, DESIRABLE, PLAIN, REJECTED, UNDESIRABLE
from deltaw.errors import Rejected
from deltaw.files import strict_json
from deltaw.files.strict_json import json_kind

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Document:
    """`unused`: the row's columns that say something but aren't part of the document."""

    unused: tuple[str, ...] = field(default=(), compare=False, kw_only=True)

    @property
    def answers(self) -> "tuple[tuple[Single, int], ...]":
        """What each of its examples is rendered from, and which part that is (base/parts.py)."""
        return ((self, PLAIN),)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Text(_Document):
    """A text, all of it trained."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion(_Document):
    """What is given, and what must follow."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat(_Document):
    """Messages with `role` and `content`; one with `weight: 0` is not trained. `tools` are JSON schemas."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


Single = Text | Completion | Chat  # becomes one example, or the pieces of one


@dataclass(frozen=True, slots=True)
class Pair(_Document):
    """Two answers to one prompt."""

    chosen: Single
    rejected: Single

    @property
    def answers(self) -> tuple[tuple[Single, int], ...]:
        return (self.chosen, CHOSEN), (self.rejected, REJECTED)


@dataclass(frozen=True, slots=True)
class Judged(_Document):
    """An answer, and whether it is as wanted."""

    answer: Single
    desirable: bool

    @property
    def answers(self) -> tuple[tuple[Single, int], ...]:
        return ((self.answer, DESIRABLE if self.desirable else UNDESIRABLE),)


@dataclass(frozen=True, slots=True)
class Question(_Document):
    """A prompt, and behind it the answer that its row has, or a stand-in."""

    asked: Single
    answered: bool

    @property
    def answers(self) -> tuple[tuple[Single, int], ...]:
        return ((self.asked, ANSWERED if self.answered else ASKED),)


Document = Single | Pair | Judged | Question


def checked_chat(messages: Any, tools: Any) -> Chat:
    checked = checked_messages(messages)
    if not any(message["role"] == "assistant" for message in checked):
        raise Rejected("no assistant message, so nothing to train on")
    return Chat(checked, _tools(tools))


def checked_messages(messages: Any) -> tuple[Message, ...]:
    """A chat's messages, as templates are given them. Raises Rejected."""
    return tuple(_message(message, number) for number, message in enumerate(list_of_objects(messages, "messages"), 1))


def _message(message: Message, number: int) -> Message:
    role, content = message.get("role"), message.get("content")
    if (
        len(message) == 2
        and isinstance(role, str)
        and role in ROLES
        and isinstance(content, str)
        and content
        and not content.isspace()
    ):
        return {**message}
    where = f"message {number}"
    if role is None:
        raise Rejected(f"{where} has no role")
    if role not in ROLES:
        raise Rejected(f"{where}: unknown role {role!r}; known: {', '.join(ROLES)}")
    content = _text_of(content, where) if isinstance(content, list) else content
    calls = _calls(message.get("tool_calls"), where)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        what = "has no content" if content is None else f"has {json_kind(content)} as its content, not a text"
        raise Rejected(f"{where} {what}")
    if role == "assistant" and not content.strip() and not calls:
        raise Rejected(f"{where} is an empty answer")
    if message.get("weight") not in (None, 0, 1):
        raise Rejected(f"{where} has the weight {message['weight']!r}; known: 0 (not trained), 1")
    rest = {key: value for key, value in message.items() if value is not None and key != "tool_calls"}
    return {**rest, "content": content, **({"tool_calls": calls} if calls else {})}


def _text_of(parts: list[Any], where: str) -> str:
    """A content in parts (OpenAI's form), all of which are text: one text, with line breaks between them as servers
    put them for templates that want a text (vLLM, llama.cpp)."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise Rejected(f"{where}: a part of its content is {json_kind(part)}")
        kind = part.get("type") or "text"
        if kind not in TEXT_PARTS:
            known = kind if isinstance(kind, str) else json_kind(kind)
            media = any(word in known for word in ("image", "video", "audio"))
            why = "vision and audio aren't supported" if media else "only text is supported"
            raise Rejected(f"{where} has a part of type {known!r:.40}: {why}")
        text = part.get("text", part.get("content"))
        if not isinstance(text, str):
            raise Rejected(f"{where}: a text part without a text")
        texts.append(text)
    return "\n".join(texts)


def _calls(calls: Any, where: str) -> list[Any]:
    """Tool calls with their arguments as objects."""
    calls = parsed(calls, f"{where}: tool_calls") or []
    if not isinstance(calls, list):
        raise Rejected(f"{where}: tool_calls is {json_kind(calls)}, not a list")
    return [_with_object(call) for call in calls]


def _with_object(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = strict_json.parse(arguments)
    except strict_json.NotJSON:
        return call  # no JSON: a text is what was called
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else call


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    tools = parsed(tools, "tools")
    return tuple(list_of_objects(tools, "tools")) if tools not in (None, []) else ()


def parsed(value: Any, name: str) -> Any:
    """The value, which a table may hold as a JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value if value.strip() else "null")
    except (ValueError, RecursionError):
        raise Rejected(f"{name} is a text, but not JSON") from None


def held_in_cell(value: Any) -> Any:
    """The list or object that a table's cell holds, as JSON or as Python prints it; any other value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(value.strip())
    return value


def list_of_objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Rejected(f"{name} is {json_kind(value)}, not a list")
    if not value:
        raise Rejected(f"{name} is empty")
    wrong = next((number for number, item in enumerate(value, 1) if not isinstance(item, dict)), None)
    if wrong:
        raise Rejected(f"{name}: item {wrong} is {json_kind(value[wrong - 1])}, not an object")
    return value
