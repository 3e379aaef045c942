"""A server over the tiny base in this process, asked without a socket: a request is a call of the application, so ten
thousand of them are a minute's work, and what it opens, counts and keeps can be looked at from inside.

    server = place_served()
    status, answer = server.post("/v1/completions", model="one", prompt="a", max_tokens=1)
"""

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import deltaw
from deltaw.serve.adapters import Adapters
from deltaw.serve.app import build
from deltaw.serve.guard import Access
from deltaw.serve.limits import Limits
from deltaw.serve.worker import Worker
from tests.faults.common import place
from tests.faults.fault import expect
from tests.faults.templates import peak
from tests.serve.canaries import Canaries

T = TypeVar("T")
Message = dict[str, Any]
KEY = "the-key-of-the-faults"
CHAT, TEXT, ADAPTERS = "/v1/chat/completions", "/v1/completions", "/v1/adapters"
HELLO = [{"role": "user", "content": "hello"}]
SOON, FLAT = 0.05, 24 * 2**20  # seconds until a refusal; bytes that thousands of requests may leave behind
SECRET = "what no answer may show"


@dataclass
class Answer:
    """What came back. `began`: when its status did."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    began: float = 0.0

    @property
    def value(self) -> Any:
        return json.loads(self.body)

    def refused(self, *statuses: int) -> dict[str, Any]:
        """Its error, which must be one of OpenAI's form, of one of these statuses."""
        expect(self.status in statuses, f"{self.status}, not {statuses}: {self.body[:200]!r}")
        error = self.value["error"]
        expect(set(error) == {"message", "type", "param", "code"} and error["message"], error)
        expect(SECRET not in error["message"] and len(error["message"]) < 1_000, error)
        return dict(error)


@dataclass
class Served:
    """The application, and what stands behind it. `said`: what it said of defects, which must stay empty."""

    canaries: Canaries
    folder: Path
    worker: Worker
    app: Any
    limits: Limits
    said: list[str]
    loop: asyncio.AbstractEventLoop

    def run(self, work: Awaitable[T], seconds: float = 60.0) -> T:
        """In the server's event loop."""
        return self.loop.run_until_complete(asyncio.wait_for(work, seconds))

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Sequence[tuple[str, str]] = (),
        *,
        key: str | None = KEY,
        client: str = "127.0.0.1",
        leave: Callable[[Answer], Awaitable[object]] | None = None,
    ) -> Answer:
        """One request. `leave`: the client goes when this has come to its end; it is given what came so far."""
        sent = [("host", "localhost"), *headers, *([("authorization", f"Bearer {key}")] if key is not None else [])]
        raw, _, query = path.encode("utf-8", "surrogatepass").partition(b"?")
        scope = {
            "type": "http",
            "method": method,
            "path": unquote_to_bytes(raw).decode("utf-8", "replace"),
            "raw_path": raw,
            "query_string": query,
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in sent],
            "client": (client, 1),
            "server": ("localhost", 80),
            "scheme": "http",
            "http_version": "1.1",
            "root_path": "",
        }
        answer, given = Answer(), False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await (asyncio.Event().wait() if leave is None else leave(answer))
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.began = message["status"], time.monotonic()
                answer.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
            else:
                answer.body += message.get("body", b"")

        await self.app(scope, receive, send)
        for kept in (self.canaries.folder, Path(deltaw.__file__).parent):
            expect(str(kept).encode() not in answer.body, f"it tells where it keeps its files: {answer.body!r:.300}")
        return answer

    def send(self, method: str, path: str, body: bytes = b"", **how: Any) -> Answer:
        """The same, waited for."""
        return self.run(self.ask(method, path, body, **how))

    def post(self, path: str, **body: Any) -> Answer:
        """A request with these fields."""
        return self.send("POST", path, json.dumps(body).encode())

    @property
    def base(self) -> str:
        """The base's name."""
        return self.worker.model.base.source.public_name

    def at_rest(self) -> None:
        """Nothing is left of all that was asked, and nothing went wrong inside."""
        until = time.monotonic() + 5
        while (self.worker.busy) and time.monotonic() < until:
            self.run(asyncio.sleep(0.001))
        engine, tasks = self.worker.decoding.engine, asyncio.all_tasks(self.loop)
        left = (self.worker.decoding.running, list(self.worker._line), self.worker.decoding.by_row)
        left += (self.worker.adapters._requests, tasks, engine is not None and engine.busy)
        expect(not any(left), f"left behind: {left!r:.300}")
        expect(self.worker.alive and not self.said, f"it said {self.said[:3]}")


@cache
def adapters_folder() -> tuple[Canaries, Path]:
    """A base with adapters that answer differently, one whose files are cut short, and a secret outside the folder."""
    canaries = Canaries(place() / "served")
    folder = canaries.folder / "adapters"
    for seed, name in enumerate(("one", "two"), 1):
        canaries.save(folder / name, seed)
    outside = canaries.save(canaries.folder / "outside", 3)
    (outside / "report.html").write_text(SECRET)
    (canaries.folder / "secret.txt").write_text(SECRET)
    (folder / "link").symlink_to(outside, target_is_directory=True)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "broken").mkdir()
    for file in (folder / "one").iterdir():
        (folder / "broken" / file.name).write_bytes(file.read_bytes()[:300])
    return canaries, folder


def serve(canaries: Canaries, folder: Path, **settings: Any) -> Served:
    """A server on this folder, until the process ends or its worker is closed."""
    model, said = canaries.open(), list[str]()
    worker = Worker(model, Adapters(model, folder), **settings)
    limits = Limits.of(model)
    app = build(worker, Access(KEY), limits=limits, say=said.append)
    worker.start()
    return Served(canaries, folder, worker, app, limits, said, asyncio.new_event_loop())


@cache
def served() -> Served:
    """One for this process. Tries leave its folder as it was. It has answered, so what is loaded once is loaded."""
    canaries, folder = adapters_folder()
    server = serve(canaries, folder, slots=8, queue=64)
    for name in (server.base, "one", "two"):
        for path, asked in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": HELLO})):
            answer = server.post(path, model=name, max_tokens=2, logprobs=path == CHAT or 1, **asked)
            expect(answer.status == 200, answer.body)
    for path in ("/v1/models", "/metrics", "/", "/health", ADAPTERS):
        expect(server.send("GET", path).status == 200, path)
    server.post(TEXT, model="one", prompt="a", nonsense=1).refused(400)
    return server


@cache
def _at_first(scratch: Path) -> int:
    """Bytes in use when the first of a chunk's tries begins, whose folder this is."""
    served()
    gc.collect()
    return _resident()


def soon(scratch: Path, work: Callable[[], T]) -> T:
    """What `work` comes to: within the time of a refusal, with no more memory at its height than `FLAT`, and no more in
    use than that after all of a chunk's tries. Where others take the machine, the time is that of this process, as long
    as it isn't waited for."""
    first = _at_first(scratch)
    Path("/proc/self/clear_refs").write_text("5")  # the height starts over
    before, began, worked = peak(), time.monotonic(), time.process_time()
    value = work()
    took, worked = time.monotonic() - began, time.process_time() - worked
    expect(took <= SOON or (worked <= SOON and took <= 20 * SOON), f"{took:.3f} s, of which it worked {worked:.3f} s")
    expect(peak() - before <= FLAT, f"{(peak() - before) / 2**20:.0f} MB at its height")
    expect(_resident() - first <= FLAT, f"{(_resident() - first) / 2**20:.0f} MB more than at first")
    return value


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_opened: list[str] | None = None


@cache
def _listen_to_files() -> None:
    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if _opened is not None and event in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename"):
            _opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else "")

    sys.addaudithook(heard)


@contextmanager
def opens_only(*folders: Path) -> Iterator[None]:
    """In the block no file or folder is opened but below these, by any thread."""
    global _opened
    _listen_to_files()
    _opened = []
    try:
        yield
    finally:
        opened, _opened = _opened, None
    real = [os.path.realpath(path) for path in opened if path]
    allowed = tuple(f"{os.path.realpath(folder)}" for folder in folders)
    outside = [path for path in real if not any(path == one or path.startswith(f"{one}/") for one in allowed)]
    expect(not outside, f"opened {outside[:3]}")
