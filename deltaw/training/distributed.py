"""torch.distributed and its store, as world.py needs them: sums that notice a dead rank, values by name, errors shared.

    reduce, broadcast     over the process group: gloo for what lies on the CPU, nccl for what lies on a GPU
    put, get              JSON in the store, under a prefix for each start of the processes
    enter                 counts the meetings of the ranks, so that it shows who hasn't come to one
    fail, leave           the end, in error and in order

The store is torchrun's own (its agent holds it, so it outlives the processes) or, where the processes were started
otherwise, rank 0's. A thread writes a sign of life there: this process's count, and which meeting it is at.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deltaw.errors import DeltawError, InputError, with_kind
from deltaw.training.stop import Lost, Stopped

TIMEOUT = "DELTAW_TIMEOUT"  # seconds that a rank waits for another one in a step
USUAL, STILL = 600.0, 60.0  # seconds: TIMEOUT's default; without a sign of life, until a rank is taken for dead
BEAT, LOOK = 1.0, 0.5  # seconds between two signs of life, and two looks at the others
NAP = 1e-3  # seconds, at most, between two looks at a sum
GRACE = 1.0  # seconds that a rank leaves rank 0 to say why all end: torchrun stops all when one ends
LEAVE = 5.0  # seconds that ranks which end in error wait for each other
USES_AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun's agent holds the store
MARKS = "deltaw/marks/"


class Link:
    """This process's connection to the others. `generation`: how many it had before."""

    def __init__(self, rank: int, size: int, generation: int) -> None:
        self.speaks = True  # whether it is this rank that says why all end
        self.rank, self.size, self.timeout = rank, size, _timeout()
        self.still = min(STILL, self.timeout)
        if dist.is_initialized():
            raise InputError("torch.distributed is initialised already", fix="leave that to deltaw")
        try:
            root, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=self.timeout)))
        except (dist.DistError, ValueError) as error:
            raise Lost(
                f"rank {rank} can't join the others: {with_kind(error)}", fix="start all of them, on every machine"
            ) from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._marks, self._store = root, dist.PrefixStore(f"deltaw/{attempt}/{generation}/", root)
        self._met, self._what, self._group = 0, "the start", False
        self._over = threading.Event()
        self._signs: dict[int, tuple[str, float]] = {}  # of each rank: the last one, and when it was new
        self._looked, self._silent = 0.0, set[int]()
        self.put(f"name/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self._beat(0)
        threading.Thread(target=self._live, daemon=True).start()

    # Values by name

    def put(self, name: str, value: Any) -> None:
        """Raises Lost where the store is gone."""
        self._tried(lambda: self._store.set(name, json.dumps(value)))

    def get(self, name: str, rank: int) -> Any:
        """A value that rank `rank` puts there, whenever it does; Lost where it ends first."""
        while True:
            try:
                self._store.wait([name], timedelta(seconds=LOOK))
                return json.loads(self._store.get(name))
            except dist.DistStoreError:  # not yet
                self._check(rank)
            except dist.DistNetworkError:
                raise self._gone() from None

    def mark(self, name: str) -> None:
        self._tried(lambda: self._marks.set(MARKS + name, "1"))

    def is_marked(self, name: str) -> bool:
        return bool(self._tried(lambda: self._marks.check([MARKS + name])))

    def enter(self, what: str) -> int:
        """The number of a meeting of all ranks, which must come in the same order on each. `what`, for errors."""
        self._met, self._what = self._met + 1, what
        return self._met

    # Sums

    def start(self, device: torch.device) -> None:
        """Open the process group, unless it is."""
        if self._group:
            return
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        number = self.enter("the start")
        options: dict[str, Any] = {} if device.type == "cpu" else {"device_id": device}
        self._work(
            lambda: dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"group/{number}", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=self.timeout),
                **options,
            )
        )
        self._group = True

    def reduce(self, flat: Tensor, what: str, kind: str = "SUM") -> None:
        """The sum (or MAX) over the ranks, in place."""
        self._collect(what, lambda: dist.all_reduce(flat, getattr(dist.ReduceOp, kind), async_op=True))

    def broadcast(self, flat: Tensor, what: str) -> None:
        """Rank 0's numbers, in place."""
        self._collect(what, lambda: dist.broadcast(flat, 0, async_op=True))

    def gather(self, whole: Tensor, part: Tensor, what: str, in_background: bool) -> Any:
        """The parts of all ranks, one after another, in `whole`. On a GPU it is queued there, and what goes wrong shows
        in the next sum. `in_background`: the work to wait for is given back."""
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before
        if whole.device.type != "cpu":
            return gather(whole, part, async_op=in_background)
        whole, part = whole.view(torch.uint8), part.view(torch.uint8)  # gloo doesn't know all types
        return self._collect(what, lambda: gather(whole, part, async_op=True))

    def _collect(self, what: str, begin: Callable[[], Any]) -> None:
        assert self._group, "the process group isn't open"
        self.enter(what)
        began, nap = time.monotonic(), NAP / 32

        def wait() -> None:
            nonlocal nap
            work = begin()
            while not work.is_completed():
                time.sleep(nap)
                nap = min(NAP, 2 * nap)
                if time.monotonic() - began > LOOK:
                    self._check()
            work.wait()

        self._work(wait)

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (RuntimeError, dist.DistError) as error:  # gloo's and nccl's own
            raise self._blamed(error) from None

    # Who is there

    def _live(self) -> None:
        """The thread: a sign of life each second."""
        store: Any = self._store
        store, count = store.clone() if hasattr(store, "clone") else store, 0  # a connection of its own
        while not self._over.wait(BEAT):
            count += 1
            with suppress(dist.DistError, RuntimeError):
                self._beat(count, store)

    def _beat(self, count: int, store: Any = None) -> None:
        (store or self._store).set(f"sign/{self.rank}", json.dumps([count, self._met]))

    def _read(self) -> dict[int, list[int]]:
        """Of each rank that has given one: its last sign."""
        signs = {rank: self._value(f"sign/{rank}") for rank in range(self.size)}
        return {rank: json.loads(sign) for rank, sign in signs.items() if sign}

    def _check(self, waited_for: int = 0) -> None:
        """Raise what another rank has raised, or Lost where one has given no sign for long. Rank 0 watches all, the
        others watch rank 0 and the one that they wait for: else a large world would only look at itself."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        if (failure := self._failure()) is not None:
            raise failure
        for rank in (set(range(self.size)) if self.rank == 0 else {0, waited_for}) - {self.rank}:
            sign, (last, since) = self._value(f"sign/{rank}"), self._signs.get(rank, ("", now))
            since = since if sign == last else now
            self._signs[rank] = sign, since
            if now - since > (self.still if sign else self.timeout):
                self._silent.add(rank)
                what = f"has given no sign of life for {now - since:.0f} s" if sign else "never came"
                raise self._claimed(Lost(f"{self._named(rank)} {what}; {self._where()}", _again()))

    def _blamed(self, error: BaseException) -> DeltawError | Stopped:
        """Why a sum failed: what another rank says of it, else which ranks are silent or haven't come to it."""
        until = time.monotonic() + 3 * BEAT
        try:
            before = self._read()
            while time.monotonic() < until:
                if (failure := self._failure()) is not None:
                    return failure
                time.sleep(BEAT / 10)
            after = self._read()
        except Lost as lost:
            return lost
        silent = [r for r in range(self.size) if r != self.rank and after.get(r) == before.get(r)]
        late = [r for r, (_, met) in after.items() if met < self._met and r not in silent]
        self._silent |= {*silent, *late}  # nobody waits for them at the end
        if silent or late:
            who = ", ".join(self._named(rank) for rank in silent or late)
            what = "is gone" if silent else f"didn't come within {self.timeout:.0f} s"
            return self._claimed(Lost(f"{who} {what}; {self._where()}", _again()))
        return self._claimed(Lost(f"the ranks lost each other at {self._what}: {str(error).splitlines()[0]:.150}"))

    def _gone(self) -> Lost:
        return Lost(f"rank 0 is gone; rank {self.rank} was at {self._what}", _again())

    def _named(self, rank: int) -> str:
        known = self._value(f"name/{rank}")
        return f"rank {rank} ({json.loads(known)})" if known else f"rank {rank}"

    def _where(self) -> str:
        return f"the others were at {self._what}"

    def _value(self, name: str) -> str:
        """A value as it stands in the store, "" where there is none."""
        return self._tried(lambda: self._store.get(name) if self._store.check([name]) else b"").decode()

    def _tried(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except dist.DistError:
            raise self._gone() from None

    # Ends

    def _failure(self) -> DeltawError | Stopped | None:
        """What the first rank that failed has said."""
        told = self._value("failed")
        return _error_of(json.loads(told)) if told else None

    def _claimed(self, error: BaseException) -> Any:
        """`error`, told to the others, or what was told before it."""
        told = json.dumps(_told(error, self._named(self.rank) if self.rank else ""))
        first = self._tried(lambda: self._store.compare_set("failed", "", told)).decode()
        return error if first == told else _error_of(json.loads(first))

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others, and give what this rank ends with. Rank 0 says it, so the others leave it time to: torchrun
        stops all when one has ended."""
        with suppress(Lost, dist.DistError):
            told = self._claimed(error)
            error = told if isinstance(error, Lost) else error
            if self.rank == 0:
                self.put("told", True)
            until = time.monotonic() + LEAVE
            while time.monotonic() < until and not (self._value("told") if self.rank else self._all_left()):
                time.sleep(BEAT / 10)
            if self.rank and not self._value("told"):  # rank 0 is gone: one of the others says it
                self.speaks = self._store.compare_set("speaker", "", str(self.rank)).decode() == str(self.rank)
            elif self.rank:
                self.speaks = False
                self.put(f"left/{self.rank}", True)  # rank 0 may take the store with it
                time.sleep(GRACE)
        return error

    def _all_left(self) -> bool:
        """Whether rank 0 may go: at once, but where it holds the store that the others still ask."""
        return USES_AGENT in os.environ or all(
            rank in self._silent or self._value(f"left/{rank}") for rank in range(1, self.size)
        )

    def leave(self) -> None:
        """The end in order: rank 0 is the last."""
        self.enter("the end")
        if self.rank == 0:
            for rank in range(1, self.size):
                self.get(f"left/{rank}", rank)
        else:
            self.put(f"left/{self.rank}", True)
        if self._group:
            dist.destroy_process_group()

    def close(self) -> None:
        self._over.set()


def _timeout() -> float:
    text = os.environ.get(TIMEOUT, str(USUAL))
    try:
        if (seconds := float(text)) > 0:
            return seconds
    except ValueError:
        pass
    raise InputError(f"{TIMEOUT} is {text!r}", fix="set it to a number of seconds, or leave it out")


def _told(error: BaseException, who: str) -> dict[str, Any]:
    """An error as another rank is told it: `who` had it, unless it is of the ranks themselves."""
    if isinstance(error, Stopped):
        return {"code": error.exit_code, "what": str(error), "fix": None}
    if isinstance(error, KeyboardInterrupt):
        return {"code": 130, "what": "stopped", "fix": None}
    what, fix = (error.what, error.fix) if isinstance(error, DeltawError) else (with_kind(error), None)
    who = "" if isinstance(error, Lost) else who
    return {"code": getattr(error, "exit_code", 1), "what": f"{who}: {what}" if who else what, "fix": fix}


def _error_of(told: dict[str, Any]) -> DeltawError | Stopped:
    """What another rank has told, as an error here."""
    if told["code"] > 128:
        return Stopped(told["code"] - 128, told["what"], at_once=True)
    return (InputError if told["code"] == 2 else Lost)(told["what"], told["fix"])


def _again() -> str:
    return f"resume the run from its newest checkpoint; to wait longer for a slow rank, set {TIMEOUT} (seconds)"
