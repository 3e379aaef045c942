"""A chat template: untrusted Jinja -> text, in a process of its own.

Templates come from strangers and are programs, so none is compiled or run here: `template_worker.py` does it, behind
Jinja's sandbox, without files, with little memory, and killed when it takes longer than `SECONDS` for a row. A row that
is late, or that the worker dies of, is rejected like any other that the template refuses; a template that does so
`PATIENCE` times in a row is an error, since a million rows at two seconds each are three weeks.

There is one worker for a process, started by the first template and told of the others. A fork starts its own: on one
pair of pipes parent and child would get each other's answers. It ends with its process, however that ends: killed at
exit, by the end of its input after a SIGKILL, and by its own alarm when a template keeps it from seeing that.

Many rows are sent at once, each with all the texts of it that masks are proven with (`render.py`), and their answers
are read as they come: a round trip for each text would cost as much as rendering it.

Rejected: rendering in this process, as transformers does, with bounds on `*`, `range` and the output (a loop that
writes nothing needs a deadline, a million joined words need a limit of memory, and a signal's handler can interrupt
neither a C function nor another thread); one process for each row (0.1 s); `multiprocessing` (its spawn imports the
program's main module, and its pipes carry pickles).
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from deltaw.errors import InputError, Rejected, RunError

MAX_TEMPLATE = 2**20  # characters; the longest in use are under 100,000
MAX_OUTPUT = 2**24  # characters of one text, and of all of a row's as far as they differ
MEMORY = 2**28  # bytes, beyond what the interpreter takes
SECONDS = 2.0
PATIENCE = 3
START_LIMIT = 60.0  # seconds; a worker that isn't up by then never will be
BATCH_ROWS, BATCH_BYTES = 64, 2**20
SCRIPT = Path(__file__).with_name("template_worker.py")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Asked(NamedTuple):
    """A row for a template: plain JSON, and the prefixes (n, generation prompt) of its messages to be written."""

    messages: Sequence[Any]
    tools: Sequence[Any]
    prefixes: Sequence[tuple[int, bool]]


class Unfinished(Rejected):
    """The template took too long over it, or too much memory."""


class Template:
    """A compiled chat template. `variables` are what it may name besides the messages (`eos_token`, …), `name` is what
    errors call it; `words` are the texts and attributes that it names."""

    def __init__(self, source: str, variables: Mapping[str, str], name: str = "the chat template") -> None:
        if len(source) > MAX_TEMPLATE:
            raise InputError(f"{name} has {len(source):,} characters; at most {MAX_TEMPLATE:,} are read")
        self._name = name
        self._failures = 0  # since the last row that came to an end
        self.fingerprint = sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        known = dict(variables)
        self._id = sha256(json.dumps([source, known]).encode()).hexdigest()
        self._compile = _line({"id": self._id, "source": source, "variables": known})
        try:
            with _worker().asking(self._compile) as worker:
                answer = worker.answer(time.monotonic() + SECONDS)
        except _Failed as failed:
            raise self._unusable(f"can't be compiled: {failed}") from None
        if "error" in answer:
            where = f" (line {answer['line']})" if answer["line"] else ""
            raise self._unusable(f"can't be compiled{where}: {answer['error']}")
        self.words: frozenset[str] = frozenset(answer["words"])

    def render(self, messages: Sequence[Any], tools: Sequence[Any], *, generation_prompt: bool) -> str:
        """The text of `messages`, which are plain JSON. Raises Rejected with whatever the template objects to."""
        (texts,) = self.render_rows([Asked(messages, tools, [(len(messages), generation_prompt)])])
        if isinstance(texts, Rejected):
            raise texts
        return str(texts[0])

    def render_rows(self, rows: Sequence[Asked]) -> list[list[str | Rejected] | Rejected]:
        """For each row the texts of its prefixes, or why there is none; a row without its first text has none at all.

        Raises InputError where several rows one after the other took too long or too much memory.
        """
        lines = [_line(row) for row in rows]
        results: list[list[str | Rejected] | Rejected] = []
        while len(results) < len(lines):
            try:
                for answer in self._answers(_batch(lines[len(results) : len(results) + BATCH_ROWS])):
                    results.append(_texts(answer))
                    self._failures = 0
            except _Failed as failed:
                self._failures += 1
                if self._failures == PATIENCE:
                    raise self._unusable(f"can't be used: {failed}, {PATIENCE} rows one after the other") from None
                results.append(Unfinished(f"the chat template can't render it: {failed}"))
        return results

    def _answers(self, lines: Sequence[bytes]) -> Iterator[list[Any]]:
        """The worker's answer to every row, each in time. One that has just been started is told of the template."""
        request = b"".join([_line({"id": self._id, "rows": len(lines)}), *lines])
        with _worker().asking(request) as worker:
            until = time.monotonic() + SECONDS
            answer = worker.answer(until)
            if answer == {"unknown": True}:
                worker.send(self._compile, until)
                worker.answer(until)
                worker.send(request, until)
                answer = worker.answer(until)
            yield answer
            for _ in lines[1:]:
                yield worker.answer(time.monotonic() + SECONDS)

    def _unusable(self, reason: str) -> InputError:
        return InputError(f"{self._name} {reason}", fix="set data.template: chatml, or a .jinja file that is right")


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _batch(lines: Sequence[bytes]) -> list[bytes]:
    """As many of them as may be sent at once, but one at least."""
    batch = [lines[0]]
    for line in lines[1:]:
        if sum(map(len, batch)) + len(line) > BATCH_BYTES:
            break
        batch.append(line)
    return batch


def _texts(answer: list[Any]) -> list[str | Rejected] | Rejected:
    """What the worker says of a row: its docstring has the form."""
    texts: list[str | Rejected] = []
    for item in answer:
        if isinstance(item, str):
            texts.append(Rejected(f"the chat template refuses it: {item}"))
            continue
        length, rest = item
        texts.append(str(texts[0])[:length] + rest if texts else rest)
    return texts[0] if isinstance(texts[0], Rejected) else texts


class _Failed(Exception):
    """No answer: the worker was late, or it died."""


class _Worker:
    """This end of a worker: started when something is asked, killed when something goes wrong, then started anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    @contextlib.contextmanager
    def asking(self, request: bytes) -> Iterator["_Worker"]:
        """Send `request` and have the worker for oneself, to read every answer inside the block.

        The block raises _Failed when one doesn't come. RunError where no worker can be started.
        """
        with self._lock:
            try:
                if self._process is None:
                    self._start()
                self.send(request, time.monotonic() + SECONDS)
                yield self
            except BaseException:  # also an interrupt: the answers still to come would be taken for the next one's
                self.stop()
                raise

    def send(self, request: bytes, until: float) -> None:
        assert self._process is not None and self._process.stdin is not None
        pipe, rest = self._process.stdin.fileno(), memoryview(request)
        while rest:
            _wait(pipe, select.POLLOUT, until)
            try:
                rest = rest[os.write(pipe, rest) :]
            except BrokenPipeError:
                raise _Failed(_DEATH) from None

    def answer(self, until: float) -> Any:
        """The next line's value."""
        assert self._process is not None and self._process.stdout is not None
        pipe, parts, size = self._process.stdout.fileno(), [self._unread], len(self._unread)
        while b"\n" not in parts[-1]:
            _wait(pipe, select.POLLIN, until)
            parts.append(os.read(pipe, 2**20))
            size += len(parts[-1])
            if not parts[-1] or size > 6 * MAX_OUTPUT:  # bytes, of which JSON takes up to 6 for a character
                raise _Failed(_DEATH)
        line, _, self._unread = b"".join(parts).partition(b"\n")
        try:
            return json.loads(line)
        except ValueError:  # no worker of ours writes that
            raise _Failed(_DEATH) from None

    def stop(self) -> None:
        """Kill it, and leave no zombie."""
        process, self._process, self._unread = self._process, None, b""
        if process is not None:
            process.kill()
            _close(process)
            process.wait()

    def forget(self) -> None:
        """Let go of the parent's worker in a fork: what is open here would keep it alive."""
        if self._process is not None:
            self._process.returncode = 0  # not ours to wait for
            _close(self._process)

    def _start(self) -> None:
        limits = {"memory": MEMORY, "characters": MAX_OUTPUT, "seconds": int(SECONDS)}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-W", "ignore", str(SCRIPT), json.dumps(limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                start_new_session=True,  # Ctrl-C is for us
            )
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
            self.answer(time.monotonic() + START_LIMIT)
        except (OSError, _Failed) as error:
            raise RunError(
                f"the process that renders chat templates doesn't start: {error}",
                fix=f"try: {sys.executable} -I -c 'import jinja2'",
            ) from None


_DEATH = f"it needs more than {MEMORY // 2**20} MB, or crashes"
_WORKERS: dict[int, _Worker] = {}


def _worker() -> _Worker:
    """The worker of this process."""
    mine = os.getpid()
    if mine not in _WORKERS:
        for owner in [owner for owner in _WORKERS if owner != mine]:
            if (inherited := _WORKERS.pop(owner, None)) is not None:
                inherited.forget()
        _WORKERS.setdefault(mine, _Worker())
    return _WORKERS[mine]


@atexit.register
def _stop() -> None:
    if (worker := _WORKERS.get(os.getpid())) is not None:
        worker.stop()


def _close(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def _wait(pipe: int, event: int, until: float) -> None:
    """Until something can be read or written; what can be at once is never late, since the clock runs on while we are
    stopped. Raises _Failed."""
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
        raise _Failed(f"it takes more than {SECONDS:g} s")
