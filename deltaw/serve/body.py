"""A request's body: read up to a size and a time, and parsed as one strict JSON object.

Not one byte more than the limit is kept, whatever `Content-Length` says or leaves out; a client that sends slowly is
answered 408. A body that is too large is still read for a moment and thrown away, so that an honest client sees the 413
rather than a broken connection. Compressed bodies are refused unread: a bomb is small on the wire.

JSON is files/strict_json's: no key twice, no NaN, UTF-8 alone. Its depth is bounded on top of that, since a value goes
on into a template.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from deltaw.files.strict_json import NotJSON, json_kind, parse
from deltaw.serve.limits import Limits
from deltaw.serve.refused import Refused, wrong

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
DRAINED, DRAIN_SECONDS = 2**26, 2.0  # of a body that is refused anyway


class Gone(Exception):
    """The client has left: there is nobody to answer."""


async def read_body(receive: Receive, headers: Mapping[str, str], limits: Limits) -> bytes:
    """All of it. Raises Refused, or Gone."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Refused(415, f"content-encoding {encoding[:40]!r}: send the body as it is", close=True)
    length = headers.get("content-length", "")
    too_large = Refused(413, f"the body has more than {limits.body:,} bytes", close=True)
    if length.isdecimal() and (len(length) > 18 or int(length) > limits.body):
        if "expect" not in headers:
            await _drain(_parts(receive))
        raise too_large
    parts: list[bytes] = []
    size, coming = 0, _parts(receive)
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in coming:
                size += len(part)
                if size > limits.body:
                    break
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"the body didn't come within {limits.body_seconds:g} s", close=True) from None
    if size > limits.body:
        await _drain(coming)
        raise too_large
    return b"".join(parts)


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def _drain(coming: AsyncIterator[bytes]) -> None:
    """What is still coming, if anything is."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for part in coming:
                size += len(part)
                if size > DRAINED:
                    return


def parse_body(data: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object that it is. Raises Refused."""
    try:
        value = parse(data)
    except NotJSON as error:
        raise wrong(f"the body can't be read: {error}") from None
    if not isinstance(value, dict):
        raise wrong(f"the body must be a JSON object, not {json_kind(value)}")
    if _deeper(value, limits.depth):
        raise wrong(f"the body is nested more than {limits.depth} deep")
    return value


def _deeper(value: dict[str, Any] | list[Any], depth: int) -> bool:
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_deeper(item, depth - 1) for item in inner if type(item) in (dict, list))
