"""What stands in front of every route: who may ask, from where, and what becomes of an error.

The key is asked for here and not by the routes, so that none can be forgotten: every path but `/health`, also one that
doesn't exist. It comes as `Authorization: Bearer KEY` or, for a browser at the page, as the password of Basic (any
name). Two hashes are compared in constant time, so neither the key's letters nor its length show in how long it takes.

A browser carries other sites' code to us, even to a server that only listens on loopback:

- a request with an `Origin` other than our own address is refused (403) unless that origin was allowed; so no site can
  have a server work, let alone read its answers (CORS headers are sent to allowed origins alone);
- without a key and on loopback, the name in `Host` must be one of this machine, or a site could point its own name at
  127.0.0.1 and be our own origin (DNS rebinding).

Written for ASGI itself, without the framework: it sees what comes and goes before anything has been made of it.
"""

import asyncio
import hmac
import ipaddress
from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from hashlib import sha256
from json import dumps
from typing import Any
from urllib.parse import urlsplit

from deltaw.serve.body import Gone, Message, Receive
from deltaw.serve.limits import Limits
from deltaw.serve.metrics import Counts
from deltaw.serve.refused import Refused

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/health"})  # what needs no key


@dataclass(frozen=True)
class Access:
    """Who may ask. `key`: None for everybody. `origins`: of web pages elsewhere that may. `local`: it listens on
    loopback alone."""

    key: str | None = None
    origins: frozenset[str] = frozenset()
    local: bool = True

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises Refused."""
        host = headers.get("host", "")
        if self.key is None and self.local and not _of_this_machine(host):
            raise Refused(403, f"this server is for this machine alone, and {host[:80]!r} isn't a name of it")
        origin = headers.get("origin")
        if origin is not None and not self.allows(origin) and not _same(origin, host):
            raise Refused(
                403, f"web pages of {origin[:80]!r} may not ask; deltaw serve --allow-origin lets them", code="origin"
            )
        if self.key is not None and path not in OPEN and not self._knows(headers.get("authorization", "")):
            scheme = "Bearer" if path.startswith(("/v1/", "/metrics")) else 'Basic realm="deltaw"'
            raise Refused(
                401,
                "the key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": scheme},
            )

    def allows(self, origin: str | None) -> bool:
        """Whether web pages of this origin were allowed to ask."""
        return origin is not None and (origin in self.origins or "*" in self.origins)

    def _knows(self, authorization: str) -> bool:
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = b64decode(value.strip(), validate=True).decode().partition(":")[2]
            except ValueError:
                value = ""
        elif scheme.lower() != "bearer":
            value = ""
        given, wanted = (sha256(text.strip().encode()).digest() for text in (value, self.key or ""))
        return hmac.compare_digest(given, wanted)


class Guard:
    """The middleware. `say` is told of defects, one line each."""

    def __init__(self, app: App, access: Access, limits: Limits, counts: Counts, say: Callable[[str], None]) -> None:
        self._app, self._access, self._limits, self._counts, self._say = app, access, limits, counts, say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._added(origin)]
            async with asyncio.timeout(self._limits.stall_seconds):  # a client that doesn't read what it asked for
                await send(message)

        try:
            if (
                scope["method"] == "OPTIONS"
                and "access-control-request-method" in headers
                and self._access.allows(origin)
            ):
                await _answer(sent, 204, b"", PREFLIGHT)
                return
            self._access.check(scope["path"], headers)
            await self._app(scope, receive, sent)
        except Gone:
            status = status or 499
        except Refused as refused:
            await refuse(sent, refused)
        except Exception as error:
            self._say(f"a request to {scope['path'][:60]!r} failed: {type(error).__name__}: {str(error)[:200]}")
            if status:
                raise  # the answer has begun: closing the connection is all that can be done
            await refuse(sent, Refused(500, "the server failed at this; its log says how"))
        finally:
            self._counts.requests[status] = self._counts.requests.get(status, 0) + 1

    def _added(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        """Headers of every answer."""
        added = [(b"x-content-type-options", b"nosniff")]
        if origin is not None and self._access.allows(origin):
            added += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
        return added


PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, DELETE",
    "access-control-allow-headers": "authorization, content-type",
    "access-control-max-age": "600",
}


async def refuse(send: Send, refused: Refused) -> None:
    """Answer with an error."""
    await _answer(send, refused.status, dumps(refused.to_json()).encode(), refused.headers)


async def _answer(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    if body:
        pairs += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _same(origin: str, host: str) -> bool:
    """Whether a page of this origin is our own."""
    try:
        place = urlsplit(origin).netloc.lower()
    except ValueError:
        return False
    return place != "" and place == host.lower()


def _of_this_machine(host: str) -> bool:
    """Whether a Host header names loopback; none at all comes from no browser."""
    try:
        name = (urlsplit(f"//{host}").hostname or "") if host else "localhost"
    except ValueError:
        return False
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Whether an address in numbers is this machine's own."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
