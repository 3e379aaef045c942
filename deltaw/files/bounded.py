"""A process for strangers' programs: chat templates (template.py) and regular expressions (patterns.py).

Both can take for ever, or all memory, and a template might do worse. So neither is run here: `bounded_worker.py` does
it, without files, with little memory, and killed when it takes longer than whoever asks is willing to wait.

`Worker` is this end of any such process; rewards have theirs, too (rewards/process.py). For templates and patterns
there is one worker for a process, started by the first question. A fork starts its own: on one pair of pipes parent and
child would get each other's answers. It ends with its process, however that ends: killed at exit, by the end of its
input after a SIGKILL, and by its own alarm when a program keeps it from seeing that.

Rejected: one process for each question (0.1 s); `multiprocessing` (its spawn imports the program's main module, and its
pipes carry pickles).
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deltaw.errors import RunError

MAX_OUTPUT = 2**24  # characters of one text, and of all of a row's as far as they differ
MEMORY = 2**28  # bytes, beyond what the interpreter takes
START_LIMIT = 60.0  # seconds; a worker that isn't up by then never will be
SCRIPT = Path(__file__).with_name("bounded_worker.py")


class Failed(Exception):
    """No answer: the worker was late, or it died."""


class Late(Failed):
    """It didn't come in time."""


class Worker:
    """This end of a worker: started when something is asked, killed when something goes wrong, then started again.

    `start` makes the process, whose first line says how it stands (`ready`); `named`: what it is, for the error of one
    that can't be started, and `fix`. `death`: why one is thought to have died; left out, how it ended is told.
    """

    def __init__(
        self,
        start: Callable[[], "subprocess.Popen[bytes]"],
        named: str,
        fix: str,
        *,
        death: str = "",
        start_limit: float = START_LIMIT,
    ) -> None:
        self._make, self._named, self._fix, self._death, self._start_limit = start, named, fix, death, start_limit
        self.ready: Any = None
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: deque[bytes] = deque()  # read, and not asked for yet; the last is a beginning
        self._patience = 0.0

    @contextlib.contextmanager
    def asking(self, request: bytes, patience: float) -> Iterator["Worker"]:
        """Send `request` and have the worker for oneself, to read every answer inside the block, each of which may take
        `patience` seconds.

        The block raises Failed when one doesn't come. RunError where no worker can be started.
        """
        with self._lock:
            try:
                if self._process is None:
                    self._start()
                self._patience = patience
                self.send(request)
                yield self
            except BaseException:  # also an interrupt: the answers still to come would be taken for the next one's
                self.stop()
                raise

    def send(self, request: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        pipe, rest, until = self._process.stdin.fileno(), memoryview(request), time.monotonic() + self._patience
        while rest:
            self._wait(pipe, select.POLLOUT, until)
            try:
                rest = rest[os.write(pipe, rest) :]
            except BrokenPipeError:
                raise self._died() from None

    def answer(self) -> Any:
        """The next line's value."""
        assert self._process is not None and self._process.stdout is not None
        if len(self._lines) < 2:
            self._read(self._process.stdout.fileno())
        try:
            return json.loads(self._lines.popleft())
        except ValueError:  # no worker of ours writes that
            raise self._died() from None

    def _read(self, pipe: int) -> None:
        """At least one whole line more."""
        until = time.monotonic() + self._patience
        parts = [self._lines.pop() if self._lines else b""]
        size = len(parts[0])
        while b"\n" not in parts[-1]:
            self._wait(pipe, select.POLLIN, until)
            parts.append(os.read(pipe, 2**20))
            size += len(parts[-1])
            if not parts[-1] or size > 6 * MAX_OUTPUT:  # bytes, of which JSON takes up to 6 for a character
                raise self._died()
        self._lines.extend(b"".join(parts).split(b"\n"))

    def stop(self) -> None:
        """Kill it, and leave no zombie."""
        process, self._process = self._process, None
        self._lines.clear()
        if process is not None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own: what it started goes, too
            process.kill()
            _close(process)
            process.wait()

    def forget(self) -> None:
        """Let go of the parent's worker in a fork: what is open here would keep it alive."""
        if self._process is not None:
            self._process.returncode = 0  # not ours to wait for
            _close(self._process)

    def _start(self) -> None:
        try:
            self._process = self._make()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
            self._patience = self._start_limit
            self.ready = self.answer()
        except (OSError, Failed) as error:
            raise RunError(f"{self._named} can't be started: {error}", fix=self._fix) from None

    def _died(self) -> Failed:
        """How it ended, where that is to be told."""
        assert self._process is not None
        if self._death:
            return Failed(self._death)
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return Failed("it closed its pipe")
        if code >= 0:
            return Failed(f"its process ended itself (exit code {code})")
        killed = " (out of memory?)" if code == -signal.SIGKILL else ""
        return Failed(f"its process was ended by {signal.Signals(-code).name}{killed}")

    def _wait(self, pipe: int, event: int, until: float) -> None:
        """Until something can be read or written; what can be at once is never late, since the clock runs on while we
        are stopped. Raises Failed."""
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise Late(f"it takes more than {self._patience:g} s")


def shut_in(*arguments: str) -> "subprocess.Popen[bytes]":
    """An interpreter that has nothing of ours but a pipe each way: no environment, no folder, no Ctrl-C, and what it
    complains of isn't shown."""
    return subprocess.Popen(
        [sys.executable, "-I", "-W", "ignore", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd="/",
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
        start_new_session=True,  # Ctrl-C is for us
    )


def _templates() -> Worker:
    return Worker(
        lambda: shut_in(str(SCRIPT), json.dumps([MEMORY, MAX_OUTPUT])),
        "the process for templates and patterns",
        f"try: {sys.executable} -I -c 'import jinja2'",
        death=f"it needs more than {MEMORY // 2**20} MB, or crashes",
    )


_WORKERS: dict[int, Worker] = {}


def worker() -> Worker:
    """The worker of this process."""
    mine = os.getpid()
    if mine not in _WORKERS:
        for owner in [owner for owner in _WORKERS if owner != mine]:
            if (inherited := _WORKERS.pop(owner, None)) is not None:
                inherited.forget()
        _WORKERS.setdefault(mine, _templates())
    return _WORKERS[mine]


def line(value: Any) -> bytes:
    """A question, or a part of one, as the worker reads it."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


@atexit.register
def stop() -> None:
    """End the worker of this process, if there is one."""
    if (mine := _WORKERS.get(os.getpid())) is not None:
        mine.stop()


def _close(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
