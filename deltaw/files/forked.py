"""Work that several processes do at once, the results in order: `in_processes(work, count, processes)`.

    process k does numbers k, k + N, k + 2N, …       result i is read from process i mod N

So nothing is handed out and nothing is sorted, and a process that is ahead waits until somebody reads: its pipe is
full. What comes back is bytes: whoever works says what they mean. An error is raised where its result would have been.

The processes are forks: they have the tokenizer, the rows and the settings as they stand here, at once and without a
copy. That is safe for what they do and would not be for anything: no product of matrices is computed in them (OpenMP's
threads aren't there after a fork), no GPU is asked, the tokenizers library is told to use no threads of its own, and
they end without Python's farewell (`os._exit`). Ctrl-C is for their parent, which ends them; when it is gone they
end at their next result, since nobody can read it.

Rejected: `multiprocessing` (its pipes carry pickles, and its spawn imports the program's main module); a fresh
interpreter for each (two seconds for the tokenizer's library, and a tokenizer that was made in memory can't be opened
there).
"""

import contextlib
import gc
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from deltaw.errors import DeltawError, InputError, RunError
from deltaw.files import bounded

MOST = 16  # processes: more than one can read the results of
THREADS = "TOKENIZERS_PARALLELISM"  # asked by the tokenizers library, also while it is forked
ENDINGS = {signal.SIGINT, signal.SIGTERM}
RESULT, ERROR, DEFECT = b"r", b"e", b"d"
HEAD = 9  # bytes: what it is, and its length


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """How many processes can work at once here; 1 where there are no forks."""
    return min(usable_cores(), MOST) if hasattr(os, "fork") else 1


def in_processes(work: Callable[[int], bytes], count: int, processes: int) -> Generator[bytearray, None, None]:
    """`work(0)`, `work(1)`, … `work(count - 1)`. Raises what `work` raises, if it is an error of deltaw, and RunError
    where a process dies."""
    started: list[_Process] = []
    try:
        for number in range(processes):
            started.append(_Process(work, range(number, count, processes), [other.pipe for other in started]))
        for number in range(count):
            yield started[number % processes].result()
    finally:
        for process in started:
            process.end()


class _Process:
    """One of them, seen from its parent."""

    def __init__(self, work: Callable[[int], bytes], numbers: Iterable[int], others: Sequence[int]) -> None:
        self.pipe, far = os.pipe()
        sys.stdout.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
        try:
            with _no_threads():
                self._id = os.fork()
            if self._id == 0:
                _work(work, numbers, far, [self.pipe, *others])
        except OSError as error:
            os.close(self.pipe)
            raise RunError(f"no process can be started to prepare rows: {error}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(far)

    def result(self) -> bytearray:
        head = self._read(HEAD)
        data = self._read(int.from_bytes(head[1:], "little"))
        if head[:1] == RESULT:
            return data
        if head[:1] == DEFECT:
            raise RuntimeError(data.decode())
        kind, what, fix = json.loads(data)
        raise (InputError if kind == InputError.exit_code else RunError)(what, fix=fix)

    def end(self) -> None:
        """Kill it, and leave no zombie."""
        os.close(self.pipe)
        with contextlib.suppress(OSError):
            os.kill(self._id, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.waitpid(self._id, 0)

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            count = os.readv(self.pipe, [rest])
            if not count:
                raise self._died()
            rest = rest[count:]
        return data

    def _died(self) -> RunError:
        _, status = os.waitpid(self._id, 0)
        code = os.waitstatus_to_exitcode(status)
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        more = ": it may have been out of memory" if code == -signal.SIGKILL else ""
        return RunError(f"a process that prepares rows {how}{more}", fix="free memory, or try again")


def _work(work: Callable[[int], bytes], numbers: Iterable[int], pipe: int, inherited: Sequence[int]) -> None:
    """What a fork does, to its end."""
    try:
        gc.freeze()  # else every object here would be looked at, and its page copied
        os.environ[THREADS] = "false"
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
        for other in inherited:
            os.close(other)  # else a process that nobody reads from would never notice
        for number in numbers:
            _send(pipe, RESULT, work(number))
    except BrokenPipeError:
        pass
    except DeltawError as error:
        _send(pipe, ERROR, json.dumps([error.exit_code, error.what, error.fix]).encode())
    except BaseException:
        _send(pipe, DEFECT, traceback.format_exc().encode("utf-8", "backslashreplace"))
    finally:
        with contextlib.suppress(BaseException):
            bounded.stop()
        os._exit(0)


def _send(pipe: int, kind: bytes, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError) if kind != RESULT else contextlib.nullcontext():
        for part in (kind + len(data).to_bytes(HEAD - 1, "little"), data):
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(pipe, rest) :]


@contextlib.contextmanager
def _no_threads() -> Iterator[None]:
    """For the length of a fork: what the tokenizers library is to find on the other side."""
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forks beside threads
            yield
    finally:
        if before is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before
