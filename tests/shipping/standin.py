"""A stand-in for servers that speak OpenAI's routes, answering with a model that runs here: vLLM's kind, which tells
token ids, and the plain kind, which tells text."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deltaw.shipping.verify.sides.side import Asked, Prompt, Row, Side


class Standin:
    """`side` answers. `ids`: whether tokens are told by id. `behaviour`: "" or what goes wrong."""

    def __init__(self, side: Side, *, ids: bool, behaviour: str = "", key: str = "", names: list[str] | None = None):
        self.side, self.ids, self.behaviour, self.key = side, ids, behaviour, key
        self.names = names or ["base", "tuned"]
        self.asked: list[tuple[str, Any]] = []
        self.keys: list[str | None] = []

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name} for name in self.names]}
        if self.behaviour == "hangs":
            time.sleep(5)
        if self.behaviour == "breaks" and "completions" in path:
            return 500, {"error": {"message": "out of memory"}}
        if body and body.get("model") not in self.names:
            return 404, {"error": {"message": "no such model", "param": "model"}}
        if path == "/tokenize" and self.ids:
            return 200, {"tokens": list(self.side.ids([_prompt(body)])[0])}
        if path == "/detokenize" and self.ids:
            return 200, {"prompt": self.side.decode(body["tokens"])}
        if path == "/v1/completions":
            return 200, {"choices": [self.completed(body)]}
        if path == "/v1/chat/completions":
            choice = self.completed({**body, "prompt": list(self.side.ids([_prompt(body)])[0])})
            return 200, {
                "choices": [{"message": {"content": choice["text"]}, "finish_reason": choice["finish_reason"]}]
            }
        return 404, {"error": {"message": "no such route"}}

    def completed(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["prompt"]
        ids = tuple(asked) if isinstance(asked, list) else self.side.ids([Prompt(asked, "")])[0]
        (answer,) = self.side.answers([Asked(Prompt("", ""), ids)], body["max_tokens"], lambda _: None)
        choice = {"text": answer.text, "finish_reason": "stop" if answer.ended else "length"}
        if self.ids and body.get("logprobs"):
            (logs,) = self.side.logs([Row(ids, answer.ids)], lambda _: None)
            top = logs.values_PK.topk(body["logprobs"])
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}" for token in answer.ids],
                "top_logprobs": [
                    {f"token_id:{token}": value for token, value in zip(row, values, strict=True)}
                    for row, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ],
            }
        return choice


def _prompt(body: dict[str, Any]) -> Prompt:
    return Prompt(tuple(body["messages"]) if "messages" in body else body.get("prompt", ""), "")


@contextmanager
def serving(standin: Standin) -> Iterator[str]:
    """Its address, for as long as the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._do(None)

        def do_POST(self) -> None:
            self._do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _do(self, body: Any) -> None:
            standin.asked.append((self.path, body))
            standin.keys.append(self.headers.get("Authorization"))
            if standin.behaviour == "redirects":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()
                return
            if standin.key and self.headers.get("Authorization") != f"Bearer {standin.key}":
                status, answer = 401, {"error": {"message": "who are you?"}}
            else:
                status, answer = standin.answer(self.path, body)
            data = b"<html>" if standin.behaviour == "is no API" else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
