"""What a client is sent: pieces of answers -> OpenAI's objects, whole or chunk by chunk.

Two forms, `Chat` and `Text`, each with the same four makers: `opened` (a stream's first chunk of an answer), `chunk`,
`choice` (a whole answer), and the names of its objects. What both share (id, time, model, usage) is put around it by
`Form`. Counts are of tokens that were made, those of a stop text too.

`system_fingerprint` is the base's and, behind it, that of the adapter's files: it changes when either does.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from deltaw.serve.ask import Piece
from deltaw.serve.tokens import Tokens

if TYPE_CHECKING:
    from deltaw.generate.engine import Logprobs

LOWEST = -9999.0  # in place of -inf, which JSON doesn't have


@dataclass
class Whole:
    """An answer as it comes together."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: "list[Logprobs | None]" = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        """A piece more."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs or ()
        self.finish = piece.finish or self.finish


def usage(prompt: int, generated: int) -> dict[str, int]:
    """How many tokens it took."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


@dataclass
class Form:
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

    def chunk(self, index: int, piece: Piece, before: Whole) -> list[dict[str, Any]]:
        """The choices of a stream for one piece. `before`: the answer up to it."""
        raise NotImplementedError

    def choice(self, index: int, answer: Whole) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError


class Chat(Form):
    """Of `/v1/chat/completions`."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opened(self, index: int) -> dict[str, Any]:
        return self._delta(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, piece: Piece, before: Whole) -> list[dict[str, Any]]:
        choices = []
        if piece.text or piece.tokens:
            shown = self._logprobs(piece.tokens, piece.logprobs or ())
            choices.append({**self._delta(index, {"content": piece.text}), "logprobs": shown})
        if piece.finish:
            choices.append({**self._delta(index, {}), "finish_reason": piece.finish})
        return choices

    def choice(self, index: int, answer: Whole) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.tokens, answer.logprobs),
            "finish_reason": answer.finish,
        }

    def _delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, ids: Sequence[int], logprobs: "Sequence[Logprobs | None]") -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = []
        for id, likely in zip(ids, logprobs, strict=True):
            top = likely.top if likely else ()
            own = self._token(id, likely.token if likely else LOWEST)
            content.append({**own, "top_logprobs": [self._token(*other) for other in top]})
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
        return [self._choice(index, piece.text, piece.tokens, piece.logprobs or (), piece.finish, before)]

    def choice(self, index: int, answer: Whole) -> dict[str, Any]:
        return self._choice(index, answer.text, answer.tokens, answer.logprobs, answer.finish, Whole())

    def _choice(
        self,
        index: int,
        text: str,
        ids: Sequence[int],
        logprobs: "Sequence[Logprobs | None]",
        finish: str | None,
        before: Whole,
    ) -> dict[str, Any]:
        shown = self._logprobs(ids, logprobs, len(before.text)) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": finish}

    def _logprobs(self, ids: Sequence[int], logprobs: "Sequence[Logprobs | None]", offset: int) -> dict[str, Any]:
        """Lists side by side. Of two likely tokens of one text (two halves of characters, say) the likelier stays, for
        `top_logprobs` is an object; the token itself is always in it, as in OpenAI's."""
        tokens: list[str] = []
        own: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for id, likely in zip(ids, logprobs, strict=True):
            text = self.tokens.of(id).text
            tokens.append(text)
            offsets.append(offset)
            offset += len(text)
            own.append(None if likely is None else finite(likely.token))
            if likely is None:
                top.append(None)
                continue
            shown: dict[str, float] = {}
            for other, logprob in likely.top:
                shown.setdefault(self.tokens.of(other).text, finite(logprob))
            shown.setdefault(text, finite(likely.token))
            top.append(shown)
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return max(logprob, LOWEST) if logprob == logprob else LOWEST
