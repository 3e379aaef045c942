"""The text of an answer while its tokens come: half characters, and texts at which it stops.

A token's text depends on its neighbours: a space in front of the first word goes, and a character may be spread over
several tokens, whose first ones decode to U+FFFD. So each new token is decoded behind those before it, from the last
ones whose text stood, and what they had is left away. That costs the same for the thousandth token as for the first;
decoding the whole answer for each would not.

A stop text may begin in one token and end in another. What could be its beginning is kept back until more is known.
The stop that is complete first counts, and of two that end at one place the longer one, so the answer doesn't depend
on how its text came in pieces; nothing from the beginning of it on is sent.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from deltaw.generate.logprobs import Logprobs

HALF = "\N{REPLACEMENT CHARACTER}"
LONGEST = 64  # tokens that are waited for: what is longer is bytes that make no text


class Decoder:
    """Token by token, the text that is added. `decode`: what ids mean together."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # from the last ones whose text stood
        self._stood = 0  # how many of them these are

    def push(self, token: int) -> str:
        """What the text is longer by; empty where a character isn't whole yet."""
        self._ids.append(token)
        new = self._new()
        if new.endswith(HALF) and len(self._ids) - self._stood < LONGEST:
            return ""
        if new:
            self._ids = self._ids[self._stood :]
        self._stood = len(self._ids)
        return new

    def rest(self) -> str:
        """What is left when no more comes: half characters as they are."""
        new, self._stood = self._new(), len(self._ids)
        return new

    def _new(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._stood])) :]


class Stops:
    """Text in pieces, cut at the first of some stop texts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._kept = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be sent now. Nothing more comes once it has `stopped`."""
        if self.stopped:
            return ""
        text = self._kept + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._kept = True, ""
            return text[: min(ends)[1]]
        longest = max(map(len, self._stops), default=1) - 1
        kept = next((k for k in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-k:])), 0)
        self._kept = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was kept back, when no more comes."""
        kept, self._kept = self._kept, ""
        return kept

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


class Part(NamedTuple):
    """Text that may be sent, and the tokens that it is made of with what was told of them."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: "tuple[Logprobs | None, ...]" = ()


class Text:
    """One answer. `tokens`: how many have come; `stopped`: at a stop text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decoder, self._stops = Decoder(decode), Stops(stops)
        self._kept: deque[tuple[int, int, Logprobs | None]] = deque()  # where a token's text begins, and the token
        self._decoded = self._sent = self.tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._stops.stopped

    def push(self, token: int, logprobs: "Logprobs | None" = None) -> Part:
        """What may be sent now."""
        self.tokens += 1
        self._kept.append((self._decoded, token, logprobs))
        return self._part(self._decoder.push(token))

    def end(self) -> Part:
        """All that was kept back, when no more tokens come."""
        part = self._part(self._decoder.rest())
        if self.stopped:
            return part
        rest, kept = self._stops.rest(), list(self._kept)
        self._kept.clear()
        tokens = (*part.tokens, *(token for _, token, _ in kept))
        return Part(part.text + rest, tokens, (*part.logprobs, *(logprobs for _, _, logprobs in kept)))

    def _part(self, new: str) -> Part:
        self._decoded += len(new)
        text = self._stops.push(new)
        self._sent += len(text)
        out = []
        while self._kept and self._kept[0][0] < self._sent:
            out.append(self._kept.popleft())
        if self.stopped:
            self._kept.clear()
        return Part(text, tuple(token for _, token, _ in out), tuple(logprobs for _, _, logprobs in out))
