"""A chat -> pieces, by one chat template.

The template writes a chat and its beginnings in one go; `turns.py` finds the answers in that, and
`left_out.py` finds what it doesn't write. Texts are compared, not their ids, because the parts are encoded apart: a
border is then a border between tokens by construction, also where an answer begins with a newline that would melt into
the prompt's last token.

The arguments of tool calls are objects (`document.py`). A template that joins them to its text as they are wants JSON
text, which is what it then gets; it is known by refusing an object, or by writing one as Python does.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deltaw.data.call_form import find_form, probes
from deltaw.data.document import Chat, Message
from deltaw.data.encode import Encoder
from deltaw.data.left_out import Survey
from deltaw.data.tool_calls import CallForm
from deltaw.data.turns import Frame, find_answer, find_frame, trial
from deltaw.errors import InputError, Rejected
from deltaw.files.template import CHATML, MAX_TEMPLATE, Asked, Template, Unfinished

NO_TEMPLATE = "set data.template: chatml, or data.template: a .jinja file"
ARGUMENTS = {"qzkey": "qzvalue"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document that is encoded by itself. `trained` of it: 0 nothing, None all, k through control k."""

    text: str
    trained: int | None = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """A document as pieces, between the ids of `opening` and `closing` (a chat template writes its own)."""

    pieces: list[Piece]
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    untrained_turns: int = 0
    left_out: tuple[str, ...] = ()


class ChatWriter:
    """Lays out chats with one template. `stops`: the tokens that are known to end a turn."""

    def __init__(self, template: Template, encoder: Encoder, stops: Collection[str]) -> None:
        self._template, self._encoder = template, encoder
        self._survey = Survey(template)
        calls = list(map(_call, (ARGUMENTS, json.dumps(ARGUMENTS)))) if "arguments" in template.words else []
        alone, instructed, *called = template.render_rows([trial(), trial(system=True), *calls])
        texts = instructed if isinstance(alone, Rejected) else alone
        if isinstance(alone, Unfinished):
            raise InputError(f"it fails on two short messages already: {texts}", fix=NO_TEMPLATE)
        self._frame = Frame() if isinstance(texts, Rejected) else find_frame(texts, encoder.controls, stops)
        self._calls_as_text = bool(called) and not isinstance(called[1], Rejected) and not _is_json(called[0])
        self.end_of_turn = "" if isinstance(texts, Rejected) else self._find_end_of_turn(texts)

    @property
    def header(self) -> str:
        """What the template writes in front of an answer, but not when it is asked for a generation prompt."""
        return self._frame.header

    @property
    def writes_calls(self) -> bool:
        """Whether the template has heard of calls of tools."""
        return "tool_calls" in self._template.words

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template writes tools."""
        with_tools, without = (probes(offered)[-1] for offered in (True, False))
        texts, others = self._template.render_rows([with_tools, without])
        return not isinstance(texts, Rejected) and texts != others

    @cached_property
    def call_form(self) -> CallForm | None:
        """How the template writes calls of tools, where that can be read."""
        asked = [probe._replace(messages=self._guarded(probe.messages)) for probe in probes()]
        return find_form(self._template.render_rows(asked), self._encoder.ids, self.end_of_turn)

    def ask(self, chat: Chat, train_on: str) -> Asked:
        """What the template is asked to write: the whole chat, then p and q (`turns.py`) for every answer wanted."""
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        wanted = {"all": [], "completion": turns[-1:]}.get(train_on, turns)
        prefixes = [(len(chat.messages), False)]
        for i in wanted:
            if chat.messages[i].get("weight") != 0:
                prefixes += [(i, True), (i + 1, False)]
        return Asked(self._guarded(chat.messages), self._encoder.guard_all(chat.tools), prefixes)

    def layouts(self, chats: Sequence[Asked], train_on: str) -> list[Layout | Rejected]:
        """The pieces of every chat, or why it can't be used."""
        written = self._template.render_rows(chats)
        usable = [(chat, texts) for chat, texts in zip(chats, written, strict=True) if not isinstance(texts, Rejected)]
        losses = iter(self._survey.of([chat for chat, _ in usable], [texts for _, texts in usable]))
        layouts: list[Layout | Rejected] = []
        for texts in written:
            if isinstance(texts, Rejected):
                layouts.append(texts)
                continue
            loss = next(losses)
            layout = Rejected(loss.refused) if loss.refused else self._layout(texts, train_on, loss.fields)
            layouts.append(layout)
        return layouts

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        """The text that the model is given to answer `messages`. Raises Rejected."""
        guarded = self._encoder.guard_all(tools)
        return self._frame.opened(self._template.render(self._guarded(messages), guarded, generation_prompt=True))

    def _layout(self, texts: list[str | Rejected], train_on: str, left_out: tuple[str, ...]) -> Layout:
        full = self._frame.whole(str(texts[0]))
        if train_on == "all":
            return Layout([Piece(full, None)], left_out=left_out)
        borders: list[tuple[int, int | None]] = [(0, 0)]
        untrained = 0
        for prompt, upto in zip(texts[1::2], texts[2::2], strict=True):
            answer = self._answer(prompt, upto, full)
            if answer is None or answer[0] < borders[-1][0]:
                untrained += 1
                continue
            begin, end, controls = answer
            # Cut in front of the answer only: behind it a token may swallow the whitespace that follows (rstrip).
            borders += [(begin, controls)] if controls else [(begin, None), (end, 0)]
        ends = [begin for begin, _ in borders[1:]] + [len(full)]
        pieces = [Piece(full[begin:end], trained) for (begin, trained), end in zip(borders, ends, strict=True)]
        return Layout(pieces, untrained_turns=untrained, left_out=left_out)

    def _answer(self, prompt: str | Rejected, upto: str | Rejected, full: str) -> tuple[int, int, int] | None:
        if isinstance(prompt, Rejected) or isinstance(upto, Rejected):
            return None  # the template refuses to begin with an answer, or to end there
        return find_answer(self._frame.opened(prompt), self._frame.whole(upto), full, self._encoder.controls)

    def _find_end_of_turn(self, texts: list[str | Rejected]) -> str:
        """The control token that ends an answer; empty where there is none."""
        upto, prompt = texts[:2]
        answer = self._answer(prompt, upto, self._frame.whole(str(upto)))
        if answer is None or not answer[2]:
            return ""
        return self._encoder.controls(str(upto)[answer[0] : answer[1]])[-1][0]

    def _guarded(self, messages: Sequence[Message]) -> list[Message]:
        guarded = []
        for message in messages:
            fields = {key: value for key, value in message.items() if key != "weight"}
            if self._calls_as_text and "tool_calls" in fields:
                fields["tool_calls"] = [_with_text(call) for call in fields["tool_calls"]]
            guarded.append({key: self._encoder.guard_all(value) for key, value in fields.items()})
        return guarded


def _call(arguments: Any) -> Asked:
    """A trial of how a template takes the arguments of a tool call."""
    function = {"name": "qzname", "arguments": arguments}
    parameters = {"type": "object", "properties": {"qzkey": {"type": "string", "description": "qz"}}}
    tool = {"type": "function", "function": {"name": "qzname", "description": "qz", "parameters": parameters}}
    call = {"id": "qzcall123", "type": "function", "function": function}
    messages = [{"role": "user", "content": "qz"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return Asked(messages, [tool], [(2, False)])


def _is_json(texts: list[str | Rejected] | Rejected) -> bool:
    return not isinstance(texts, Rejected) and str(ARGUMENTS) not in str(texts[0])


def _with_text(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_text(call["function"])}
    if isinstance(call.get("arguments"), dict):
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return call


def template_source(tokenizer: Any, template: str | None, encoder: Encoder) -> str | None:
    """The text of the tokenizer's own template (None), of ChatML, or of a .jinja file. Raises InputError."""
    if template is None:
        own = tokenizer.chat_template
        return own.get("default") if isinstance(own, dict) else own
    if template == "chatml":
        # A base without ChatML's tokens has no trained embedding to spare; its eos can end a turn, and is known.
        known = encoder.controls("<|im_end|>")
        return CHATML if known else CHATML.replace("'<|im_end|>'", "eos_token")
    path = Path(template)
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise InputError(f"data.template: {template!r} is neither chatml nor a .jinja file", fix=NO_TEMPLATE)
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MAX_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.template: {template}: {error}") from None
