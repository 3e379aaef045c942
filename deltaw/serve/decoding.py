"""The requests that are being answered, and the engine that decodes their rows.

What goes wrong with a request ends it alone: an adapter that doesn't fit, logits that aren't finite, a schema within
which it can't go on. What goes wrong with the engine ends all that run, and the next begin with a new one. A new one is
made, too, when the model's layers have changed (adapters.py), which only happens while nothing runs.

Every request is counted once at its end, however it ends, with the time from its arrival: so in the figures the first
tokens never took longer than the requests that they belong to.
"""

import time
from collections.abc import Collection
from functools import partial

from deltaw.errors import DeltawError, RunError, with_kind
from deltaw.generate.engine import Engine
from deltaw.generate.sampling import RowsFailed
from deltaw.model import Model
from deltaw.serve.adapters import Adapters
from deltaw.serve.answering import Answering
from deltaw.serve.outbox import Outbox
from deltaw.serve.running import Running

SMOOTH = 0.1  # the share of the last request in how long one takes


class Decoding:
    """Belongs to the worker's thread. `places`: how many rows are decoded at a time; `over`: how many requests have
    ended; `seconds`: how long one takes, smoothed."""

    def __init__(self, model: Model, adapters: Adapters, places: int, outbox: Outbox) -> None:
        self.model, self.adapters, self.places = model, adapters, places
        self.running: list[Running] = []
        self.over, self.seconds = 0, 0.0
        self.engine: Engine | None = None
        self.by_row: dict[int, Running] = {}
        self._outbox, self._figures = outbox, adapters.figures
        self._layers = -1
        self._reused = 0  # tokens of prompts, by engines before this one

    @property
    def reused(self) -> int:
        """Tokens of prompts that weren't run, since they had been for an earlier request."""
        return self._reused + (self.engine.reused if self.engine else 0)

    def rows_of_clients(self) -> dict[str, int]:
        """How many rows are decoded for each."""
        taken: dict[str, int] = {}
        for running in self.running:
            client = running.answering.client
            taken[client] = taken.get(client, 0) + len(running.ids)
        return taken

    def current_engine(self) -> Engine:
        """A new one where the model's layers have changed; nothing runs then."""
        if self.engine is None or self._layers != self.adapters.changes:
            self._forget()
            self.engine, self._layers = Engine(self.model.base.model, batch_size=self.places), self.adapters.changes
        return self.engine

    def begin(self, answering: Answering) -> None:
        """Raises Later, or what is wrong with the request."""
        ask = answering.ask
        taken = self.adapters.take(ask.adapter, ask.scale)
        try:
            engine, decode = self.current_engine(), partial(self.model.renderer.decode, shown=ask.shown)
            room = min(ask.sampling.max_new_tokens, self.model.context - len(ask.prompt)) if ask.answer else 0
            running = Running(answering, taken, decode, room=room)
            for index in range(ask.n if ask.answer else 1):  # one runs a prompt that is all that is wanted
                id = engine.add(
                    ask.prompt,
                    ask.sampling,
                    self.model.renderer.stop_ids if ask.stop_ids is None else ask.stop_ids,
                    number=index,
                    update=taken.number,
                    key=taken.key,
                    logprobs=ask.logprobs,
                    bias=ask.bias,
                    guide=ask.grammar.begin() if ask.grammar else None,
                    scored=ask.logprobs if ask.echo and index == 0 else None,
                    answer=ask.answer,
                )
                running.ids[id] = index
        except BaseException:
            self.adapters.release(taken)
            raise
        served = None if taken.version is None else taken.version.served
        self._figures.prompt_tokens += len(ask.prompt)
        self.running.append(running)
        self.by_row |= dict.fromkeys(running.ids, running)
        self._outbox.tell(answering.loop, lambda: answering.begin(served))

    def step(self) -> None:
        """One token of each row."""
        if self.engine is None or not self.running:
            return
        try:
            events = self.engine.step()
        except RowsFailed as error:
            for running in {self.by_row[id] for id in error.rows if id in self.by_row}:
                self._end(running, "error", error)
            return
        except Exception as error:
            self._restart(error)
            return
        now = time.monotonic()
        for event in events:
            owner = self.by_row.get(event.id)
            if owner is None:  # of a row that has just been cancelled
                continue
            if owner.take(event, now, self._figures):
                self.engine.cancel(event.id)
            if event.id not in owner.ids:
                del self.by_row[event.id]
        for running in list(self.running):
            if not running.ids:
                self._end(running, running.finish)
            elif running.told and (running.pieces or running.new):
                self._hand_over(running)

    def let_go(self, left: Collection[Answering]) -> None:
        """Of those whose clients have left."""
        for running in [running for running in self.running if running.answering in left]:
            self._end(running, "cancelled")

    def end_all(self, error: BaseException) -> None:
        """Those that run."""
        for running in list(self.running):
            self._end(running, "error", error)

    def ended(self, answering: Answering, how: str, error: BaseException | None = None) -> None:
        """Count a request that ends, and tell whoever waits for it."""
        self.over += 1
        self._figures.ended[how] = self._figures.ended.get(how, 0) + 1
        self._figures.latency.observe(time.monotonic() - answering.submitted)
        self._outbox.tell(answering.loop, lambda: answering.end(error))

    def _restart(self, error: Exception) -> None:
        """The engine has failed."""
        self._figures.restarts += 1
        self._forget()
        self.end_all(error if isinstance(error, DeltawError) else RunError(f"decoding failed: {with_kind(error)}"))

    def _forget(self) -> None:
        """The engine, with all that it keeps."""
        self._reused, self.engine = self.reused, None

    def _end(self, running: Running, how: str, error: BaseException | None = None) -> None:
        """Of one request: its rows, its hold on the adapter, its place."""
        for id in running.ids:
            self.by_row.pop(id, None)
            if self.engine is not None:
                self.engine.cancel(id)
        self.running.remove(running)
        self._hand_over(running)
        if how in ("stop", "length"):
            seconds = time.monotonic() - running.begun
            self.seconds += (seconds - self.seconds) * (SMOOTH if self.seconds else 1.0)
        self.adapters.release(running.taken)
        self.ended(running.answering, how, error)

    def _hand_over(self, running: Running) -> None:
        pieces, new, answering = running.pieces, running.new, running.answering
        running.pieces, running.new = [], 0
        self._outbox.tell(answering.loop, lambda: answering.take(pieces, new))
