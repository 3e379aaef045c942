"""A server without a model: the page's own files, and answers that are made up, by the OpenAI API's forms.

`python -m tests.serve.fake_server` starts it at port 8123, to look at the page.
"""

import asyncio
import json
import math
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deltaw.serve import page

BASE = "builtin:smollm2-135m"
NAMES = ("words", "a/b ü")
HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"


@dataclass
class Fake:
    """`asked`: the bodies as they came. `key`: the API key that is wanted. `wait`: seconds between two pieces. A prompt
    of `script` is answered by its pieces: texts, or an event as it is, which ends the answer; or by a Response."""

    key: str = ""
    wait: float = 0.0
    plain: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=lambda: list(NAMES))
    broken: set[str] = field(default_factory=set)
    left: int = 0  # clients that were gone before the end
    script: dict[str, Any] = field(default_factory=dict)
    url: str = ""

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Route("/v1/completions", self.answer, methods=["POST"]),
            Route("/v1/adapters/{name}/report", self.report),
        ]
        return Starlette(routes=[*page.routes(), *routes])

    def refused(self, request: Request) -> Response | None:
        if not self.key or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "the API key isn't this server's"}}, status_code=401)

    async def models(self, request: Request) -> Response:
        asking = "plain" if self.plain else "chat"
        adapters = [
            {
                "id": name,
                "parent": BASE,
                "report": name == "words",
                "asking": asking,
                "problem": "its file is cut short" if name in self.broken else None,
            }
            for name in self.names
        ]
        return self.refused(request) or JSONResponse(
            {"data": [*adapters, {"id": BASE, "parent": None, "max_model_len": 2048}]}
        )

    async def report(self, request: Request) -> Response:
        return self.refused(request) or HTMLResponse("<h1>report</h1>")

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        said = self.script.get(prompt, f"{body['model']} says: {prompt}".replace(" ", "\0 ").split("\0"))
        if isinstance(said, Response):
            return said
        return self.refused(request) or StreamingResponse(self.stream(body, said), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], said: list[Any]) -> AsyncIterator[str]:
        done = False
        try:
            for i, text in enumerate(said):
                if isinstance(text, dict):
                    yield f"data: {json.dumps(text)}\n\n"
                    done = True
                    return
                yield event(body, text, i)
                await asyncio.sleep(self.wait)
            yield event(body, "", len(said), finish="stop")
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': len(said)}})}\n\n"
            yield "data: [DONE]\n\n"
            done = True
        finally:
            self.left += not done


def event(body: dict[str, Any], text: str, i: int, finish: str | None = None) -> str:
    """One piece, of one token: every third is unlikely."""
    logprob = math.log((0.98, 0.7, 0.2)[i % 3])
    others = [{"token": f" other{j}", "logprob": -2.0 - j, "bytes": None} for j in range(4)]
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
    if "prompt" in body:
        choice["text"] = text
        if body.get("logprobs") and text:
            top = [{text: logprob} | {one["token"]: one["logprob"] for one in others}]
            choice["logprobs"] = {"tokens": [text], "token_logprobs": [logprob], "top_logprobs": top}
    else:
        choice["delta"] = {"content": text}
        if body.get("logprobs") and text:
            own = {"token": text, "logprob": logprob, "bytes": list(text.encode())}
            top_logprobs = sorted([own, *others], key=lambda one: -float(one["logprob"]))
            choice["logprobs"] = {"content": [own | {"top_logprobs": top_logprobs}]}
    return f": still here\n\ndata: {json.dumps({'choices': [choice]})}\n\n"


@contextmanager
def serving(fake: Fake, port: int = 0) -> Iterator[Fake]:
    with socket.create_server(("127.0.0.1", port)) as listening:
        fake.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    with serving(Fake(wait=0.05), 8123) as running:
        print(running.url)
        threading.Event().wait()
