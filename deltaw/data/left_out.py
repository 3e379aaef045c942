"""What a chat template leaves out of a row, found from its output.

A template is a program: which fields of a message it reads can't be told from its source, and one that has never heard
of `reasoning_content` or of tool calls silently leaves them out. So a marker is planted in every field of every
turn and the template writes the row: a marker that comes out is a field that is written. What doesn't come out is
suspected only, since a marker may send a template another way (`type` must be `function`, an id must have nine
letters). It is left out if the row *as it stands* is written the same when nothing but that field is changed; many are
tried at once and split in halves where they make a difference.

    Leaf      (path, stretch) of a text or a number: ("messages", 2, "tool_calls", 0, "function", "name"), 0
    planted   the row with a marker in every leaf; two rows have the same shape where these are equal

The answer depends on the row's shape, so it is found once for a shape. What keeps shapes few: texts that the template
itself names stay as they are inside tools and calls ("function"), and cut a text into stretches where they stand in it
(`</think>`, before which some templates leave out everything); in `tools` and `arguments`, entries whose keys the
template doesn't name count once if they are of one shape, and so do the items of a list in `tools`.

A marker is short, and a template may cut a content off that is too long for it. So a content of which not all stands in
what is written of its own row is tried there: another beginning, another end must make a difference.

A field counts as written where it is in the whole chat or at the end of its own turn: a template that drops the
thoughts of earlier turns shows them to the model in time, and `render.py` leaves untrained what it then rewrites.

What follows from it. A row is refused where nothing is written of what a message says (`content`) or of what it calls
(`tool_calls`, `function_call`, but for their ids, types and numbers): the answer trained would be another one, or an
answer to another question. Everything else is counted and said: without `reasoning_content`, thoughts inside a content,
`tools` or `name` the answer is still the row's, given for less reason. Rejected: a list of the fields that templates
know, and looking for the texts themselves in what is written ("3" stands in many places).
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from deltaw.data.row import says_something
from deltaw.files.template import Asked, Template

CALLS = ("tool_calls", "function_call")
CONTENT, PART = "messages[].content", "a part of "
BOOKKEEPING = ("id", "type", "index")
MARKUP = re.compile(r"[<\[|]")
NUMBER = 7_130_000_000  # markers in place of numbers go on from here

Path = tuple[str | int, ...]
Leaf = tuple[Path, int]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """`refused`: why a row of this shape can't be trained on. `fields`: what else isn't written."""

    refused: str = ""
    fields: tuple[str, ...] = ()


class Survey:
    """What one template leaves out, by the shape of a row."""

    def __init__(self, template: Template) -> None:
        self._template = template
        named = [re.escape(word) for word in template.words if len(word.strip()) > 2 and MARKUP.search(word)]
        self._cut = re.compile(f"({'|'.join(sorted(named, key=len, reverse=True)) or '(?!)'})")
        self._known: dict[bytes, LeftOut] = {}
        self._simple: dict[tuple[str, ...], bytes] = {}  # the shapes of chats of plain contents, by their roles

    def of(self, rows: Sequence[Asked], written: Sequence[Sequence[Any]]) -> list[LeftOut]:
        """For each row, of which `written` is what the template writes. New shapes are written first, in one call."""
        shapes = []
        new: dict[bytes, tuple[Asked, Asked, dict[Leaf, str]]] = {}
        for row in rows:
            simple = _simple(row)
            if simple in self._simple:
                shapes.append(self._simple[simple])
                continue
            planting = _Planting(self._template.words, self._cut)
            try:
                messages, tools = planting.messages(row.messages), planting.value(row.tools, ("tools",))
            except RecursionError:
                shapes.append(b"")
                self._known[b""] = LeftOut("nested too deeply")
                continue
            shapes.append(blake2b(json.dumps([messages, tools]).encode(), digest_size=16).digest())
            if simple:
                self._simple[simple] = shapes[-1]
            if shapes[-1] not in self._known:
                planted = Asked(messages, tools, _prefixes(len(messages)))
                new.setdefault(shapes[-1], (row, planted, planting.leaves))
        planted_texts = self._write([planted for _, planted, _ in new.values()])
        for (shape, (row, _, leaves)), texts in zip(new.items(), planted_texts, strict=True):
            self._known[shape] = self._judge(row, leaves, texts or [])
        known = [self._known[shape] for shape in shapes]
        return [self._with_cuts(row, loss, texts) for row, loss, texts in zip(rows, known, written, strict=True)]

    def _with_cuts(self, row: Asked, loss: LeftOut, texts: Sequence[Any]) -> LeftOut:
        """`loss`, and whether this row's contents are cut off: a marker is short, they may be too long."""
        if loss.refused or PART + CONTENT in loss.fields:
            return loss
        for number, message in enumerate(row.messages):
            if isinstance(texts[0], str) and message["content"].strip() in texts[0]:
                continue
            stretches = self._cut.split(message["content"])[::2]
            if all(_stands(stretch.strip(), texts) for stretch in stretches):
                continue
            leaves: list[Leaf] = [(("messages", number, "content"), 2 * index) for index in range(len(stretches))]
            if self._unwritten(row, leaves) or self._unwritten(row, leaves, at_end=False):
                return LeftOut(_reason(row, number, f"all of {CONTENT}"), loss.fields)
        return loss

    def _judge(self, row: Asked, leaves: dict[Leaf, str], texts: Sequence[str]) -> LeftOut:
        suspects = list(leaves)
        for text in map(str.casefold, texts):
            suspects = [leaf for leaf in suspects if not leaves[leaf] or leaves[leaf] not in text]
            if not suspects:
                break
        return _verdict(row, list(leaves), self._unwritten(row, suspects) if suspects else [])

    def _unwritten(self, row: Asked, suspects: list[Leaf], at_end: bool = True) -> list[Leaf]:
        """Those of `suspects` that make no difference to what is written of the row when they end (begin) otherwise."""
        prefixes = _prefixes(len(row.messages))
        (real,) = self._write([Asked(row.messages, row.tools, prefixes)])
        if real is None:
            return []  # refused by the template, which says so itself
        unwritten: list[Leaf] = []
        groups = [suspects]
        while groups:
            changed = [Asked(*_changed(row, set(group), self._cut, at_end), prefixes) for group in groups]
            halves = []
            for group, texts in zip(groups, self._write(changed), strict=True):
                if texts == real:
                    unwritten += group
                elif len(group) > 1:
                    halves += [group[: len(group) // 2], group[len(group) // 2 :]]
            groups = halves
        return unwritten

    def _write(self, rows: Sequence[Asked]) -> list[list[str] | None]:
        """The texts of each row, "" for a beginning that the template refuses; None where it refuses the row."""
        return [
            None if not isinstance(texts, list) else [text if isinstance(text, str) else "" for text in texts]
            for texts in self._template.render_rows(rows)
        ]


@dataclass
class _Planting:
    """Puts markers into a row. `leaves`: what stands in each; "" where none can."""

    words: frozenset[str]
    cut: re.Pattern[str]
    leaves: dict[Leaf, str] = field(default_factory=dict)

    def messages(self, messages: Sequence[Any]) -> list[Any]:
        return [
            {
                key: value if key == "role" else self.value(value, ("messages", number, key))
                for key, value in message.items()
            }
            for number, message in enumerate(messages)
        ]

    def value(self, value: Any, path: Path) -> Any:
        if isinstance(value, str):
            return self._text(value, path)
        if isinstance(value, dict):
            return self._object(value, path)
        if isinstance(value, list | tuple):
            items = _distinct(value) if path[0] == "tools" else range(len(value))
            return [self.value(value[index], (*path, index)) for index in items]
        if isinstance(value, bool):
            if path[0] == "messages":
                self.leaves[path, 0] = ""
        elif value is not None:
            number = NUMBER + len(self.leaves)
            self.leaves[path, 0] = str(number)
            return number if isinstance(value, int) else number + 0.5
        return value

    def _text(self, text: str, path: Path) -> str:
        if text in self.words and (path[0] == "tools" or len(path) > 3):
            return text
        stretches = self.cut.split(text)
        for index in range(0, len(stretches), 2):
            if stretches[index].strip():
                stretches[index] = self.leaves[path, index] = f"qz{len(self.leaves)}zq"
        return "".join(stretches)

    def _object(self, value: dict[str, Any], path: Path) -> dict[str, Any]:
        open_ended = path[0] == "tools" or "arguments" in path
        known = {key: item for key, item in value.items() if key in self.words or not open_ended}
        other = [key for key in value if key not in known]
        keys = [other[index] for index in _distinct([value[key] for key in other])]
        names = {key: key for key in known} | {key: f"qzkey{number}" for number, key in enumerate(keys)}
        return {names[key]: self.value(value[key], (*path, key)) for key in value if key in names}


def _simple(row: Asked) -> tuple[str, ...]:
    """The roles of a chat whose shape they tell: no tools, no other fields, contents that say something and in which
    nothing stands that a template may look for. Empty for any other."""
    if row.tools:
        return ()
    for message in row.messages:
        content = message.get("content")
        if len(message) != 2 or "role" not in message or not isinstance(content, str) or not content.strip():
            return ()
        if "<" in content or "[" in content or "|" in content:  # MARKUP
            return ()
    return tuple(message["role"] for message in row.messages)


def _distinct(values: Sequence[Any]) -> list[int]:
    """The indices of the first value of each shape."""
    return list({_shape(value): index for index, value in reversed(list(enumerate(values)))}.values())[::-1]


def _shape(value: Any) -> Any:
    """A hashable image of a value in which all texts are alike."""
    if isinstance(value, dict):
        return ("object", *((key, _shape(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return ("list", *map(_shape, value))
    return type(value).__name__ if says_something(value) else None


def _changed(row: Asked, leaves: set[Leaf], cut: re.Pattern[str], at_end: bool) -> tuple[Any, Any]:
    """Messages and tools of `row` with another value in each of `leaves`."""

    def change(value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: change(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [change(item, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, str):
            stretches = cut.split(value)
            for index in range(0, len(stretches), 2):
                if (path, index) in leaves:
                    stretches[index] = f"{stretches[index]} qzq" if at_end else f"qzq {stretches[index]}"
            return "".join(stretches)
        if (path, 0) not in leaves:
            return value
        return not value if isinstance(value, bool) else value + 1

    return change(row.messages, ("messages",)), change(row.tools, ("tools",))


def _prefixes(count: int) -> list[tuple[int, bool]]:
    return [(count, False), *((n, False) for n in range(1, count))]


def _verdict(row: Asked, leaves: Sequence[Leaf], unwritten: Sequence[Leaf]) -> LeftOut:
    lost = set(unwritten)
    written = {name for path, _ in (leaf for leaf in leaves if leaf not in lost) for name in _names(path)}
    whole = {path for path, _ in leaves} - {path for path, index in leaves if (path, index) not in lost}
    fields = dict.fromkeys(_field(path, written, path in whole) for path, _ in unwritten)
    for path, _ in unwritten:
        if path in whole and _is_said(path):
            return LeftOut(_reason(row, int(path[1]), _field(path, written, True)), tuple(fields))
    return LeftOut("", tuple(fields))


def _reason(row: Asked, number: int, field: str) -> str:
    role = row.messages[number].get("role")
    whose = "the answer's" if role == "assistant" else f"the {role} message's"
    what = field.replace("messages[].", f"{whose} ", 1)
    return f"message {number + 1}: the chat template doesn't write {what}; set data.template to a .jinja file that does"


def _stands(text: str, texts: Sequence[Any]) -> bool:
    """Whether a text stands in one of these, as it is or as JSON has it."""
    return any(
        isinstance(one, str) and (text in one or json.dumps(text, ensure_ascii=False)[1:-1] in one) for one in texts
    )


def _is_said(path: Path) -> bool:
    """Whether the training would be wrong without it."""
    if path[0] != "messages":
        return False
    return path[2] == "content" or (path[2] in CALLS and path[-1] not in BOOKKEEPING)


def _field(path: Path, written: set[str], whole: bool) -> str:
    """The name of the largest field around `path` of which nothing is written."""
    if not whole:
        return PART + _name(path)
    return next((name for name in _names(path) if name not in written), _name(path))


def _names(path: Path) -> Iterator[str]:
    """`messages[].tool_calls`, `messages[].tool_calls[].id`: the fields that a path goes through."""
    for end in range(3 if path[0] == "messages" else 1, len(path) + 1):
        if end == len(path) or isinstance(path[end - 1], str):
            yield _name(path[:end])


def _name(path: Path) -> str:
    name = str(path[0])
    for part in path[1:]:
        name += "[]" if isinstance(part, int) else f".{part}"
    return name
