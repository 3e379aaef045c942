"""Several processes that train together, forked with the variables that torchrun sets: quicker than torchrun itself."""

import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.training import distributed, world
from tests.faults.common import _be_the_child

SECONDS = 60.0  # until those that still run are killed


@dataclass(frozen=True)
class Rank:
    """How one ended."""

    code: int
    output: str


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(size: int, work: Callable[[int], object], timeout: float = 30.0, hung: int | None = None) -> list[Rank]:
    """`work(rank)` in so many processes that know each other. `timeout`: how long they wait for each other; `hung`: a
    rank that is killed once the others have ended."""
    port, pids, files = free_port(), [], [tempfile.TemporaryFile() for _ in range(size)]  # noqa: SIM115
    for rank, file in enumerate(files):
        pid = os.fork()
        if not pid:
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, distributed.TIMEOUT: timeout}
            os.environ.update({name: str(value) for name, value in given.items()})
            world._of_environment.cache_clear()
            distributed.BEAT = distributed.LOOK = distributed.GRACE = 0.1
            _be_the_child(lambda rank=rank: work(rank), file.fileno())
        pids.append(pid)
    until, codes = time.monotonic() + SECONDS, dict[int, int]()
    while len(codes) < size:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                codes[pid] = 128 - code if code < 0 else code
            elif time.monotonic() > until or (hung is not None and pid == pids[hung] and len(codes) == size - 1):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    ended = []
    for pid, file in zip(pids, files, strict=True):
        file.seek(0)
        ended.append(Rank(codes[pid], file.read().decode(errors="replace")))
        file.close()
    return ended


@contextmanager
def in_step(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Inside, `act` is called in this process when update `number` (from 1) is to be computed."""
    from deltaw.training import run as loop

    original: Any = loop.step

    def stepping(forward: Any, learners: Any, *more: Any) -> Any:
        if learners[0].state.step == number - 1:
            act()
        return original(forward, learners, *more)

    loop.step = stepping
    try:
        yield
    finally:
        loop.step = original


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))
