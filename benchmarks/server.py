"""`deltaw serve` beside its own engine, and its clients beside hostile ones. To be run on an idle machine.

    python -m benchmarks.server [overhead] [hostile] [--rounds 5] [--seconds 30] [--record]

overhead  16 streams of 48 new tokens after prompts of 20 (greedy, the base, nothing stops early), by the engine
          alone in this process and over HTTP as server-sent events from a server in another. The two take turns; the
          figure is the median over rounds of the server's time by the engine's, less one. What the clients take is
          in it.
hostile   four honest clients, each asking for 16 tokens again and again, alone and beside hostile ones: 64 slow
          connections, and one after the other, without a pause, bodies over the limit, bombs in gzip, JSON 100,000
          deep, keys twice, invalid UTF-8, header floods and endless chunks (those of tests/faults). They come from
          another address, in a process at the lowest priority: it is what the server spends on them that counts, not
          what they take of the machine. The figure is the 99th percentile of honest latencies beside them by that
          alone, rounds of each in turns.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection

from benchmarks.figures import Measured, note
from benchmarks.server_process import BASE, Server

STREAMS, PROMPT, NEW = 16, 20, 48
CLIENTS, SHORT, SLOW, ELSEWHERE = 4, 16, 64, "127.0.0.2"
SECTION = "Serving"


def prompts(count: int) -> list[list[int]]:
    chance = random.Random(0)
    return [[chance.randrange(1_000, 40_000) for _ in range(PROMPT)] for _ in range(count)]


def streamed(place: tuple[str, int], model: str, prompt: list[int], most: int) -> int:
    """Ask for a stream and read it; how many tokens it was said to have."""
    # An end token made impossible keeps every answer at its length.
    asked = {
        "model": model,
        "prompt": prompt,
        "max_tokens": most,
        "temperature": 0,
        "logit_bias": {"2": -100, "0": -100},
    }
    body = json.dumps({**asked, "stream": True, "stream_options": {"include_usage": True}})
    connection = HTTPConnection(*place, timeout=300)
    try:
        connection.request("POST", "/v1/completions", body)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        last = ""
        for line in answer:
            if line.startswith(b"data: {"):
                last = line.decode()[6:]
        return int(json.loads(last)["usage"]["completion_tokens"])
    finally:
        connection.close()


def overhead(rounds: int) -> float:
    """By how much the server takes longer than the engine."""
    import torch

    from deltaw.generate.cache import BASE as ALONE
    from deltaw.generate.engine import Engine
    from deltaw.generate.sampling import Sampling
    from deltaw.model import open_model

    model, asked = open_model(BASE).base.model, prompts(STREAMS)
    bias = {0: -100.0, 2: -100.0}

    def by_engine() -> float:
        began = time.perf_counter()
        engine = Engine(model, batch_size=STREAMS, copies=True)
        for prompt in asked:
            engine.add(prompt, Sampling(max_new_tokens=NEW), update=ALONE, bias=bias)
        tokens = 0
        while engine.busy:
            tokens += sum(event.token is not None for event in engine.step())
        assert tokens == NEW * STREAMS
        return time.perf_counter() - began

    def by_server(place: tuple[str, int], name: str, turn: int) -> float:
        own = [[turn + 1_000, *prompt[1:]] for prompt in asked]  # of which nothing is kept from the turn before
        began = time.perf_counter()
        with ThreadPoolExecutor(STREAMS) as pool:
            tokens = sum(pool.map(lambda prompt: streamed(place, name, prompt, NEW), own))
        assert tokens == NEW * STREAMS
        return time.perf_counter() - began

    ratios = []
    with Server() as server:
        place, name = server.place, server.base
        for turn in range(1 + rounds):  # the first is to warm up
            alone, served = by_engine(), by_server(place, name, turn)
            speeds = [NEW * STREAMS / seconds for seconds in (alone, served)]
            print(f"engine {speeds[0]:6.1f} tokens/s   server {speeds[1]:6.1f}   {served / alone - 1:+.1%}", flush=True)
            ratios.append(served / alone)
    print(f"torch has {torch.get_num_threads()} threads")
    return statistics.median(ratios[1:]) - 1


# Hostile clients


def _slow(place: tuple[str, int]) -> None:
    """A connection that sends a byte from time to time, opened anew when the server has had enough."""
    while True:
        with contextlib.suppress(OSError), _connected(place) as connection:
            for byte in b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 10_000:
                connection.sendall(bytes([byte]))
                time.sleep(0.5)


def _connected(place: tuple[str, int]) -> socket.socket:
    return socket.create_connection(place, timeout=60, source_address=(ELSEWHERE, 0))


def _body(place: tuple[str, int], n: int) -> None:
    from tests.faults.requests import body_of

    body, headers, _ = body_of(n)
    connection = HTTPConnection(*place, timeout=60, source_address=(ELSEWHERE, 0))
    try:
        sent = {name: value for name, value in headers if name != "content-length"}
        connection.request("POST", "/v1/completions", body, sent)
        connection.getresponse().read()
    finally:
        connection.close()


def _connection(place: tuple[str, int], n: int) -> None:
    from tests.faults.clients import SOCKETS

    quick = [parts for parts, _, pause in SOCKETS.values() if not pause]
    with _connected(place) as connection:
        for part in quick[n % len(quick)](random.Random(n)):
            connection.sendall(part)
        while connection.recv(2**16):
            pass


def attack(place: tuple[str, int]) -> None:
    """Until the process is ended: prints a line with each hundred requests."""
    os.nice(19)
    for _ in range(SLOW):
        threading.Thread(target=_slow, args=(place,), daemon=True).start()
    print("begun", flush=True)
    for n in range(10**9):
        with contextlib.suppress(OSError):
            (_body if n % 4 else _connection)(place, n)
        if n % 100 == 99:
            print(n + 1, flush=True)


@contextmanager
def attacked(place: tuple[str, int]) -> Iterator[None]:
    command = [sys.executable, "-m", "benchmarks.server", "attack", f"{place[0]}:{place[1]}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1)
    try:
        yield
    finally:
        process.terminate()
        lines = process.stdout.read().split()
        print(f"  hostile requests: {lines[-1] if lines else 'fewer than 100'}")
        process.wait()


def honest(place: tuple[str, int], name: str, seconds: float) -> list[float]:
    """Latencies of four clients that ask for so long."""
    until, took, number = time.monotonic() + seconds, list[float](), iter(range(10**9))

    def client(_: int) -> None:
        while time.monotonic() < until:
            prompt, began = [next(number) % 40_000, *prompts(1)[0][1:]], time.perf_counter()
            assert streamed(place, name, prompt, SHORT) == SHORT
            took.append(time.perf_counter() - began)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
    return took


def hostile(rounds: int, seconds: float) -> float:
    """The honest clients' 99th percentile beside hostile ones, by that alone."""
    alone, beside = list[float](), list[float]()
    with Server() as server:
        place, name = server.place, server.base
        honest(place, name, 3)
        for _ in range(rounds):
            alone += honest(place, name, seconds)
            with attacked(place):
                beside += honest(place, name, seconds)
            shown = [f"{_p99(took):.3f} s of {len(took)} answers" for took in (alone, beside)]
            print(f"99th percentile alone {shown[0]}, beside hostile clients {shown[1]}", flush=True)
    return _p99(beside) / _p99(alone)


def _p99(took: list[float]) -> float:
    return statistics.quantiles(took, n=100)[98]


def main() -> None:
    if sys.argv[1:2] == ["attack"]:
        host, _, port = sys.argv[2].rpartition(":")
        attack((host, int(port)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["overhead", "hostile", []], help="which; both where none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30, help="of each round of hostile clients")
    parser.add_argument("--record", action="store_true", help="note the figures in benchmarks/figures.csv")
    given = parser.parse_args()
    figures: dict[str, Callable[[], Measured]] = {
        "overhead": lambda: Measured(
            SECTION,
            "what 16 streams over HTTP take longer than by the engine",
            overhead(given.rounds),
            unit="%",
            bound=0.05,
            at_most=True,
        ),
        "hostile": lambda: Measured(
            SECTION,
            "99th percentile of honest clients' latency beside hostile ones, of that alone",
            hostile(given.rounds, given.seconds),
            bound=1.5,
            at_most=True,
        ),
    }
    for name in given.parts or figures:
        measured = figures[name]()
        print(f"{measured.name}: {measured.value:.3g} (wanted: at most {measured.bound:g})")
        if given.record:
            note(measured)


if __name__ == "__main__":
    main()
