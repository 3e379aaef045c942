"""A socket, and the server on it. The home of uvicorn.

The socket is opened before the weights are read, so a port that is taken is an error at once; whoever connects in the
meantime waits.

uvicorn waits for a request's head as long as the client likes, and answers what isn't HTTP in plain text. `Patient` is
its protocol with a clock, a bound on connections and errors in OpenAI's form.

At the end (Ctrl-C, SIGTERM) no connection is taken any more, answers that are being made have `GRACE` seconds, which is
said, and then the worker ends them with an error that their clients can read. A second Ctrl-C doesn't wait.
"""

import asyncio
import errno
import functools
import http
import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deltaw.errors import InputError
from deltaw.serve.limits import Limits
from deltaw.serve.refused import Refused
from deltaw.serve.worker import Worker
from deltaw.show.text import counted

GRACE = 10.0
LAST = 5  # seconds more, in which clients are told
BACKLOG = 512


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: a free one. Raises InputError."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = infos[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what = f"port {port} of {host} is in use"
            raise InputError(what, fix="another server runs there: stop it, or --port 0 takes a free one") from None
        if isinstance(error, socket.gaierror):
            raise InputError(f"--host {host}: no such address", fix="127.0.0.1 is this machine alone") from None
        fix = "ports below 1024 are the administrator's" if error.errno == errno.EACCES else "see --host and --port"
        raise InputError(f"can't listen on {host}:{port}: {error.strerror or error}", fix=fix) from None


def address_of(listening: socket.socket) -> str:
    """`http://host:port`, as others write it."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # all of this machine's addresses: one that works here
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Serves `app` on a socket until a signal comes, or `should_exit` is set. `say` is told what it waits for then."""

    def __init__(
        self, app: Any, worker: Worker, limits: Limits, *, grace: float = GRACE, say: Callable[[str], None] = print
    ) -> None:
        self._worker, self._grace, self._say = worker, grace, say
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what it knows, guard.py has said
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(Patient, limits=limits),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # anybody could write them
                h11_max_incomplete_event_size=limits.headers,
                timeout_graceful_shutdown=int(grace) + LAST,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._worker.busy and not self.force_exit:
            requests = counted(self._worker.busy, "request")
            self._say(f"ending: {requests} may take {self._grace:g} s more; Ctrl-C again doesn't wait")
        loop = asyncio.get_running_loop()
        ending = loop.call_later(self._grace, lambda: loop.run_in_executor(None, self._worker.close))
        await super().shutdown(sockets)
        ending.cancel()


class Patient(H11Protocol):
    """One connection. A request's head has to come within a time, and there are so many connections at most."""

    def __init__(self, *args: Any, limits: Limits, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._refuse(Refused(503, "too many connections", retry_after=1, close=True))
            return
        self._clock = self.loop.call_later(self._limits.head_seconds, self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._clock is None:  # the next request on a connection begins
            self._clock = self.loop.call_later(self._limits.head_seconds, self._late)
        elif not waits:
            self._stop_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refused(400, "this isn't an HTTP request, or its headers are too long", close=True))

    def _late(self) -> None:
        self._clock = None
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(Refused(408, f"no whole request came within {self._limits.head_seconds:g} s", close=True))

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _refuse(self, refused: Refused) -> None:
        """Answer without the application, and hang up."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(refused.to_json()).encode()
            headers = {**refused.headers, "content-type": "application/json", "content-length": str(len(body))}
            response = h11.Response(
                status_code=refused.status,
                headers=list(headers.items()),
                reason=http.HTTPStatus(refused.status).phrase.encode(),
            )
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def run(server: Server, listening: socket.socket, *, begun: Callable[[], None]) -> None:
    """Until it ends. `begun` is called when it answers."""

    async def main() -> None:
        serving = asyncio.ensure_future(server.serve(sockets=[listening]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if server.started:
            begun()
        await serving

    asyncio.run(main())
