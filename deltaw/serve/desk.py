"""A request's way through the server, without HTTP: a parsed body -> a whole answer, or a stream of chunks.

    read        every field is looked at, and the prompt's ids are made, in a thread: the event loop must not wait
    submitted   one Ask for each prompt, all of them or none
    begun       the first prompt's rows are decoded. Only now a stream begins, so what is wrong with an adapter or a
                prompt is still an error with a status
    answered    pieces become chunks as they come; what fails then is an `error` event in the stream

Whoever leaves, or is refused, leaves nothing behind: `Answers.cancel` in every way out.

No client (an address) may take more than its share of the places, so that others always find one; who waits is then
served in turn (worker.py).
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from deltaw.errors import DeltawError
from deltaw.serve import metrics
from deltaw.serve.answers import Chat, Form, Text, usage
from deltaw.serve.ask import Ask, Piece, Unknown
from deltaw.serve.catalog import Catalog, shown
from deltaw.serve.limits import Limits
from deltaw.serve.metrics import Counts
from deltaw.serve.protocol import (
    AdapterRequest,
    Asked,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from deltaw.serve.refused import NAMED, Refused, of_error, wrong
from deltaw.serve.schema import schema_of
from deltaw.serve.tokens import Tokens
from deltaw.serve.tools import choice_of
from deltaw.serve.worker import Answering, Worker

Body = Mapping[str, Any]
Prepared = tuple[Callable[..., Form], Asked, list[Ask]]
LATER = 2  # seconds after which a client that has its share may ask again


@dataclass
class Answers:
    """The answers to a request's prompts, n for each, as they come."""

    form: Form
    answerings: Sequence[Answering]
    n: int
    usage: bool = False

    def cancel(self) -> None:
        """Nobody wants them any more. Nothing for what has ended."""
        for answering in self.answerings:
            answering.cancel()

    @property
    def used(self) -> tuple[int, int]:
        """Tokens of the prompts, and tokens that were made."""
        return sum(a.prompt_tokens for a in self.answerings), sum(a.generated_tokens for a in self.answerings)

    async def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        answers = [self.form.begun() for _ in range(len(self.answerings) * self.n)]
        async for index, piece in self._pieces():
            answers[index].add(piece)
        choices = [self.form.choice(index, answer) for index, answer in enumerate(answers)]
        return {**self.form.envelope(choices, stream=False), "usage": usage(*self.used)}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream; the last may be an error."""
        answers = [self.form.begun() for _ in range(len(self.answerings) * self.n)]
        for index in range(len(answers)):
            if opened := self.form.opened(index):
                yield self.form.envelope([opened], stream=True)
        try:
            async for index, piece in self._pieces():
                for choice in self.form.chunk(index, piece, answers[index]):
                    yield self.form.envelope([choice], stream=True)
                answers[index].text += piece.text  # no piece is kept: a stream may be long
        except DeltawError as error:
            yield of_error(error, self.form.model).to_json()
            return
        if self.usage:
            yield self.form.counted(*self.used)

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the answer, a piece of it), of all prompts as they come."""
        if len(self.answerings) == 1:
            async for piece in self.answerings[0]:
                yield piece.index, piece
            return
        queue: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()

        async def follow(number: int, answering: Answering) -> None:
            try:
                async for piece in answering:
                    queue.put_nowait((number * self.n + piece.index, piece))
            finally:
                queue.put_nowait(None)

        tasks = [asyncio.ensure_future(follow(*each)) for each in enumerate(self.answerings)]
        try:
            ended = 0
            while ended < len(tasks):
                item = await queue.get()
                if item is not None:
                    yield item
                    continue
                ended += 1
                for task in tasks:
                    if task.done():
                        task.result()  # raises what it ended with
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Desk:
    """Where requests are answered. Its methods raise Refused."""

    def __init__(self, worker: Worker, catalog: Catalog, limits: Limits, counts: Counts) -> None:
        self.worker, self.catalog, self.limits, self.counts = worker, catalog, limits, counts
        self.tokens = Tokens(catalog.model.renderer)
        self._requests: Counter[str] = Counter()  # by client, those that aren't answered yet

    @contextmanager
    def counted(self, client: str) -> Iterator[None]:
        """A client's request, as long as it lasts. Raises Refused where it has its share already."""
        most = max(1, int(self.limits.share * self.worker.queue))
        if self._requests[client] >= most:
            what = f"{most} of your requests are being answered or wait"
            raise Refused(429, f"{what}: others need a place too", code="rate_limit_exceeded", retry_after=LATER)
        self._requests[client] += 1
        try:
            yield
        finally:
            self._requests[client] -= 1
            if not self._requests[client]:
                del self._requests[client]

    async def chat(self, body: Body, client: str) -> tuple[bool, Answers]:
        """(whether a stream is wanted, the answers)."""

        def prepared() -> Prepared:
            request = ChatRequest.read(body)
            request.check(self.limits)
            schema = schema_of(request.response_format)
            choice = choice_of(request.tools, request.tool_choice, request.parallel_tool_calls)
            if choice.held and schema is not None:
                raise wrong("an answer that must be calls can't be held to a schema, too", "response_format")
            served = self.catalog.served(request.model)
            calling = self.catalog.calling(served, choice)
            ids = self.catalog.chat_ids(served, request.messages, choice.shown)
            ask = request.ask(ids, self.limits, client, served.name if served else None)
            stops = self.catalog.stop_ids(served)
            ask = replace(ask, stop_ids=stops)
            if schema is not None:  # what is held to JSON calls nothing
                return Chat, request, [replace(ask, grammar=self.catalog.grammar(schema, stops))]
            if calling is None:
                return Chat, request, [ask]
            grammar = self.catalog.call_grammar(calling, stops) if choice.held else None
            return partial(Chat, calling=calling), request, [replace(ask, grammar=grammar, shown=calling.shown)]

        return await self._answers(prepared, body)

    async def complete(self, body: Body, client: str) -> tuple[bool, Answers]:
        """The same for texts."""

        def prepared() -> Prepared:
            request = CompletionRequest.read(body)
            request.check(self.limits)
            served = self.catalog.served(request.model)
            prompts = [self.catalog.text_ids(p) if isinstance(p, str) else p for p in request.prompt]
            name = served.name if served else None
            return Text, request, [request.ask(ids, self.limits, client, name) for ids in prompts]

        return await self._answers(prepared, body)

    async def _answers(self, prepared: Callable[[], Prepared], body: Body) -> tuple[bool, Answers]:
        async with self._named(body.get("model", "")):
            form, request, asks = await asyncio.to_thread(prepared)
            answerings = await self._begun(asks)
        return request.stream, self._of(form, request, answerings)

    @asynccontextmanager
    async def _named(self, model: object) -> AsyncIterator[None]:
        """What the library refuses inside is refused to the client, who asked for this model."""
        try:
            yield
        except Unknown as error:
            raise of_error(error, model, await asyncio.to_thread(self.catalog.some, NAMED + 1)) from None
        except DeltawError as error:
            raise of_error(error) from None

    async def _begun(self, asks: Sequence[Ask]) -> list[Answering]:
        answerings: list[Answering] = []
        try:
            for ask in asks:
                answerings.append(self.worker.submit(ask))
            await answerings[0].begun()
        except BaseException:
            for answering in answerings:
                answering.cancel()
            raise
        return answerings

    def _of(self, form: Callable[..., Form], request: Asked, answerings: Sequence[Answering]) -> Answers:
        options = request.stream_options
        model = self.catalog.model.base.fingerprint
        served = answerings[0].served
        fingerprint = "fp_" + "_".join(_short(part) for part in (model, served.digest if served else "") if part)
        counts = request.stream and options.include_usage
        made = form(request.model, fingerprint, self.tokens, request.likely is not None, counts)
        return Answers(made, answerings, request.n, counts)

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`."""
        return {"object": "list", "data": await asyncio.to_thread(self.catalog.models)}

    async def model(self, name: str) -> dict[str, Any]:
        """`GET /v1/models/NAME`."""
        async with self._named(name):
            return await asyncio.to_thread(self.catalog.entry, name)

    async def report(self, name: str) -> bytes:
        """`GET /v1/adapters/NAME/report`."""
        async with self._named(name):
            page = await asyncio.to_thread(self.catalog.report, name)
        if page is None:
            raise Refused(404, "this adapter has no report", param="name")
        return page

    async def adapters(self) -> dict[str, Any]:
        """`GET /v1/adapters`."""
        served = await asyncio.to_thread(self.catalog.adapters.all)
        return {"object": "list", "data": [shown(one) for one in served]}

    async def load(self, body: Body) -> dict[str, Any]:
        """`POST /v1/adapters`."""
        name = AdapterRequest.read(body).name
        if name == self.catalog.base:
            raise wrong(f"{name} is the base, which is always there", "name")
        async with self._named(name):
            return shown(await self.worker.load(name))

    async def drop(self, name: str) -> dict[str, Any]:
        """`DELETE /v1/adapters/NAME`."""
        async with self._named(name):
            await self.worker.drop(name)
        return {"id": name, "object": "adapter", "deleted": True}

    async def tokenize(self, body: Body) -> dict[str, Any]:
        """`POST /tokenize`."""
        request = TokenizeRequest.read(body)
        if (request.prompt is None) == (request.messages is None):
            raise wrong("send prompt, a text, or messages, a chat", "prompt")

        def ids() -> tuple[int, ...]:
            if request.messages is None:
                return self.catalog.text_ids(request.prompt or "", any_length=True)
            return self.catalog.chat_ids(None, request.messages, request.tools, any_length=True)

        async with self._named(self.catalog.base):
            tokens = await asyncio.to_thread(ids)
        return {"tokens": list(tokens), "count": len(tokens), "max_model_len": self.limits.context}

    async def detokenize(self, body: Body) -> dict[str, Any]:
        """`POST /detokenize`."""
        ids = DetokenizeRequest.read(body).tokens
        if any(not 0 <= id < self.limits.vocabulary for id in ids):
            raise wrong(f"tokens: ids are from 0 to {self.limits.vocabulary - 1:,}", "tokens")
        return {"prompt": await asyncio.to_thread(self.tokens.text, ids)}

    def health(self) -> dict[str, Any]:
        """`GET /health`."""
        if not self.worker.alive:
            raise Refused(503, "the worker has ended")
        return {"status": "ok"}

    def metrics(self) -> str:
        """`GET /metrics`."""
        return metrics.page(self.worker.figures(), self.counts)


def _short(fingerprint: str) -> str:
    return fingerprint.rpartition(":")[2][:10]
