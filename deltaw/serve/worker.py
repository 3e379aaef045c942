"""The thread that owns model and engine: requests come in from an event loop, pieces of answers go back to it.

In each round the thread lets go of whom has left, begins requests for which there are places, runs one step of the
engine (decoding.py), and hands over what came of it with one call into each event loop (outbox.py), whatever the number
of requests. So a client that leaves costs the token that is being made and no more, and nothing of torch runs in the
loop.

A client has at most `slots` rows decoded at a time. There are a quarter more places than that: whoever comes while one
client fills all of its own finds one. Those who wait take turns by client (line.py).

An adapter for which the model must be tried again (adapters.py) waits until nothing runs, and nobody overtakes it.
"""

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from deltaw.errors import DeltawError, InputError, RunError, with_kind
from deltaw.generate.check import check
from deltaw.kernels.copies import making
from deltaw.model import Model
from deltaw.serve.adapters import Adapters, Later, Served
from deltaw.serve.answering import Answering
from deltaw.serve.ask import MOST_SCALE, Ask, Busy
from deltaw.serve.decoding import Decoding
from deltaw.serve.figures import Figures
from deltaw.serve.line import Line
from deltaw.serve.outbox import Outbox

T = TypeVar("T")
STOPPING = "the server is stopping"


@dataclass(eq=False)
class _Job:
    """Something to begin that may have to wait for what runs. `wanted`: whether anybody still waits for it; `drop` is
    called where nobody does."""

    run: Callable[[], None]
    fail: Callable[[BaseException], None]
    wanted: Callable[[], bool]
    drop: Callable[[], None] = lambda: None


class Worker:
    """One thread that answers. `slots`: how many rows one client may have decoded at a time; `queue`: how many requests
    may wait."""

    def __init__(self, model: Model, adapters: Adapters, *, slots: int = 16, queue: int = 256) -> None:
        if slots < 1 or queue < 1:
            raise InputError(f"slots is {slots} and queue {queue}; both must be at least 1")
        self.model, self.adapters, self.slots, self.queue = model, adapters, slots, queue
        self._outbox = Outbox()
        self.decoding = Decoding(model, adapters, slots + max(1, slots // 4), self._outbox)
        self._figures = adapters.figures
        self._thread = threading.Thread(target=self._work, name="deltaw-worker", daemon=True)
        self._ready = threading.Event()
        # Shared with other threads, under this lock.
        self._changed = threading.Condition()
        self._line: Line[Answering] = Line()
        self._left: list[Answering] = []
        self._jobs: deque[_Job] = deque()
        self._closing = False
        # The thread's own.
        self._held: tuple[_Job, Later, int] | None = None

    def start(self) -> None:
        """Begin to answer; what comes before it is `ready` waits."""
        self._thread.start()

    def ready(self) -> None:
        """Wait until it answers without a wait. Raises RunError where it came to nothing."""
        self._ready.wait()
        if not self.alive:
            raise RunError("the server's worker couldn't begin")

    def close(self, timeout: float = 10.0) -> None:
        """End all requests with an error, and the thread. Returns within `timeout` seconds whatever the thread does."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if self._thread.ident is None or self._thread.is_alive():
            self._end_all(RunError(STOPPING))

    @property
    def alive(self) -> bool:
        """Whether it answers: for /health."""
        return self._thread.is_alive() and not self._closing

    @property
    def busy(self) -> int:
        """How many requests run or wait."""
        return len(self.decoding.running) + len(self._line)

    def figures(self) -> Figures:
        """What has been counted so far."""
        self._figures.running, self._figures.waiting = len(self.decoding.running), len(self._line)
        self._figures.prefix_tokens = self.decoding.reused
        return self._figures

    def submit(self, ask: Ask) -> Answering:
        """Queue a request, from a running event loop. Raises Busy where the queue is full or the worker is closed,
        Unknown for an adapter that isn't served, and InputError for a prompt or a number that can't be."""
        self._check(ask)
        answering = Answering(ask, self._leave)
        with self._changed:
            if not self.alive:
                raise Busy("the server doesn't answer requests now", 1)
            if len(self._line) >= self.queue:
                self._figures.refused += 1
                raise Busy(f"{len(self._line)} requests are waiting, and no more may", self._retry_after())
            self._line.add(answering)
            self._changed.notify()
        return answering

    async def load(self, name: str) -> Served:
        """Read an adapter's files now, also after `drop`, and put it on the model. Raises Unknown or InputError."""
        return await self._do(lambda: self.adapters.load(name))

    async def drop(self, name: str) -> None:
        """Serve it no more until `load`; requests that run end on it. Raises Unknown."""
        await self._do(lambda: self.adapters.drop(name))

    def _check(self, ask: Ask) -> None:
        check(self.model.base.model, ask.prompt, 0, ask.bias, full=not ask.answer)
        if not 1 <= ask.n <= self.slots:
            raise InputError(f"n is {ask.n}; at least 1 answer and at most {self.slots} can be asked for")
        if not 0 <= ask.scale <= MOST_SCALE:
            raise InputError(f"the adapter's scale is {ask.scale:g}; it must be from 0 to {MOST_SCALE:g}")
        if ask.adapter is not None:
            self.adapters.get(ask.adapter)

    def _retry_after(self) -> int:
        """In how many seconds there should be a place in the queue's first half."""
        return min(600, math.ceil(max(1.0, self.decoding.seconds * len(self._line) / 2 / self.slots)))

    async def _do(self, call: Callable[[], T]) -> T:
        """Have the thread call it, between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            value = call()
            self._outbox.tell(loop, lambda: None if future.done() else future.set_result(value))

        def fail(error: BaseException) -> None:
            self._outbox.tell(loop, lambda: None if future.done() else future.set_exception(error))

        with self._changed:
            if not self.alive:
                raise Busy("the server doesn't answer requests now", 1)
            self._jobs.append(_Job(run, fail, lambda: not future.done()))
            self._changed.notify()
        return await future

    def _leave(self, answering: Answering) -> None:
        """Its client has left."""
        with self._changed:
            self._left.append(answering)
            self._changed.notify()

    # From here on in the thread alone.

    def _work(self) -> None:
        error: BaseException = RunError(STOPPING)
        try:
            self.adapters.open()
            self.decoding.current_engine()
            self._ready.set()
            with making():  # often few rows run
                while self._wait():
                    self._round()
        except BaseException as failure:  # nobody would hear of it
            error = RunError(f"the server's worker failed: {with_kind(failure)}")
            raise
        finally:
            with self._changed:
                self._closing = True
            self._ready.set()
            self._end_all(error)
            self.adapters.close()

    def _wait(self) -> bool:
        """Until there is something to do. False when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self.busy or self._jobs or self._left or self._held)
            return not self._closing

    def _round(self) -> None:
        self._let_go()
        self._begin_some()
        self.decoding.step()
        self._outbox.flush()

    def _let_go(self) -> None:
        """Of those whose clients have left."""
        with self._changed:
            left, self._left = self._left, []
            waited = [answering for answering in left if self._line.remove(answering)]
        for answering in waited:
            self.decoding.ended(answering, "cancelled")
        self.decoding.let_go(left)

    def _begin_some(self) -> None:
        """What is waiting and has a place. Those that run wait for one adapter to be put on, and not for several."""
        loads = self._figures.adapter_loads
        while self._figures.adapter_loads == loads and (job := self._next()) is not None:
            if not job.wanted():
                job.drop()
                continue
            try:
                job.run()
            except Later as later:
                if self.decoding.running:
                    self._held = job, later, self.decoding.over
                    return
                job.fail(RunError("this adapter can't be put on the model beside the others"))
            except DeltawError as error:
                job.fail(error)
            except Exception as error:
                job.fail(RunError(f"the request failed: {with_kind(error)}"))

    def _next(self) -> _Job | None:
        if self._held is not None:
            job, later, over = self._held
            if self.decoding.running and job.wanted() and (later.quiet or over == self.decoding.over):
                return None
            self._held = None
            return job
        with self._changed:
            if self._jobs:
                return self._jobs.popleft()
            taken = self.decoding.rows_of_clients()
            free = self.decoding.places - sum(taken.values())
            answering = self._line.take(free, lambda a: taken.get(a.client, 0) + a.rows <= self.slots)
        return None if answering is None else self._asked(answering)

    def _asked(self, answering: Answering) -> _Job:
        """The beginning of a request."""
        return _Job(
            lambda: self.decoding.begin(answering),
            lambda error: self.decoding.ended(answering, "error", error),
            lambda: answering not in self._left,
            lambda: self.decoding.ended(answering, "cancelled"),
        )

    def _end_all(self, error: BaseException) -> None:
        """Those that run, and those that wait."""
        self.decoding.end_all(error)
        with self._changed:
            jobs = [*self._jobs, *([self._held[0]] if self._held else [])]
            jobs += [self._asked(answering) for answering in self._line]
            self._line, self._held = Line(), None
            self._jobs.clear()
        for job in jobs:
            job.fail(error)
        self._outbox.flush()
