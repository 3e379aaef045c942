"""A real server on a real socket, in a thread, over a tiny model with adapters."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deltaw
from deltaw.model import Model, open_model
from deltaw.serve.adapters import Adapters
from deltaw.serve.app import build
from deltaw.serve.guard import Access
from deltaw.serve.limits import Limits
from deltaw.serve.listen import Server, address_of, bind
from deltaw.serve.worker import Worker

KEY = "a-key"


@dataclass
class Running:
    """A server that answers. `said`: what it said of defects; `kept`: what no client may be told."""

    model: Model
    worker: Worker
    server: Server
    address: str
    said: list[str]
    kept: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, int]:
        host, _, port = self.address.removeprefix("http://").rpartition(":")
        return host, int(port)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, key: str | None = KEY
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, the answer as JSON or text, its headers). A body that isn't bytes goes as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        connection = http.client.HTTPConnection(*self.place, timeout=20)
        try:
            connection.request(method, path, data, {**sent, **(headers or {})})
            answer = connection.getresponse()
            text = answer.read().decode()
            assert not any(path in text or path in str(answer.headers) for path in self.kept), text
            is_json = answer.getheader("content-type", "").startswith("application/json")
            value = json.loads(text) if is_json and text else text
            return answer.status, value, {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return self.send("POST", path, body)[:2]

    def open(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(self.place, timeout=20)


@contextmanager
def serving(
    base: Path,
    adapters: Path | None = None,
    *,
    access: Access | None = None,
    limits: dict[str, Any] | None = None,
    **worker: Any,
) -> Iterator[Running]:
    """A server that runs inside the block."""
    model = open_model(base, dtype="float32", device="cpu")
    said: list[str] = []
    work = Worker(model, Adapters(model, adapters), **worker)
    bounds = replace(Limits.of(model), **(limits or {}))
    app = build(work, access or Access(KEY), limits=bounds, say=said.append)
    listening = bind("127.0.0.1", 0)
    server = Server(app, work, bounds, grace=1.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    work.start()
    thread.start()
    try:
        until = time.monotonic() + 20
        while not server.started and time.monotonic() < until:
            time.sleep(0.005)
        kept = {str(base.parent), str(base.parent.resolve()), str(Path(deltaw.__file__).parent)}
        yield Running(model, work, server, address_of(listening), said, tuple(kept))
    finally:
        server.should_exit = True
        thread.join(20)
        work.close()
        listening.close()
        assert not thread.is_alive() and not said
