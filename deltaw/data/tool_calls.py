"""The calls of tools in an answer, by the form in which its chat template writes them (call_form.py finds it).

    before  call  between  call  after           <tool_call>{…}</tool_call>, [TOOL_CALLS][{…}, {…}], or nothing around
    head NAME middle ARGUMENTS foot              a call. An object is read as JSON, by its keys: models put blanks and
                                                 keys as they like. Else (`<function=NAME>{…}</function>`) as it stands

An answer is split while it comes, and however its text comes in pieces, the same calls come of it. A call is told when
it is whole: what was told can't be taken back, and a text that only began like one is given as the text that it is.
Where nothing stands before a call, as with Llama 3, it must be the answer's beginning. What isn't JSON or names another
function stays text; behind the last call that there may be nothing is told. Blanks beside a call aren't text. Every
character is looked at a bounded number of times, whatever a model was brought to write.

Rejected: telling arguments while they come, as OpenAI does (an object that breaks off would be half a call).
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from deltaw.files.strict_json import NotJSON, parse

HOLE = "\0"  # where a call's id stands in a form
ARGUMENT_KEYS = "arguments", "parameters"  # models take one for the other
SIGNS = "[]{}<>,"  # beside which blanks may be more or fewer than the template writes
BLANKS, LONGEST_ID = 16, 64  # in a row; characters
MOST_CALLS = 128  # of an answer

Marker = Sequence[tuple[str, bool]]  # its characters, and whether blanks may come before each
Read = list["str | ToolCall"]


@dataclass(frozen=True)
class ToolCall:
    """A call of a function. `arguments`: an object, as JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallForm:
    """How calls are written. `between`: None where the template writes no two. `keys`: those of name and arguments in a
    call that is an object; None where it isn't one. `tokens`: ids of the control tokens in it, by their names."""

    before: str
    between: str | None
    after: str
    head: str
    middle: str
    foot: str
    keys: tuple[str, str] | None
    preamble: str
    tokens: Mapping[str, int]

    @property
    def bare(self) -> bool:
        """Whether nothing says that a call comes."""
        return not self.before.strip()

    def named(self, name: str) -> str:
        """A function's name as a call has it."""
        return name if self.keys is None else json.dumps(name, ensure_ascii=False)[1:-1]


class CallSplitter:
    """One answer, as it comes: its text and its calls, in their order. `names`: the functions that may be called;
    `most`: how many calls there may be; `count`: how many there were."""

    def __init__(self, form: CallForm, names: Collection[str], most: int = MOST_CALLS) -> None:
        self._form, self._most, self.count = form, most, 0
        self._names = {form.named(name): name for name in names}
        brace = "{" if form.keys else ""
        self._begin = _marker(form.before + brace)
        between = "" if form.bare and form.between is None else form.between
        self._next = None if between is None else _marker(between + brace)
        self._middle, self._after = _marker(form.middle + "{"), _marker(form.after)
        self._held = ""  # what isn't told yet
        self._begun = False  # whether anything was told
        self._step: Callable[[Read, bool], bool] = self._seek
        self._call = 0  # where the call begins that is being read
        self._scan: _Scan | None = None  # of the object in it

    @property
    def over(self) -> bool:
        """Whether the last call that there may be has come: with it the answer ends."""
        return self.count == self._most

    def push(self, text: str) -> Read:
        """What can be told once this has come."""
        return self._read(text, last=False)

    def end(self) -> Read:
        """All that was kept back, when no more comes."""
        return self._read("", last=True)

    def _read(self, text: str, last: bool) -> Read:
        out: Read = []
        self._held += text
        while self._step(out, last):
            pass
        return out

    def _tell(self, out: Read, end: int) -> None:
        """The text up to there."""
        if end:
            out.append(self._held[:end])
            self._held, self._begun = self._held[end:], True

    def _seek(self, out: Read, last: bool) -> bool:
        """In text, up to where a call begins or may begin."""
        at, call = self._found()
        if call is None and last:
            at = len(self._held)
        text = len(self._held[:at].rstrip())
        self._tell(out, text)
        if call is None:
            if last and not self.count:
                self._tell(out, len(self._held))
            return False
        self._open(call - text)
        return True

    def _found(self) -> tuple[int, int | None]:
        """Where the text ends for now, and where a call begins if one does."""
        held = self._held
        if self._form.bare:
            at = len(held) - len(held.lstrip())
            if self._begun or held[at : at + 1] not in ("", "{"):
                return len(held), None
            return (0, at) if at < len(held) else (0, None)
        first, at = self._begin[0][0], 0
        while (at := held.find(first, at)) >= 0:
            end = _match(self._begin, held, at)
            if end is None:
                return at, None
            if end >= 0:
                return at, end - (self._form.keys is not None)
            at += 1
        return len(held), None

    def _open(self, call: int) -> None:
        self._call, self._scan, self._step = call, None, self._object if self._form.keys else self._function

    def _object(self, out: Read, last: bool) -> bool:
        """A call that is an object."""
        return self._close(out, last, self._call, None)

    def _function(self, out: Read, last: bool) -> bool:
        """A call that is a name and then its arguments."""
        unsure = False
        for written, name in self._names.items():
            end: int | None = -1
            if self._held.startswith(written, self._call):
                end = _match(self._middle, self._held, self._call + len(written))
            elif written.startswith(self._held[self._call :]):
                end = None
            if end is not None and end >= 0:
                return self._close(out, last, end - 1, name)
            unsure |= end is None
        if unsure and not last:
            return False
        return self._fail(out, len(self._held) if last else self._call)

    def _close(self, out: Read, last: bool, begin: int, name: str | None) -> bool:
        """A call of the object from `begin` on, if that is whole by now. `name`: None where the object says it."""
        self._scan = self._scan or _Scan(begin)
        end = self._scan.end(self._held)
        if end is None:
            return self._fail(out, len(self._held)) if last else False
        call = self._read_call(self._held[begin:end], name)
        if call is None:
            return self._fail(out, end)
        out.append(call)
        self.count += 1
        self._held, self._begun, self._step = self._held[end:], True, self._behind
        return True

    def _read_call(self, text: str, name: str | None) -> ToolCall | None:
        """What an object says; None where it isn't a call that may be."""
        try:
            value = parse(text)
            if self._form.keys:
                name = value.get(self._form.keys[0])
                value = next((value[key] for key in (self._form.keys[1], *ARGUMENT_KEYS) if key in value), None)
            arguments = json.dumps(value, ensure_ascii=False, allow_nan=False)
            arguments.encode()
        except (NotJSON, ValueError):  # also a half of a character, or a number too large
            return None
        known = isinstance(name, str) and name in self._names.values()
        return ToolCall(str(name), arguments) if known and isinstance(value, dict) else None

    def _fail(self, out: Read, end: int) -> bool:
        """It was no call: so far it is text."""
        self._tell(out, end)
        self._step = self._seek
        return True

    def _behind(self, out: Read, last: bool) -> bool:
        """Behind a call: the next, or the end of them."""
        if self.over:
            self._held = ""
            return False
        following = -1 if self._next is None else _match(self._next, self._held, 0)
        end = _match(self._after, self._held, 0)
        if not last and (following is None or end is None):
            return False
        end = max(0, end or 0)
        self._held = self._held[end:]
        if following is not None and following >= end:
            self._open(following - end - (self._form.keys is not None))
        else:
            self._step = self._seek
        return True


class _Scan:
    """Where the object ends that begins at `begin` of a text that grows."""

    def __init__(self, begin: int) -> None:
        self._at, self._depth = begin, 0
        self._quoted = self._escaped = False

    def end(self, text: str) -> int | None:
        """None where that isn't known yet."""
        for at in range(self._at, len(text)):
            sign = text[at]
            if self._escaped:
                self._escaped = False
            elif sign == '"':
                self._quoted = not self._quoted
            elif self._quoted:
                self._escaped = sign == "\\"
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if not self._depth:
                    return at + 1
        self._at = len(text)
        return None


def _marker(text: str) -> Marker:
    characters = [(sign, at) for at, sign in enumerate(text) if not sign.isspace()]
    marker = []
    for number, (sign, at) in enumerate(characters):
        before = text[at - 1] if number else " "
        marker.append((sign, before.isspace() or before in SIGNS or sign in SIGNS))
    return marker


def _match(marker: Marker, text: str, at: int) -> int | None:
    """Where a marker ends that begins there; -1 if none does, None if that isn't known yet."""
    for sign, blanks in marker:
        begin = at
        while blanks and at < len(text) and text[at].isspace() and at - begin < BLANKS:
            at += 1
        if sign == HOLE:
            begin = at
            while at < len(text) and (text[at].isalnum() or text[at] in "_-") and at - begin < LONGEST_ID:
                at += 1
            if at == len(text):
                return None
            continue
        if at == len(text):
            return None
        if text[at] != sign:
            return -1
        at += 1
    return at
