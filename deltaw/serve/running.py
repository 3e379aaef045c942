"""A request whose rows are being decoded: from the engine's events to the pieces of its answers."""

import time
from collections.abc import Callable, Sequence

from deltaw.generate.engine import Event
from deltaw.generate.logprobs import Logprobs
from deltaw.serve.answering import Answering
from deltaw.serve.ask import Finish, Piece
from deltaw.serve.figures import Figures
from deltaw.serve.text import Part, Text
from deltaw.serve.version import Taken


class Running:
    """One request. `ids`: its rows that aren't at their end, and which of its answers each is. `room`: the most tokens
    of an answer; one that has as many was cut short. Times are those of the monotonic clock."""

    def __init__(
        self,
        answering: Answering,
        taken: Taken,
        decode: Callable[[Sequence[int]], str],
        *,
        room: int,
    ) -> None:
        self.answering, self.ask, self.taken = answering, answering.ask, taken
        self.ids: dict[int, int] = {}
        self.pieces: list[Piece] = []  # not handed over yet
        self.new = 0  # and how many tokens were made meanwhile
        self.begun, self.finish = time.monotonic(), ""
        self._decode, self._room = decode, room
        self._texts = [Text(decode, self.ask.stop) for _ in range(self.ask.n)]
        self._last: dict[int, float] = {}
        self._awaited = self.ask.echo and self.ask.logprobs is not None
        if self.ask.echo and not self._awaited:
            self._echo(None)

    @property
    def told(self) -> bool:
        """Whether pieces may be handed over: none goes before the prompt, which may wait for what is said of it."""
        return not self._awaited

    def take(self, event: Event, now: float, figures: Figures) -> bool:
        """A token of one of its rows, or the row's end. Whether the row is to be cancelled: a stop text has come."""
        index = self.ids[event.id]
        text = self._texts[index]
        if event.prompt is not None:
            self._echo((None, *event.prompt))
        if event.token is None:
            self._end(event.id, text.end(), "length" if text.tokens == self._room else "stop")
            return False
        self._count(index, now, figures)
        part = text.push(event.token, event.logprobs)
        if text.stopped:
            self._end(event.id, part, "stop")
            return True
        if part.text or part.tokens:
            self._add(index, part)
        return False

    def _echo(self, logprobs: tuple[Logprobs | None, ...] | None) -> None:
        """The prompt, at the head of each answer, with what the model says of its tokens."""
        text = self._decode(self.ask.prompt)
        echoed = [Piece(index, text, self.ask.prompt, logprobs, echoed=True) for index in range(self.ask.n)]
        self.pieces, self._awaited = [*echoed, *self.pieces], False

    def _end(self, id: int, part: Part, finish: Finish) -> None:
        self.finish, index = finish, self.ids.pop(id)
        for each in (index,) if self.ask.answer else range(self.ask.n):  # one row runs a prompt for all of them
            self._add(each, part, finish)

    def _add(self, index: int, part: Part, finish: Finish | None = None) -> None:
        self.pieces.append(Piece(index, part.text, part.tokens, self._told(part.logprobs), finish))

    def _told(self, logprobs: tuple[Logprobs | None, ...]) -> tuple[Logprobs | None, ...] | None:
        return None if self.ask.logprobs is None else logprobs

    def _count(self, index: int, now: float, figures: Figures) -> None:
        self.new += 1
        figures.generation_tokens += 1
        if index in self._last:
            figures.inter_token.observe(now - self._last[index])
        elif not self._last:
            figures.time_to_first_token.observe(now - self.answering.submitted)
        self._last[index] = now
