"""Token ids -> token ids: an engine that decodes rows side by side, which come and go while others go on.

    engine = Engine(model)
    id = engine.add(prompt, Sampling(), stop_ids)
    while engine.busy:
        for event in engine.step():     # a row's new token, or None at its end
            …

`answers` for many prompts and `stream` for one are its clients. Each prompt gets what it gets alone, whatever its
company; greedy decoding may differ where two tokens nearly tie, since the kernels round differently for another number
of rows, and sampling draws from a generator per prompt (sampling.py).

A `Cache` knows what the model keeps of a row's tokens (cache.py). There are two, and which one a row goes to
is found by trying the model: slots of our own, where attention stands in (slots.py), and batches on transformers' own
caches (batches.py), also for a row that goes beyond the border of rotary frequencies that a model keeps changing.

A step runs every row's last token and then, where there is room, the prompts of those that join, or a piece of them
where they are long (filling.py): between two pieces every row that goes on gets its token. Rows join in the order they
came, all of them where enough places are free, else when an eighth of all places are (in batches, which become passes
of their own, when all are: refilling at half took 6 % longer). But where a place has been free for eight steps (64 in
batches) rows join at once: while others write long answers the next place might not be free for minutes, and a pass
more in eight steps is hardly felt. `TOKENS_AT_ONCE` bounds what all of them may come to hold.

transformers' own `model.generate` was the first choice, and measured: it took as long as a plain loop over `forward`
(5.8 s against 5.5 s for 64 prompts of 32 new tokens on SmolLM2-135M, 2 cores), but it keeps finished rows until the
last one ends, copies the head (see `State`), and mixes the checkpoint's generation_config (a temperature, a
repetition penalty) into what was asked for.

Letters: R rows, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltaw.base.recorded import recorder_on
from deltaw.errors import InputError, RunError
from deltaw.generate.batches import Batches
from deltaw.generate.cache import Cache, Row, context, evaluating
from deltaw.generate.captured import say
from deltaw.generate.check import NO_BIAS, check
from deltaw.generate.grammar import Guide
from deltaw.generate.logprobs import Logprobs, logprobs_of, score
from deltaw.generate.sampling import NotFinite, RowsFailed, Sampling, choose
from deltaw.generate.slots import Slots
from deltaw.generate.together import come_to_rest
from deltaw.kernels.copies import making
from deltaw.kernels.graphs import Record
from deltaw.show.progress import Progress, unseen

TOKENS_AT_ONCE = 65_536  # of all rows together: bounds the cache (4 GB for an 8B model), whatever batch_size says
ALL_AT_ONCE = 4096  # tokens of prompts in a step where only the end counts


class Event(NamedTuple):
    """A row's next token, with what was asked to be told of it; or None, once, after its last one. `stop`: the stop
    token that ended it, of which the same is told. `prompt`: in its first event, what was asked to be told of the
    prompt's tokens but the first."""

    id: int
    token: int | None
    logprobs: Logprobs | None = None
    stop: int | None = None
    prompt: tuple[Logprobs, ...] | None = None


class Engine:
    """Decodes up to `batch_size` rows at a time. Modes and gradients are set for each step: what the caller does in
    between is its own. `piece` is the most tokens of prompts in a step; None: as few as cost no more for it, so that no
    row waits long for its next token. `copies`: steps make copies of matrices that are read faster (kernels/copies.py);
    without, where its caller has them made. `record`: how steps are recorded (generate/captured.py); None: as graphs
    on a GPU. `close` it when rows may be left. Raises InputError for a batch size below 1."""

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int = 128,
        piece: int | None = None,
        copies: bool = False,
        record: Record | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        self.model, self.batch_size, self.copies = model, batch_size, copies
        self._device = next(model.parameters()).device
        with evaluating(model):
            record = record or recorder_on(self._device)
            self._slots = Slots(model, piece, record=record) if Slots.hold(model) else None
        if record is not None and (self._slots is None or self._slots.captured is None):
            say("its rows can't be in slots" if self._slots is None else "its weights come and go")
        self._batches = Batches(model, alone=batch_size == 1, beyond=self._slots is not None)
        self._waiting: list[Row] = []
        self._live: dict[Row, Cache] = {}
        self._events: list[Event] = []
        self._scores: dict[Row, Sequence[Logprobs]] = {}  # of prompts whose own passes didn't tell them
        self._added = self._free_for = 0  # steps for which a place has been free that a row waits for
        self._modules: list[nn.Module] = []

    @property
    def busy(self) -> bool:
        """Whether rows wait or are being decoded."""
        return bool(self._waiting or self._live or self._events)

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        stop_ids: AbstractSet[int] = frozenset(),
        *,
        number: int = 0,
        update: int | None = None,
        key: bytes = b"",
        logprobs: int | None = None,
        tempered: bool = False,
        bias: Mapping[int, float] = NO_BIAS,
        guide: Guide | None = None,
        scored: int | None = None,
        answer: bool = True,
    ) -> int:
        """Have a prompt decoded from the next step on. Its id, by which its tokens come.

        number:   which of its caller's prompts it is, named in errors and, with the seed, in what it draws
        update:   which of the layers' updates it takes (`Attached.number`), `BASE` for the base alone; None is the
                  first, and then for all rows
        key:      what that update is, by content (a hash of the adapter and its scale): rows of one key and one
                  beginning share its keys and values; b"" shares nothing
        logprobs: how many of the likeliest tokens to tell beside each new one; 0: its log-probability alone
        tempered: they are of the distribution at the sampling's temperature, and not of the model's own
        bias:     what is added to the logits of some tokens before one is chosen; `logprobs` doesn't show it
        scored:   how many of the likeliest tokens to tell beside each of the prompt's own; None: nothing of them
        answer:   whether a token is wanted; without, the row ends where its prompt does, which may fill the context
        guide:    which tokens may come next (grammar.py); `logprobs` doesn't show it either

        Raises InputError for an empty prompt, one that fills the model's context, or an id outside its vocabulary;
        ValueError where only some of the rows name their update.
        """
        check(self.model, prompt, number, bias, full=not answer)
        room = min(sampling.max_new_tokens, context(self.model) - len(prompt)) if answer else 0
        if any((row.update is None) != (update is None) for row in (*self._waiting[-1:], *self._live)):
            raise ValueError("either all rows of an engine name their update, or none do")
        heat = sampling.temperature if tempered and sampling.temperature > 0 else 1.0
        row = Row(
            self._added,
            tuple(prompt),
            sampling,
            stop_ids,
            number,
            room,
            update,
            key,
            logprobs,
            bias,
            guide,
            scored,
            heat,
        )
        self._added += 1
        self._waiting.append(row)
        return row.id

    def step(self) -> list[Event]:
        """The next token of every row that has a place, and None after a row's last one. The stop token that ended a
        row is left out.

        Raises RowsFailed where the model gives no logits (NotFinite) or a guide no token; what came before is in the
        next step's, and the rows whose ids it has may be cancelled.
        """
        if self._waiting or not self._modules:  # looking for them is felt in a step of one token
            self._modules = list(self.model.modules())
        copies = making() if self.copies else contextlib.nullcontext()  # as its caller has it
        with evaluating(self.model, self._modules), copies:
            for cache in set(self._live.values()):
                for rows, logits_RV in cache.steps():
                    self._go_on(rows, logits_RV)
            while joining := self._joining():
                cache, rows = joining
                if cache is self._batches:
                    asked = {row: row.scored for row in rows if row.scored is not None}
                    self._scores |= {row: self.score(row.prompt, update=row.update, top=n) for row, n in asked.items()}
                cache.join(rows)
                self._live |= dict.fromkeys(rows, cache)
                self._waiting = [row for row in self._waiting if row not in self._live]
                self._free_for = 0
            for cache in set(self._live.values()):
                for rows, logits_RV in cache.fill():
                    self._go_on(rows, logits_RV)
        self._free_for += bool(self._waiting) and len(self._live) < self.batch_size
        events, self._events = self._events, []
        return events

    def cancel(self, id: int) -> None:
        """Let go of a row: no more of its tokens come. Nothing for one that has ended."""
        self._waiting = [row for row in self._waiting if row.id != id]
        self._events = [event for event in self._events if event.id != id]
        with torch.inference_mode():
            for row in [row for row in self._live if row.id == id]:
                self._scores.pop(row, None)
                self._live.pop(row).leave(row)

    def score(self, prompt: Sequence[int], *, update: int | None = None, top: int = 0) -> list[Logprobs]:
        """What the model says of the prompt's tokens but the first, in one pass, and of the `top` likeliest in place of
        each. Rows that are being decoded wait for it. Raises InputError as `add` does."""
        check(self.model, prompt, 0, full=True)
        with evaluating(self.model):
            beyond = not self._batches.learn(len(prompt)) or self._batches.together.crosses(len(prompt))
            if beyond:  # frequencies that grow are everyone's
                come_to_rest(self.model)
            try:
                return score(self.model, prompt, update=update, top=top)
            finally:
                if beyond:
                    come_to_rest(self.model)

    def close(self) -> None:
        """Let go of all rows, and of what is kept of them."""
        for id in [row.id for row in (*self._waiting, *self._live)]:
            self.cancel(id)
        if self._slots:
            self._slots.clear()

    @property
    def keeps_beginnings(self) -> bool:
        """Whether rows of one key find what earlier ones have made of the tokens that they begin with."""
        return self._slots is not None

    @property
    def reused(self) -> int:
        """How many tokens of prompts weren't run, since they had been run for an earlier row of the same key."""
        return self._slots.prefixes.reused if self._slots else 0

    def _joining(self) -> tuple[Cache, list[Row]] | None:
        """The rows that join now and where, or None."""
        free = self.batch_size - len(self._live)
        window = self._waiting[:free]
        if not window or not self._batches.learn(max(row.reach for row in window)):
            return None
        crosses = self._batches.crosses(window[0])
        if self._live and (crosses or self._batches.crossing):
            return None  # frequencies that grow are everyone's
        cache: Cache = self._batches if crosses or self._slots is None else self._slots
        few = free < min(len(self._waiting), max(1, self.batch_size // cache.share))
        if few and self._free_for < cache.patience:
            return None
        if cache is self._slots:
            window = [row for row in window if not self._batches.crosses(row)]
        in_use = self._batches.tokens + (self._slots.tokens if self._slots else 0)
        rows = cache.first(window, TOKENS_AT_ONCE - in_use)
        return (cache, rows) if rows else None

    def _go_on(self, rows: Sequence[Row], logits_RV: Tensor) -> None:
        """Choose each row's next token, and let go of the rows that end with it, or of which no token is wanted."""
        tokens = self._chosen(rows, logits_RV)
        told = self._told(rows, logits_RV, tokens)
        for row, token in zip(rows, tokens, strict=True):
            ended = row.room > 0 and token in row.stop_ids
            prompt = None if row.new or row.scored is None else self._prompt(row)
            if row.room and not ended:
                if row.guide is not None:
                    row.guide.take(token)
                row.new.append(token)
                self._events.append(Event(row.id, token, told.get(row), prompt=prompt))
                prompt = None
            if ended or len(row.new) == row.room:
                said, stop = (told.get(row), token) if ended else (None, None)
                self._events.append(Event(row.id, None, said, stop, prompt))
                self._live.pop(row).leave(row)

    def _prompt(self, row: Row) -> tuple[Logprobs, ...]:
        """What is told of its prompt."""
        in_slots = self._slots.scores.pop(row, ()) if self._slots else ()
        return tuple(self._scores.pop(row, in_slots))

    def _chosen(self, rows: Sequence[Row], logits_RV: Tensor) -> list[int]:
        """The next token of each row, chosen at once for all that are sampled by one rule; those with a bias or a guide
        by themselves, since their logits are changed."""
        tokens = [0] * len(rows)
        by_rule: dict[tuple[object, bool], list[int]] = {}
        for at, row in enumerate(rows):
            by_rule.setdefault((row.sampling.rule, bool(row.bias) or row.guide is not None), []).append(at)
        for (_, changed), ats in by_rule.items():
            some = [rows[at] for at in ats]
            u_R = torch.tensor([row.u for row in some], device=self._device)
            part_RV = logits_RV if len(ats) == len(rows) and not changed else logits_RV[ats]
            if changed:
                _change(part_RV, some)
            try:
                ids_R = choose(part_RV, some[0].sampling, u_R, [row.number for row in some])
            except NotFinite as error:
                raise NotFinite(error.what, [some[at].id for at in error.rows]) from None
            for at, token in zip(ats, ids_R.tolist(), strict=True):
                tokens[at] = token
        return tokens

    @staticmethod
    def _told(rows: Sequence[Row], logits_RV: Tensor, tokens: Sequence[int]) -> dict[Row, Logprobs]:
        """What the model says of the new tokens, for the rows that ask."""
        ats = [at for at, row in enumerate(rows) if row.logprobs is not None]
        if not ats:
            return {}
        most = max(rows[at].logprobs or 0 for at in ats)
        asked_RV, heats = logits_RV[ats], [rows[at].heat for at in ats]
        if any(heat != 1 for heat in heats):
            wide = torch.promote_types(asked_RV.dtype, torch.float32)
            asked_RV = asked_RV.to(wide) / torch.tensor(heats, dtype=wide, device=asked_RV.device)[:, None]
        told = logprobs_of(asked_RV, [tokens[at] for at in ats], most)
        return {rows[at]: Logprobs(own, top[: rows[at].logprobs]) for at, (own, top) in zip(ats, told, strict=True)}


def _change(logits_RV: Tensor, rows: Sequence[Row]) -> None:
    """Add the rows' biases and forbid what their guides don't allow, in place. Raises RowsFailed."""
    for row, logits_V in zip(rows, logits_RV, strict=True):
        if row.bias:
            logits_V[list(row.bias)] += torch.tensor(list(row.bias.values())).to(logits_V)
        if row.guide is not None:
            try:
                allowed_V = row.guide.allowed(len(logits_V))
            except RunError as error:
                raise RowsFailed(error.what, [row.id], error.fix) from None
            logits_V.masked_fill_(~allowed_V.to(logits_V.device), -torch.inf)


def answers(
    model: nn.Module,
    prompts: Mapping[int, Sequence[int]],
    sampling: Sampling,
    stop_ids: AbstractSet[int],
    *,
    batch_size: int = 128,
) -> Iterator[dict[int, list[int]]]:
    """The new tokens of the prompts that end with a step, by number; the stop token that ended one is left out.

    `prompts` by number, by which errors name them and by which, with the seed, they draw. Raises InputError for an
    empty prompt, one that fills the model's context, or an id outside its vocabulary.
    """
    for number, prompt in prompts.items():
        check(model, prompt, number)
    # Nobody waits for single tokens: rows that begin together are fewer steps.
    engine = Engine(model, batch_size=min(batch_size, max(1, len(prompts))), piece=ALL_AT_ONCE)
    new: dict[int, list[int]] = {number: [] for number in prompts}
    # The longest first, so that rows that are padded are of like length.
    order = sorted(prompts, key=lambda number: len(prompts[number]), reverse=True)
    number_of = {engine.add(prompts[number], sampling, stop_ids, number=number): number for number in order}
    try:
        while engine.busy:
            events = engine.step()
            for event in events:
                if event.token is not None:
                    new[number_of[event.id]].append(event.token)
            if ended := [number_of[event.id] for event in events if event.token is None]:
                yield {number: new.pop(number) for number in ended}
    finally:
        engine.close()


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: AbstractSet[int],
    *,
    batch_size: int = 128,
    progress: Progress = unseen,
) -> list[list[int]]:
    """The new tokens of every prompt, in the order of `prompts`. `progress` is called with the number of finished
    prompts whenever there are more. Raises InputError as `answers` does."""
    new: dict[int, list[int]] = {}
    for ended in answers(model, dict(enumerate(prompts)), sampling, stop_ids, batch_size=batch_size):
        new |= ended
        progress(len(new))
    return [new[number] for number in range(len(prompts))]


def stream(model: nn.Module, prompt: Sequence[int], sampling: Sampling, stop_ids: AbstractSet[int]) -> Iterator[int]:
    """The new tokens of one prompt, each as soon as it is known. Closing the iterator ends the work.

    Raises InputError as `generate` does, at the call and not at the first token.
    """
    engine = Engine(model, batch_size=1, copies=True)
    engine.add(prompt, sampling, stop_ids)
    return _streamed(engine)


def _streamed(engine: Engine) -> Iterator[int]:
    try:
        while engine.busy:
            yield from [event.token for event in engine.step() if event.token is not None]
    finally:
        engine.close()
