"""The thread that owns model and engine: requests come in from an event loop, pieces of answers go back to it.

In each round the thread lets go of whom has left, begins requests for which there are places, runs one step of the
engine, and hands over what came of it with one call into the event loop, whatever the number of requests. So a client
that leaves costs the token that is being made and no more, and nothing of torch runs in the loop.

A client has at most `slots` rows decoded at a time. There are a quarter more places than that: whoever comes while one
client fills all of its own finds one. Those who wait take turns by client (line.py).

What goes wrong with a request ends it alone: an adapter that doesn't fit, logits that aren't finite. What goes wrong
with the engine ends all that run, and the others go on with a new one. An adapter for which the model must be tried
again (adapters.py) waits until nothing runs, and nobody overtakes it.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from deltaw.errors import DeltawError, InputError, RunError, with_kind
from deltaw.generate.engine import Engine, check
from deltaw.generate.sampling import NotFinite
from deltaw.kernels.bags import making
from deltaw.model import Model
from deltaw.serve.adapters import Adapters, Later, Served
from deltaw.serve.answering import Answering
from deltaw.serve.ask import MOST_SCALE, Ask, Busy
from deltaw.serve.figures import Figures
from deltaw.serve.line import Line
from deltaw.serve.running import Running

T = TypeVar("T")
SMOOTH = 0.1  # the share of the last request in how long one takes
STOPPING = "the server is stopping"


@dataclass(eq=False)
class _Job:
    """Something to begin that may have to wait for what runs. `wanted`: whether anybody still waits for it."""

    run: Callable[[], None]
    fail: Callable[[BaseException], None]
    wanted: Callable[[], bool]


class Worker:
    """One thread that answers. `slots`: how many rows one client may have decoded at a time; `queue`: how many requests
    may wait."""

    def __init__(self, model: Model, adapters: Adapters, *, slots: int = 16, queue: int = 256) -> None:
        if slots < 1 or queue < 1:
            raise InputError(f"slots is {slots} and queue {queue}; both must be at least 1")
        self.model, self.adapters, self.slots, self.queue = model, adapters, slots, queue
        self._places = slots + max(1, slots // 4)
        self._figures = adapters.figures
        self._thread = threading.Thread(target=self._work, name="deltaw-worker", daemon=True)
        # Shared with other threads, under this lock.
        self._changed = threading.Condition()
        self._line: Line[Answering] = Line()
        self._left: list[Answering] = []
        self._jobs: deque[_Job] = deque()
        self._submitted: dict[Answering, float] = {}
        self._closing = False
        # The thread's own.
        self._engine: Engine | None = None
        self._layers = -1
        self._running: list[Running] = []
        self._by_row: dict[int, Running] = {}
        self._held: tuple[_Job, Later, int] | None = None
        self._over = 0  # how many requests have ended
        self._seconds = 0.0  # that one takes, smoothed
        self._reused = 0  # tokens of prompts, by engines before this one
        self._out: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

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

    def figures(self) -> Figures:
        """What has been counted so far."""
        engine = self._engine
        self._figures.running, self._figures.waiting = len(self._running), len(self._line)
        self._figures.prefix_tokens = self._reused + (engine.reused if engine else 0)
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
            self._submitted[answering] = time.monotonic()
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
        return min(600, math.ceil(max(1.0, self._seconds * len(self._line) / 2 / self.slots)))

    async def _do(self, call: Callable[[], T]) -> T:
        """Have the thread call it, between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            value = call()
            self._tell(loop, lambda: None if future.done() else future.set_result(value))

        def fail(error: BaseException) -> None:
            self._tell(loop, lambda: None if future.done() else future.set_exception(error))

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
            with making():  # often few rows run
                while self._wait():
                    self._round()
        except BaseException as failure:  # nobody would hear of it
            error = RunError(f"the server's worker failed: {with_kind(failure)}")
            raise
        finally:
            with self._changed:
                self._closing = True
            self._end_all(error)
            self._flush()
            self.adapters.close()

    def _wait(self) -> bool:
        """Until there is something to do. False when all is over."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._running or self._jobs or self._left or self._held or len(self._line)
            )
            return not self._closing

    def _round(self) -> None:
        self._let_go()
        self._begin_some()
        self._step()
        self._flush()

    def _let_go(self) -> None:
        """Of those whose clients have left."""
        with self._changed:
            left, self._left = self._left, []
            waited = [answering for answering in left if self._line.remove(answering)]
        for answering in waited:
            self._submitted.pop(answering, None)
            self._count_end("cancelled")
            self._tell(answering.loop, answering.end)
        for running in [running for running in self._running if running.answering in left]:
            self._end(running, "cancelled")

    def _begin_some(self) -> None:
        """What is waiting and has a place. Those that run wait for one adapter to be put on, and not for several."""
        loads = self._figures.adapter_loads
        while self._figures.adapter_loads == loads and (job := self._next()) is not None:
            if not job.wanted():
                continue
            try:
                job.run()
            except Later as later:
                if self._running:
                    self._held = job, later, self._over
                    return
                job.fail(RunError("this adapter can't be put on the model beside the others"))
            except DeltawError as error:
                job.fail(error)
            except Exception as error:
                job.fail(RunError(f"the request failed: {with_kind(error)}"))

    def _next(self) -> _Job | None:
        if self._held is not None:
            job, later, over = self._held
            if self._running and job.wanted() and (later.quiet or over == self._over):
                return None
            self._held = None
            return job
        with self._changed:
            if self._jobs:
                return self._jobs.popleft()
            taken: dict[str, int] = {}
            for running in self._running:
                client = running.answering.client
                taken[client] = taken.get(client, 0) + len(running.ids)
            free = self._places - sum(taken.values())
            answering = self._line.take(free, lambda a: taken.get(a.client, 0) + a.rows <= self.slots)
            submitted = 0.0 if answering is None else self._submitted.pop(answering)
        if answering is None:
            return None
        return self._asked(answering, submitted)

    def _asked(self, answering: Answering, submitted: float) -> _Job:
        """The beginning of a request."""

        def fail(error: BaseException) -> None:
            self._count_end("error")
            self._tell(answering.loop, lambda: answering.end(error))

        return _Job(lambda: self._begin(answering, submitted), fail, lambda: answering not in self._left)

    def _begin(self, answering: Answering, submitted: float) -> None:
        """Raises Later, or what is wrong with the request."""
        ask = answering.ask
        taken = self.adapters.take(ask.adapter, ask.scale)
        try:
            engine, decode = self._current_engine(), self.model.renderer.decode
            room = min(ask.sampling.max_new_tokens, self.model.context - len(ask.prompt))
            running = Running(answering, taken, decode, room=room, submitted=submitted, begun=time.monotonic())
            if ask.echo:
                wanted = ask.logprobs is not None
                scored = engine.score(ask.prompt, update=taken.number, top=ask.logprobs or 0) if wanted else None
                running.echo(scored)
            for index in range(ask.n if ask.answer else 0):
                id = engine.add(
                    ask.prompt,
                    ask.sampling,
                    self.model.renderer.stop_ids if ask.stop_ids is None else ask.stop_ids,
                    number=index,
                    update=taken.number,
                    key=taken.key,
                    logprobs=ask.logprobs,
                    bias=ask.bias,
                )
                running.ids[id] = index
        except BaseException:
            self.adapters.release(taken)
            raise
        served = None if taken.version is None else taken.version.served
        self._figures.prompt_tokens += len(ask.prompt)
        self._running.append(running)
        self._by_row |= dict.fromkeys(running.ids, running)
        self._tell(answering.loop, lambda: answering.begin(served))
        if not ask.answer:
            running.no_answer()
            self._end(running, running.finish)

    def _current_engine(self) -> Engine:
        """A new one where the model's layers have changed; nothing runs then."""
        if self._engine is None or self._layers != self.adapters.changes:
            self._forget()
            self._engine, self._layers = Engine(self.model.base.model, batch_size=self._places), self.adapters.changes
        return self._engine

    def _forget(self) -> None:
        """The engine, with all that it keeps."""
        self._reused += self._engine.reused if self._engine else 0
        self._engine = None

    def _step(self) -> None:
        """One token of each row."""
        if self._engine is None or not self._running:
            return
        try:
            events = self._engine.step()
        except NotFinite as error:
            for running in {self._by_row[id] for id in error.rows if id in self._by_row}:
                self._end(running, "error", error)
            return
        except Exception as error:
            self._restart(error)
            return
        now = time.monotonic()
        for event in events:
            owner = self._by_row.get(event.id)
            if owner is None:  # of a row that has just been cancelled
                continue
            if owner.take(event, now, self._figures):
                self._engine.cancel(event.id)
            if event.id not in owner.ids:
                del self._by_row[event.id]
        for running in list(self._running):
            if not running.ids:
                self._end(running, running.finish)
            elif running.pieces or running.new:
                self._hand_over(running)

    def _restart(self, error: Exception) -> None:
        """The engine has failed: all that run end, and the next begin with a new one."""
        self._figures.restarts += 1
        self._forget()
        failure = error if isinstance(error, DeltawError) else RunError(f"decoding failed: {with_kind(error)}")
        for running in list(self._running):
            self._end(running, "error", failure)

    def _end(self, running: Running, how: str, error: BaseException | None = None) -> None:
        """Of one request: its rows, its hold on the adapter, its place."""
        for id in running.ids:
            self._by_row.pop(id, None)
            if self._engine is not None:
                self._engine.cancel(id)
        self._running.remove(running)
        self._hand_over(running)
        self._count_end(how)
        if how in ("stop", "length"):
            seconds = time.monotonic() - running.begun
            self._figures.latency.observe(seconds)
            self._seconds += (seconds - self._seconds) * (SMOOTH if self._seconds else 1.0)
        self.adapters.release(running.taken)
        self._tell(running.answering.loop, lambda: running.answering.end(error))

    def _hand_over(self, running: Running) -> None:
        pieces, new = running.pieces, running.new
        running.pieces, running.new = [], 0
        self._tell(running.answering.loop, lambda: running.answering.take(pieces, new))

    def _count_end(self, how: str) -> None:
        self._over += 1
        self._figures.ended[how] = self._figures.ended.get(how, 0) + 1

    def _end_all(self, error: BaseException) -> None:
        """Those that run, and those that wait."""
        for running in list(self._running):
            self._end(running, "error", error)
        with self._changed:
            jobs = [*self._jobs, *([self._held[0]] if self._held else [])]
            jobs += [self._asked(answering, 0.0) for answering in self._line]
            self._line, self._held = Line(), None
            self._jobs.clear()
        for job in jobs:
            job.fail(error)
        self._flush()

    def _tell(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        """Have it called in the event loop, at the end of the round."""
        self._out.setdefault(loop, []).append(call)

    def _flush(self) -> None:
        out, self._out = self._out, {}
        for loop, calls in out.items():

            def tell(calls: list[Callable[[], None]] = calls) -> None:
                for call in calls:
                    call()

            if not loop.is_closed():
                loop.call_soon_threadsafe(tell)
