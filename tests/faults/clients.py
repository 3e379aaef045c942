"""How clients behave towards a server: slow, endless or no HTTP at all (57), gone in the middle of an answer (58), more
of them than there are places (61)."""

import asyncio
import atexit
import contextlib
import json
import random
import socket
import time
from functools import cache
from typing import Any

from deltaw.adapter.file import Adapter
from tests.faults.common import changed
from tests.faults.fault import expect, fault
from tests.faults.served import CHAT, HELLO, TEXT, Answer, adapters_folder, serve, served, soon
from tests.serve.canaries import PROMPTS, TOKENS
from tests.serve.serving import KEY, Running, serving

# 57, how a request comes: over a real socket

HEAD, BODY, SLACK, CONNECTIONS = 0.25, 0.25, 1.0, 24


@cache
def listening() -> Running:
    """A server on a socket that waits a quarter of a second for a request's head and as long for its body."""
    canaries, folder = adapters_folder()
    limits = {"head_seconds": HEAD, "body_seconds": BODY, "connections": CONNECTIONS}
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(serving(canaries.base, folder, limits=limits))


def head(*headers: str) -> bytes:
    lines = [f"POST {TEXT} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}", *headers, "", ""]
    return "\r\n".join(lines).encode()


def flood(chance: random.Random) -> list[bytes]:
    return [b"GET / HTTP/1.1\r\n", *[b"X-%d: y\r\n" % i * 50 for i in range(chance.randrange(100, 2_000))]]


def long_header(chance: random.Random) -> list[bytes]:
    return [b"GET / HTTP/1.1\r\nX: ", *[b"y" * 10_000] * chance.randrange(4, 100)]


def no_http(chance: random.Random) -> list[bytes]:
    begins = (b"\x16\x03\x01", b"SSH-2.0-x\r\n", b"GET /\r\n\r\n", b"\x00" * 50, b"POST  / HTTP/9.9\r\n\r\n")
    return [chance.choice(begins), chance.randbytes(200), b"\r\n\r\n"]


def two_lengths(chance: random.Random) -> list[bytes]:
    size = chance.choice(("-1", "1e3", "0x10", "5\r\nContent-Length: 6", "", "٣"))
    return [head(f"Content-Length: {size}".encode().decode("latin-1")), b"x" * 10]


def bad_chunks(chance: random.Random) -> list[bytes]:
    sizes = (b"-5", b"zz", b"f" * 40, b"5;" + b"x" * 20_000, b"")
    return [head("Transfer-Encoding: chunked"), chance.choice(sizes) + b"\r\nabcde\r\n"]


def endless(chance: random.Random) -> list[bytes]:
    size = chance.randrange(1_000, 100_000)
    return [head("Transfer-Encoding: chunked"), *[b"%x\r\n" % size + b" " * size + b"\r\n"] * (2**21 // size)]


def drops(chance: random.Random) -> list[bytes]:
    """One byte after the other, for longer than the server waits; the whole would be an honest request."""
    body = json.dumps({"model": "one", "prompt": "a", "max_tokens": 1}).encode()
    whole = head(f"Content-Length: {len(body)}") + body
    begun = chance.choice((0, 10, len(whole) - len(body), len(whole) - 20))
    return [whole[:begun], *(whole[i : i + 1] for i in range(begun, begun + 20))]


SOCKETS = {
    "headers without end": (flood, 400, 0.0),
    "a header without end": (long_header, 400, 0.0),
    "no HTTP": (no_http, 400, 0.0),
    "lengths that are none": (two_lengths, 400, 0.0),
    "chunks that are none": (bad_chunks, 400, 0.0),  # or 408: one of endless length is waited for
    "a body without end": (endless, 413, 0.0),
    "drop by drop": (drops, 408, 0.04),
}


@fault(
    57,
    "header floods, slowloris in head and body, endless and broken chunks, what is no HTTP, on a real socket: 400, 413 "
    "or 408 in time, and an honest client is answered beside it",
    tries=350,
    sample=len(SOCKETS),
    at_once=50,
)
def hostile_connection(n: int, scratch: Any) -> None:
    server = listening()
    parts, status, pause = SOCKETS[list(SOCKETS)[n % len(SOCKETS)]]
    began = time.monotonic()
    with server.open() as connection:
        data = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts(random.Random(n)):
                connection.sendall(part)
                time.sleep(pause)
        expect(server.post(TEXT, model="two", prompt="a", max_tokens=1)[0] == 200, "nobody else is answered")
        with contextlib.suppress(ConnectionResetError):  # it hung up on what was still coming
            while part := connection.recv(2**16):
                data += part
    took = time.monotonic() - began
    answered = data.split(b" ", 2)[1:2] in ([b"%d" % status], [b"408"])
    expect(answered or (not data and status == 400), f"{list(SOCKETS)[n % len(SOCKETS)]}: {data[:200]!r}")
    expect(took < 20 * pause + HEAD + BODY + 2 + SLACK, f"{took:.1f} s")
    expect(not server.said, server.said)


@fault(
    57,
    "more connections than the server takes, all silent: 503 with Retry-After for those over, the others 408, and then "
    "everybody is answered",
    tries=20,
    sample=1,
    at_once=20,
)
def crowd(n: int, scratch: Any) -> None:
    server = listening()
    connections = [server.open() for _ in range(CONNECTIONS + 1 + n % 5)]
    firsts = [_first(connection) for connection in connections]
    expect(firsts.count(b"503") >= 1 + n % 5 and set(firsts) == {b"503", b"408"}, firsts)
    for connection in connections:
        connection.close()
    until = time.monotonic() + 5
    while server.server.server_state.connections and time.monotonic() < until:
        time.sleep(0.005)
    expect(server.post(TEXT, model="two", prompt="a", max_tokens=1)[0] == 200, "nobody is answered")


def _first(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(2**16):
        data += part
    expect(b"retry-after" in data.lower() or b" 503 " not in data, data[:200])
    return data.split(b" ", 2)[1]


# 58


@fault(
    58,
    "a client that leaves while its answer is prepared, streamed or made whole: at most one token more is made, its "
    "place is free, nothing is left behind, memory flat",
    tries=10_000,
    sample=40,
    at_once=2_500,
)
def client_leaves(n: int, scratch: Any) -> None:
    server, chance = served(), random.Random(n)
    worker, figures = server.worker, server.worker.figures()
    stream, after, told = chance.random() < 0.7, chance.randrange(4), list[tuple[int, float]]()
    asked = {"model": chance.choice((server.base, "one", "two")), "max_tokens": 200, "logit_bias": {"70": 100}}
    route, more = chance.choice(((TEXT, {"prompt": "ab"}), (CHAT, {"messages": HELLO})))
    body = json.dumps({**asked, **more, "stream": stream, "n": chance.choice((1, 1, 2))}).encode()
    at_leaving = 0.0

    async def leaves(answer: Answer) -> None:
        nonlocal at_leaving
        made, until = figures.generation_tokens, time.monotonic() + 5
        while time.monotonic() < until:
            if answer.body.count(b"data: ") > after or (not stream and figures.generation_tokens >= made + after):
                break
            await asyncio.sleep(0.0003)
        at_leaving = time.monotonic()

    leave = worker._leave

    def left(answering: Any) -> None:
        told.append((figures.generation_tokens, time.monotonic()))
        leave(answering)

    with changed(worker, "_leave", left):
        server.run(server.ask("POST", route, body, leave=leaves))
        server.at_rest()
    rows = json.loads(body)["n"]
    if told:
        tokens, moment = told[0]
        expect(figures.generation_tokens - tokens <= rows, f"{figures.generation_tokens - tokens} tokens more")
        expect(moment - at_leaving < 1, f"it heard of it after {moment - at_leaving:.2f} s")
    if n % 100 == 0:
        soon(scratch, lambda: server.send("GET", "/health"))


# 61


@cache
def small() -> Any:
    """Four places and a queue of sixteen."""
    canaries, folder = adapters_folder()
    return serve(canaries, folder, slots=4, queue=16)


@fault(
    61,
    "300 requests at once from one to ten clients, for 4 places and a queue of 16: each is answered rightly or refused "
    "with 429 or 503 and Retry-After; the queue is never longer, memory flat, nothing left behind",
    tries=100,
    sample=1,
    at_once=25,
)
def over_capacity(n: int, scratch: Any) -> None:
    server, chance, longest = small(), random.Random(n), 0
    clients, statuses = chance.randint(1, 10), list[int]()
    adapters = {"one": Adapter.load(server.folder / "one"), "two": Adapter.load(server.folder / "two"), None: None}
    right = {name: server.canaries.all_expected(adapter) for name, adapter in adapters.items()}

    async def one(number: int) -> None:
        name, prompt = chance.choice(list(adapters)), chance.choice(PROMPTS)
        asked = {"model": name or server.base, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
        await asyncio.sleep(chance.random() / 20)
        answer = await server.ask("POST", TEXT, json.dumps(asked).encode(), client=f"10.0.0.{number % clients}")
        statuses.append(answer.status)
        if answer.status == 200:
            expect(answer.value["choices"][0]["text"] == right[name][prompt], f"a wrong answer for {name}")
        else:
            answer.refused(429, 503)
            expect(int(answer.headers["retry-after"]) >= 1, answer.headers)

    async def all_of_them() -> None:
        nonlocal longest
        tasks = [asyncio.ensure_future(one(number)) for number in range(300)]
        while not all(task.done() for task in tasks):
            longest = max(longest, len(server.worker._line))
            await asyncio.sleep(0.001)
        for task in tasks:
            task.result()

    server.run(all_of_them())
    expect(longest <= 16 and statuses.count(200) >= 12, (longest, statuses))
    expect(set(statuses) - {200}, "everybody found a place")
    soon(scratch, lambda: server.send("GET", "/health"))
    server.at_rest()
