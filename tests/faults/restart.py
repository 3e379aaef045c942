"""A server is killed at any moment, in the middle of answers and of putting adapters on, and started again (64)."""

import json
import random
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from deltaw.adapter.file import Adapter
from tests.faults.common import QUIET, Ended, child
from tests.faults.fault import expect, fault
from tests.faults.served import ADAPTERS, TEXT, adapters_folder
from tests.serve.canaries import PROMPTS, TOKENS


def serving(base: Path, folder: Path, port: int, told: Path) -> Callable[[], None]:
    """A child's work: `deltaw serve BASE --adapters FOLDER --port PORT`; its address comes into the file. In float32,
    as what it is compared with: a random model's likeliest token changes with the rounding of bfloat16."""

    def work() -> None:
        from deltaw.base import load
        from deltaw.commands.serve import Place, serve_named

        load.fast_dtype = lambda *_: torch.float32  # type: ignore[assignment]

        def show(result: Any) -> None:
            told.with_suffix(".new").write_text(result.data["address"])
            told.with_suffix(".new").replace(told)

        place = Place("127.0.0.1", port)
        serve_named(str(base), folder=str(folder), weights=None, place=place, show=show, display=QUIET)

    return work


def asked(address: str, method: str, path: str, body: Any = None) -> Any:
    host, _, port = address.removeprefix("http://").rpartition(":")
    connection = HTTPConnection(host, int(port), timeout=20)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        value = json.loads(answer.read())
        expect(answer.status == 200, value)
        return value
    finally:
        connection.close()


class Server:
    """A child that serves. It is killed after `seconds` behind its beginning to answer, or by SIGKILL at the end."""

    def __init__(self, base: Path, folder: Path, port: int, scratch: Path, turn: str) -> None:
        self._told, self._stop = scratch / f"{turn}.address", scratch / f"{turn}.stop"
        self._ended: list[Ended] = []
        work = serving(base, folder, port, self._told)
        self._thread = Thread(target=lambda: self._ended.append(child(work, kill=self._kills(), limit=5)))
        self._thread.start()

    def _kills(self) -> Any:
        until = time.monotonic() + 60
        while not self._stop.exists() and time.monotonic() < until:
            yield 0.005, 0  # signal 0 only looks whether it is there
        yield 0.0, 9

    @property
    def address(self) -> str:
        """Once it answers."""
        until = time.monotonic() + 60
        while not self._told.exists():
            expect(time.monotonic() < until and not self._ended, f"it doesn't begin: {self._ended}")
            time.sleep(0.005)
        return self._told.read_text()

    def kill(self) -> Ended:
        """With SIGKILL."""
        self._stop.touch()
        self._thread.join()
        return self._ended[0]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies in a folder, with times and sizes."""
    return {str(p.relative_to(folder)): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*")}


@fault(
    64,
    "kill -9 at a random moment, while answers stream and adapters are put on, and a new start at once: the port is "
    "free, the same adapters are there and answer alike, and nothing was written",
    tries=50,
    sample=1,
    at_once=10,
)
def killed_server(n: int, scratch: Path) -> None:
    canaries, folder = adapters_folder()
    chance, before = random.Random(n), listing(folder)
    adapters = {name: Adapter.load(folder / name) for name in ("one", "two")}
    right = {name: canaries.all_expected(adapter) for name, adapter in adapters.items()}
    first = Server(canaries.base, folder, 0, scratch, f"{n}-first")
    address = first.address
    models = asked(address, "GET", "/v1/models")

    def busy(name: str) -> None:
        for _ in range(1_000):
            try:
                asked(address, "POST", ADAPTERS, {"name": name})
                asked(address, "POST", TEXT, {"model": name, "prompt": "ab", "max_tokens": 100, "stream": False})
            except (OSError, HTTPException, ValueError):
                return  # it was killed

    clients = [Thread(target=busy, args=(chance.choice(("one", "two")),)) for _ in range(3)]
    for client in clients:
        client.start()
    time.sleep(chance.random() * 0.6)
    ended = first.kill()
    second = Server(canaries.base, folder, int(address.rpartition(":")[2]), scratch, f"{n}-second")
    for client in clients:
        client.join()
    try:
        expect(ended.code == 137, ended)
        expect(second.address == address, "another address")
        expect(asked(address, "GET", "/v1/models") == models, "other models")
        for name, answers in right.items():
            for prompt in PROMPTS:
                body = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS}
                text = asked(address, "POST", TEXT, body)["choices"][0]["text"]
                expect(text == answers[prompt], f"{name} answers {text!r}")
        expect(listing(folder) == before, "something was written")
    finally:
        second.kill()
