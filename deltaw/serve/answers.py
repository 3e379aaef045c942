"""What a client is sent: pieces of answers -> OpenAI's objects, whole or chunk by chunk.

Two forms, `Chat` and `Text`, each with the same four makers: `opened` (a stream's first chunk of an answer), `chunk`,
`choice` (a whole answer), and the names of its objects. What both share (id, time, model, usage) is put around it by
`Form`. Counts are of tokens that were made, those of a stop text too.

`system_fingerprint` is the base's and, behind it, that of the adapter's files: it changes when either does.
"""

import abc
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from string import ascii_letters, digits
from typing import Any, ClassVar

from deltaw.data.tool_calls import CallSplitter, Read, ToolCall
from deltaw.serve.ask import Piece
from deltaw.serve.tokens import Tokens
from deltaw.serve.tools import Calling

LOWEST = -9999.0  # in place of -inf, which JSON doesn't have


@dataclass
class Whole:
    """An answer as it comes together: its pieces, and the text of all of them. `splitter`: what finds the calls in it,
    where there may be any."""

    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    splitter: CallSplitter | None = None

    def add(self, piece: Piece) -> None:
        """One more."""
        self.text += piece.text
        self.pieces.append(piece)

    @property
    def finish(self) -> str | None:
        """How it ended."""
        return self.pieces[-1].finish if self.pieces else None


def usage(prompt: int, generated: int) -> dict[str, int]:
    """How many tokens it took."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


@dataclass
class Form(abc.ABC):
    """One request's answer. `logprobs`: whether they were asked for; `usage`: whether every chunk of a stream says that
    the count comes last."""

    model: str
    fingerprint: str
    tokens: Tokens
    logprobs: bool = False
    usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    prefix: ClassVar[str]
    whole: ClassVar[str]
    part: ClassVar[str]

    def envelope(self, choices: Sequence[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        """Choices with what stands around them."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.part if stream else self.whole,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            "system_fingerprint": self.fingerprint,
            **({"usage": None} if stream and self.usage else {}),
        }

    def counted(self, prompt: int, generated: int) -> dict[str, Any]:
        """A stream's last chunk."""
        return {**self.envelope([], stream=True), "usage": usage(prompt, generated)}

    def opened(self, index: int) -> dict[str, Any] | None:
        """The first choice of a stream's answer, if there is one."""
        return None

    def begun(self) -> Whole:
        """An answer of which nothing has come."""
        return Whole()

    @abc.abstractmethod
    def chunk(self, index: int, piece: Piece, before: Whole) -> list[dict[str, Any]]:
        """The choices of a stream for one piece. `before`: the answer up to it."""

    @abc.abstractmethod
    def choice(self, index: int, answer: Whole) -> dict[str, Any]:
        """A whole answer."""


@dataclass
class Chat(Form):
    """Of `/v1/chat/completions`. `calling`: the calls of tools that an answer may have."""

    calling: Calling | None = None

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opened(self, index: int) -> dict[str, Any]:
        return self._delta(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, piece: Piece, before: Whole) -> list[dict[str, Any]]:
        parts: Read = [piece.text]
        told = 0  # calls
        if before.splitter is not None:
            told = before.splitter.count
            parts = [*before.splitter.push(piece.text), *(before.splitter.end() if piece.finish else ())] or [""]
        if parts == [""] and not (piece.tokens and (self.logprobs or before.splitter is None)):
            parts = []
        choices = []
        for part in parts:
            if isinstance(part, str):
                delta: dict[str, Any] = {"content": part}
            else:
                delta = {"tool_calls": [{"index": told, **_call(part)}]}
                told += 1
            choices.append(self._delta(index, delta))
        if choices:
            choices[0]["logprobs"] = self._logprobs([piece])
        if piece.finish:
            choices.append({**self._delta(index, {}), "finish_reason": _finish(piece.finish, before)})
        return choices

    def choice(self, index: int, answer: Whole) -> dict[str, Any]:
        parts: Read = [answer.text]
        if answer.splitter is not None:
            parts = [*answer.splitter.push(answer.text), *answer.splitter.end()]
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [_call(part) for part in parts if isinstance(part, ToolCall)]
        content = {"content": text or None, "tool_calls": calls} if calls else {"content": text}
        return {
            "index": index,
            "message": {"role": "assistant", "refusal": None, **content},
            "logprobs": self._logprobs(answer.pieces),
            "finish_reason": _finish(answer.finish, answer),
        }

    def begun(self) -> Whole:
        return Whole(splitter=self.calling.splitter() if self.calling else None)

    def _delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = []
        for piece in pieces:
            for id, likely in zip(piece.tokens, piece.logprobs or (), strict=True):
                own = self._token(id, likely.token if likely else LOWEST)
                content.append(
                    {**own, "top_logprobs": [self._token(*other) for other in (likely.top if likely else ())]}
                )
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        shown = self.tokens.of(id)
        return {"token": shown.text, "logprob": finite(logprob), "bytes": shown.bytes}


class Text(Form):
    """Of `/v1/completions`."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def chunk(self, index: int, piece: Piece, before: Whole) -> list[dict[str, Any]]:
        if not (piece.text or piece.tokens or piece.finish):
            return []
        return [self._choice(index, piece.text, [piece], len(before.text), piece.finish)]

    def choice(self, index: int, answer: Whole) -> dict[str, Any]:
        return self._choice(index, answer.text, answer.pieces, 0, answer.finish)

    def _choice(self, index: int, text: str, pieces: Sequence[Piece], begin: int, finish: str | None) -> dict[str, Any]:
        shown = Listed()
        for piece in pieces if self.logprobs else ():
            self._list(piece, begin, shown)
            begin += len(piece.text)
        return {
            "index": index,
            "text": text,
            "logprobs": asdict(shown) if self.logprobs else None,
            "finish_reason": finish,
        }

    def _list(self, piece: Piece, begin: int, shown: "Listed") -> None:
        """Of two likely tokens of one text (two halves of characters, say) the likelier stays, for `top_logprobs` is an
        object; the token itself is always in it, as in OpenAI's."""
        end = begin + len(piece.text)
        for id, likely in zip(piece.tokens, piece.logprobs or (), strict=True):
            token = self.tokens.of(id)
            shown.tokens.append(token.text)
            shown.text_offset.append(min(begin, end))
            begin += token.width
            shown.token_logprobs.append(None if likely is None else finite(likely.token))
            top: dict[str, float] | None = None if likely is None else {}
            if likely is not None and top is not None:
                for other, logprob in (*likely.top, (id, likely.token)):
                    top.setdefault(self.tokens.of(other).text, finite(logprob))
            shown.top_logprobs.append(top)


@dataclass
class Listed:
    """A completion's logprobs: lists side by side, under OpenAI's names. The offsets are those of each token's text in
    the answer's."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)


def _call(call: ToolCall) -> dict[str, Any]:
    """A call, with an id that every template takes (Mistral's want nine letters and digits)."""
    id = "".join(secrets.choice(ascii_letters + digits) for _ in range(9))
    return {"id": id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finish(finish: str | None, answer: Whole) -> str | None:
    """How an answer ends, as it is told: one that is cut short is `length` whatever was called before."""
    splitter = answer.splitter
    called = splitter is not None and splitter.count > 0 and (splitter.over or finish == "stop")
    return "tool_calls" if called else finish


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return max(logprob, LOWEST) if logprob == logprob else LOWEST
