"""What is refused, beside the faults 55 to 63 (tests/faults, a sample of which runs with the suite). Each test is
followed by an honest request."""

import asyncio
import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltaw.serve.guard import Access, Guard
from deltaw.serve.limits import Limits
from deltaw.serve.metrics import Counts
from tests.serve.serving import KEY, Running, serving

CHAT, TEXT, SOON = "/v1/chat/completions", "/v1/completions", 2.0
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def base(running: Running) -> str:
    return running.model.base.source.public_name


@pytest.fixture(autouse=True)
def _still_answers(running: Running) -> Iterator[None]:
    yield
    assert running.post(TEXT, model="one", prompt="a", max_tokens=1)[0] == 200 and not running.said


def refused(answer: Any, status: int) -> dict[str, Any]:
    """The error of an answer that must be one, in OpenAI's form."""
    assert answer[0] == status, answer
    assert set(answer[1]["error"]) == {"message", "type", "param", "code"} and answer[1]["error"]["message"]
    return answer[1]["error"]


def test_what_is_wrong_in_a_request_is_refused(running: Running, base: str) -> None:
    small: dict[str, Any] = {"model": base, "prompt": "a", "max_tokens": 1}
    for changes in (
        {"n": 17},
        {"prompt": ["a"] * 5, "n": 16},
        {"logprobs": 21},
        {"max_tokens": 0},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"suffix": "b"},
        {"model": 1},
        {"model": None},
        {"prompt": "a\0"},
    ):
        refused(running.post(TEXT, **{**small, **changes}), 400)
    for messages in ([], [1], "a", [{"role": "user"}], [{"role": "king", "content": "a"}], [{"content": "a"}], None):
        refused(running.post(CHAT, model=base, messages=messages), 400)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    refused(running.post(CHAT, model=base, messages=image), 400)


def test_wrong_numbers_cost_no_time(running: Running, base: str) -> None:
    """A list of a hundred thousand wrong items has one error."""
    began = time.monotonic()
    for changes in ({"prompt": ["a", *[1] * 100_000]}, {f"x{i}": 1 for i in range(50_000)}, {"stop": [1] * 100_000}):
        error = refused(running.post(TEXT, **{"model": base, "prompt": "a", **changes}), 400)
        assert len(error["message"]) < 500
    assert time.monotonic() - began < 3 * SOON


def test_a_body_that_is_said_to_be_too_large_is_refused_unread(running: Running) -> None:
    with running.open() as plain:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        plain.sendall(f"{head}Content-Length: {10**15}\r\nExpect: 100-continue\r\n\r\n".encode())
        data = b""
        while part := plain.recv(2**16):
            data += part
        assert data.startswith(b"HTTP/1.1 413")


def test_a_client_that_reads_nothing_is_let_go() -> None:
    said: list[str] = []
    limits, counts = Limits(10, 10, stall_seconds=0.05), Counts()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise AssertionError("it waits for ever")

    async def send(message: Any) -> None:
        await asyncio.sleep(60 if message["type"] == "http.response.body" else 0)

    scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}
    asyncio.run(Guard(app, Access(), limits, counts, said.append)(scope, send, send))
    assert not said and counts.requests == {200: 1}


def test_a_browser_sends_the_key_as_a_password(running: Running) -> None:
    for password, status in (("any:no", 401), (f"any:{KEY}", 200)):
        basic = {"Authorization": f"Basic {base64.b64encode(password.encode()).decode()}"}
        assert running.send("GET", "/v1/models", headers=basic, key=None)[0] == status


def test_web_pages_elsewhere_may_not_ask(running: Running, served_base: Path) -> None:
    host = running.address.removeprefix("http://")
    for origin in ("http://evil.example", "null", f"https://{host}.evil.example", "http://localhost:1"):
        refused(running.send("GET", "/v1/models", headers={"Origin": origin})[:2], 403)
        assert (
            running.send("OPTIONS", TEXT, headers={"Origin": origin, "Access-Control-Request-Method": "POST"})[0] == 403
        )
    status, _, headers = running.send("GET", "/v1/models", headers={"Origin": running.address})
    assert status == 200 and "access-control-allow-origin" not in headers
    access = Access(None, frozenset({"https://good.example"}))
    with serving(served_base, access=access) as opened:
        status, _, headers = opened.send("GET", "/v1/models", headers={"Origin": "https://good.example"}, key=None)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://good.example")
        asked = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
        assert opened.send("OPTIONS", TEXT, headers=asked, key=None)[0] == 204
        assert opened.send("GET", "/v1/models", headers={"Host": "rebound.example"}, key=None)[0] == 403
        for name in ("localhost", "127.0.0.1:80", "[::1]:8000"):
            assert opened.send("GET", "/v1/models", headers={"Host": name}, key=None)[0] == 200
