"""The server's routes: HTTP -> the desk, and back. The home of starlette, besides the page.

    GET  /                            the page                   GET  /v1/models[/NAME]
    GET  /health  /metrics                                       POST /v1/chat/completions  /v1/completions
    POST /tokenize  /detokenize                                  GET  /v1/adapters   POST /v1/adapters
    GET  /v1/adapters/NAME/report                                DELETE /v1/adapters/NAME

Answers are JSON or server-sent events (`data: {…}`, at the end `data: [DONE]`). A client's leaving is noticed at every
stage: while its request is prepared or waits, while it is answered whole, and in a stream. Everything in front of the
routes (key, origin, errors) is guard.py's.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from deltaw.serve import page
from deltaw.serve.body import Gone, Receive, parse_body, read_body
from deltaw.serve.catalog import Catalog
from deltaw.serve.desk import Answers, Body, Desk
from deltaw.serve.guard import Access, Guard, Scope, Send
from deltaw.serve.limits import Limits
from deltaw.serve.metrics import MEDIA_TYPE, Counts
from deltaw.serve.refused import Refused
from deltaw.serve.worker import Worker

T = TypeVar("T")
EVENTS = "text/event-stream"
STREAM = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies hand each token on
Ask = Callable[[Body, str], Coroutine[Any, Any, tuple[bool, Answers]]]
REPORT_HEADERS = {  # a page of its own, whose styles stand in it, and in which nothing runs
    "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
}


def build(
    worker: Worker,
    access: Access | None = None,
    *,
    limits: Limits | None = None,
    say: Callable[[str], None] = print,
) -> Starlette:
    """The application, for a worker that has been started. `say` is told of defects, one line each."""
    counts, limits = Counts(), limits or Limits.of(worker.model)
    desk = Desk(worker, Catalog(worker.model, worker.adapters), limits, counts)

    return Starlette(
        routes=routes(desk),
        middleware=[Middleware(Guard, access or Access(), limits, counts, say)],
        exception_handlers={HTTPException: _not_ours},
    )


def routes(desk: Desk) -> list[Route]:
    """All of the API's."""

    async def models(request: Request) -> Response:
        return _json(await desk.models())

    async def model(request: Request) -> Response:
        return _json(await desk.model(request.path_params["name"]))

    async def adapters(request: Request) -> Response:
        return _json(await desk.adapters())

    async def load(request: Request) -> Response:
        return _json(await desk.load(await _body(request, desk)))

    async def drop(request: Request) -> Response:
        return _json(await desk.drop(request.path_params["name"]))

    async def report(request: Request) -> Response:
        content = await desk.report(request.path_params["name"])
        return Response(content, headers=REPORT_HEADERS, media_type="text/html")

    async def tokenize(request: Request) -> Response:
        return _json(await desk.tokenize(await _body(request, desk)))

    async def detokenize(request: Request) -> Response:
        return _json(await desk.detokenize(await _body(request, desk)))

    async def health(request: Request) -> Response:
        return _json(desk.health())

    async def metrics(request: Request) -> Response:
        return Response(desk.metrics(), headers={"content-type": MEDIA_TYPE})

    return [
        *page.routes(),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/adapters", adapters),
        Route("/v1/adapters", load, methods=["POST"]),
        Route("/v1/adapters/{name}", drop, methods=["DELETE"]),
        Route("/v1/adapters/{name}/report", report),
        Route("/v1/chat/completions", Answered(desk, desk.chat), methods=["POST"]),
        Route("/v1/completions", Answered(desk, desk.complete), methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


class Answered:
    """A route that is answered as one object, or as a stream; whatever ends it, nothing is left running."""

    def __init__(self, desk: Desk, ask: Ask) -> None:
        self._desk, self._ask = desk, ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await _body(request, self._desk)
        client = request.client.host if request.client else ""
        with self._desk.counted(client):
            streams, answers = await _unless_gone(receive, self._ask(body, client))
            try:
                if streams:
                    response: Response = StreamingResponse(_events(answers), headers=STREAM, media_type=EVENTS)
                else:
                    response = _json(await _unless_gone(receive, answers.whole()))
                await response(scope, receive, send)
            finally:
                answers.cancel()


async def _events(answers: Answers) -> AsyncIterator[bytes]:
    async for data in answers.chunks():
        yield b"data: " + _encoded(data) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to. Raises Gone, with `work` cancelled, when the client leaves first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(receive: Receive) -> None:
    """Until the client has. Its request is read already."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, desk: Desk) -> Body:
    data = await read_body(request.receive, request.headers, desk.limits)
    return await asyncio.to_thread(parse_body, data, desk.limits)


def _json(value: Any) -> Response:
    return Response(_encoded(value), media_type="application/json")


def _encoded(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


async def _not_ours(request: Request, error: Exception) -> Response:
    """An address or a method that there isn't."""
    assert isinstance(error, HTTPException)
    raise Refused(
        error.status_code,
        f"{request.method} {request.url.path[:80]}: {'no such route' if error.status_code == 404 else error.detail}",
        headers=dict(error.headers or {}),
    )
