"""Hostile clients: FAULTS 55-57 and 61-63, in small. Each try is followed by an honest request."""

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from deltaw.serve.app import build
from deltaw.serve.guard import Access
from tests.serve.serving import KEY, Running, serving

CHAT, TEXT, SOON = "/v1/chat/completions", "/v1/completions", 2.0
HELLO = [{"role": "user", "content": "hello"}]
ODD = [0, -1, 2**31, 2**63, 10**400, 1e308, "1", True, False, [], {}, [1], "", 0.5, -0.5]
PATHS = [
    "../one",
    "..",
    ".",
    "/etc",
    "one/../one",
    "%2e%2e",
    "one\0",
    "link",
    "../outside",
    "one/",
    "./one",
    "~",
    "a" * 10_000,
]
PATHS += ["\ud800", "one\n", "ONE", "broken/../one", "C:\\", "file:///etc", "\u2025/one", " one", "$HOME"]


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


# 55: path-like names


@pytest.mark.parametrize("name", PATHS)
def test_a_name_is_never_a_path(running: Running, name: str) -> None:
    for path, body in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": HELLO}), ("/v1/adapters", {})):
        field = {"name": name} if path == "/v1/adapters" else {"model": name}
        assert refused(running.post(path, **body, **field), 404)["code"] == "model_not_found"


PARTS = [*"./\\%~$*?: \0", "..", "one", "broken", "outside", "%2f", "etc", "é", "\ud800"]


@settings(max_examples=30)
@given(st.lists(st.sampled_from(PARTS), min_size=1).map("".join))
def test_no_name_leads_outside(running: Running, name: str) -> None:
    wanted = 200 if name in ("one", "two") else 400 if name == "broken" else 404
    status, answer = running.post("/v1/adapters", name=name)
    assert status == wanted and (status == 200 or set(answer["error"]) == {"message", "type", "param", "code"})


def test_addresses_that_lead_up_are_no_routes(running: Running) -> None:
    for path in (
        "/v1/adapters/..%2f..%2foutside",
        "/v1/models/%2e%2e/outside",
        "/v1/adapters/%00",
        "//etc/passwd",
        "/../x",
    ):
        for method in ("GET", "DELETE"):
            assert running.send(method, path)[0] in (404, 405)


# 56: numbers that are none, or too large


@pytest.mark.parametrize(
    "field",
    ["n", "best_of", "max_tokens", "logprobs", "top_logprobs", "temperature", "top_p", "top_k", "seed", "scale"],
)
def test_odd_numbers_are_refused_by_name(running: Running, base: str, field: str) -> None:
    fine = {"n": [1], "best_of": [1], "temperature": [0, 0.5], "top_p": [0, 0.5], "top_k": [0], "scale": []}
    fine |= {"logprobs": [0], "seed": [0, -1, 2**31], "top_logprobs": []}
    for value in ODD:
        accepted = any(type(value) is type(one) and value == one for one in fine.get(field, []))
        status, answer = running.post(TEXT, model=base, prompt="a", **{"max_tokens": 1, field: value})
        if accepted:
            assert status == 200, (value, answer)
        else:
            assert refused((status, answer), 400)["param"] == field, value


def test_too_much_of_anything_is_refused(running: Running, base: str) -> None:
    small: dict[str, Any] = {"model": base, "prompt": "a", "max_tokens": 1}
    for changes in (
        {"stop": ["a"] * 17},
        {"stop": "a" * 201},
        {"stop": [""]},
        {"stop": [1]},
        {"n": 17},
        {"prompt": ["a"] * 65},
        {"prompt": ["a"] * 5, "n": 16},
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": [1, "a"]},
        {"prompt": [True]},
        {"prompt": [10**6]},
        {"prompt": [-1]},
        {"prompt": [2**63]},
        {"prompt": [5] * 256},
        {"prompt": "ab" * 5000},
        {"prompt": "\ud800"},
        {"prompt": "a\0"},
        {"prompt": {"a": 1}},
        {"logprobs": 21},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"1e3": 1}},
        {"logit_bias": {"999999": 1}},
        {"logit_bias": {"1": True}},
        {"logit_bias": {str(i): 1 for i in range(2000)}},
        {"max_tokens": 0},
        {"max_tokens": 257},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"suffix": "b"},
        {"model": 1},
        {"model": None},
    ):
        refused(running.post(TEXT, **{**small, **changes}), 400)
    for messages in ([], [1], "a", [{"role": "user"}], [{"role": "king", "content": "a"}], [{"content": "a"}], None):
        refused(running.post(CHAT, model=base, messages=messages), 400)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    refused(running.post(CHAT, model=base, messages=image), 400)


def test_wrong_numbers_cost_no_time(running: Running, base: str) -> None:
    """A list of a hundred thousand wrong items has one error."""
    began = time.monotonic()
    for changes in ({"prompt": ["a", *[1] * 100_000]}, {f"x{i}": 1 for i in range(100_000)}, {"stop": [1] * 100_000}):
        error = refused(running.post(TEXT, **{"model": base, "prompt": "a", **changes}), 400)
        assert len(error["message"]) < 500
    assert time.monotonic() - began < 3 * SOON


# 57: bodies and connections


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "one", "model": "two", "prompt": "a"}',
        b'{"model": "one", "prompt": "\xff"}',
        b'{"model": "one", "prompt": "a", "temperature": NaN}',
        b'{"model": "one", "prompt": "a", "temperature": 1e999}',
        b'{"model": "one", "prompt": "a", "temperature": ' + b"9" * 5000 + b"}",
        b'{"model": "one", "prompt": "a", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "one", "prompt": "a", "metadata": ' + b'{"a":' * 100 + b"1" + b"}" * 101,
        b"\xef\xbb\xbf{}",
        b"a=1&b=2",
    ],
)
def test_bodies_that_are_no_plain_object(running: Running, body: bytes) -> None:
    refused(running.send("POST", TEXT, body), 400)


def test_compressed_and_large_bodies_are_refused(running: Running) -> None:
    bomb = gzip.compress(b" " * 10**7)
    refused(running.send("POST", TEXT, bomb, {"Content-Encoding": "gzip"}), 415)
    large = json.dumps({"model": "one", "prompt": "a" * 2**22}).encode()
    refused(running.send("POST", TEXT, large), 413)
    with running.open() as plain:
        plain.sendall(head("Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        plain.sendall(chunk * 80 + b"0\r\n\r\n")
        assert answered(plain).startswith(b"HTTP/1.1 413")
    with running.open() as plain:
        plain.sendall(head(f"Content-Length: {10**15}", "Expect: 100-continue"))
        assert answered(plain).startswith(b"HTTP/1.1 413")


def test_header_floods_and_what_is_no_http(running: Running) -> None:
    for data in (
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000,
        b"GET / HTTP/1.1\r\nX: " + b"y" * 10**5,
        b"\x16\x03\x01\r\n\r\n",
    ):
        with running.open() as plain:
            plain.sendall(data)
            assert answered(plain).startswith(b"HTTP/1.1 400")


def head(*headers: str, path: str = TEXT) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}", *headers, "", ""]
    return "\r\n".join(lines).encode()


def answered(connection: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    data = b""
    while part := connection.recv(2**16):
        data += part
    return data


def test_slow_clients_are_sent_away_and_others_served(served_base: Path) -> None:
    limits = {"head_seconds": 0.4, "body_seconds": 0.4, "connections": 12}
    with serving(served_base, limits=limits) as running:
        own = running.model.base.source.public_name
        slow = [running.open() for _ in range(8)]
        for number, connection in enumerate(slow):
            connection.sendall(head("Content-Length: 50")[: 40 if number % 2 else None])
        began = time.monotonic()
        assert running.post(TEXT, model=own, prompt="a", max_tokens=1)[0] == 200
        for connection in slow:
            assert answered(connection).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < SOON
        crowd = [running.open() for _ in range(13)]
        assert any(answered(connection).startswith(b"HTTP/1.1 503") for connection in crowd[12:])
        for connection in (*slow, *crowd):
            connection.close()
        until = time.monotonic() + SOON
        while running.server.server_state.connections and time.monotonic() < until:
            time.sleep(0.01)
        assert running.post(TEXT, model=own, prompt="a", max_tokens=1)[0] == 200


# 58 and 61: clients that leave, and more of them than there are places


def test_a_client_that_leaves_stops_its_answer(running: Running, base: str) -> None:
    for stream in (True, False):
        body = json.dumps(
            {"model": base, "prompt": "a", "max_tokens": 200, "stream": stream, "logit_bias": {"5": 100}}
        ).encode()
        with running.open() as connection:
            connection.sendall(head(f"Content-Length: {len(body)}") + body)
            if stream:
                connection.recv(100)
            else:
                wait(lambda: running.worker.figures().running)
        wait(lambda: running.worker.figures().running == 0)
    assert running.worker.figures().ended.get("cancelled", 0) >= 2


def test_more_than_there_are_places(served_base: Path) -> None:
    with serving(served_base, slots=1, queue=4) as running:
        base = running.model.base.source.public_name

        def ask(_: int) -> tuple[int, dict[str, str]]:
            body = {"model": base, "prompt": "a", "max_tokens": 30, "logit_bias": {"5": 100}}
            status, answer, headers = running.send("POST", TEXT, body)
            if status != 200:
                refused((status, answer), status)
            return status, headers

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(32)))
        assert {status for status, _ in answers} == {200, 429}  # all from one client, who may not take all places
        assert all(int(headers["retry-after"]) >= 1 for status, headers in answers if status == 429)
        assert ask(0)[0] == 200


def wait(true: Any) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


# 62: the key


def test_every_route_wants_the_key(running: Running) -> None:
    app = build(running.worker, Access(KEY))
    assert isinstance(app, Starlette) and len(app.routes) > 10
    paths = [(method, route.path) for route in app.routes for method in route.methods or ("GET", "POST")]
    paths += [("GET", "/no/such"), ("OPTIONS", TEXT), ("TRACE", TEXT), ("GET", "/health/"), ("GET", "//health")]
    for method, path in paths:
        for key in (None, "", KEY[:-1], KEY + "x", "é"):
            headers = {"Authorization": f"Bearer {key}".encode("latin-1").decode("latin-1")} if key is not None else {}
            status, answer, sent = running.send(method, path.format(name="one"), headers=headers, key=None)
            if path == "/health":
                assert status == 200
                continue
            assert status == 401 and "www-authenticate" in sent, (method, path)
            assert method == "HEAD" or answer["error"]["code"] == "invalid_api_key"
    basic = {"Authorization": "Basic YW55Om5v"}  # any:no
    assert running.send("GET", "/v1/models", headers=basic, key=None)[0] == 401
    assert running.send("GET", "/v1/models", headers={"Authorization": "Basic YW55OmEta2V5"}, key=None)[0] == 200


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


# 63: what would be run


@pytest.mark.parametrize(
    "field",
    ["chat_template", "chat_template_kwargs", "guided_regex", "guided_json", "structured_outputs", "lora_path"]
    + ["logits_processors", "__class__", "add_generation_prompt"],
)
def test_no_template_pattern_or_path_from_a_request(running: Running, base: str, field: str) -> None:
    for path, body in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "a"})):
        answer = running.post(path, model=base, max_tokens=1, **body, **{field: "{{ 7*7 }}(a+)+$"})
        assert refused(answer, 400)["param"] == field
    assert refused(running.post("/tokenize", prompt="a", **{field: "x"}), 400)["param"] == field
    assert refused(running.post("/v1/adapters", name="one", **{field: "/etc"}), 400)["param"] == field


def test_others_are_served_beside_hostile_ones(running: Running) -> None:
    """Not a measurement: that nobody waits for a client that does its worst."""
    over = threading.Event()
    body = b'{"model": "one", "prompt": ' + b"[" * 50_000

    def hostile() -> None:
        while not over.is_set():
            running.send("POST", TEXT, body)

    threads = [threading.Thread(target=hostile) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            began = time.monotonic()
            assert running.post(TEXT, model="two", prompt="a", max_tokens=2)[0] == 200
            assert time.monotonic() - began < SOON
    finally:
        over.set()
        for thread in threads:
            thread.join()
