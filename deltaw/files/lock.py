"""One process at a time in a run folder, and in whatever else a command is going to write.

`flock` on a file in it: the kernel lets go of the lock when its owner dies, however it dies, so no stale lock is left
to be recovered by guessing, and a pid that was since given to another process means nothing. What the file says (pid,
host) is for the message. Where the file system has no flock (some network mounts), what it says must do: a living
process of this host, or any process of another host, is taken for the owner.

A target is claimed before the work and not checked before and written after: in between, another command may have
finished there. A run's lock file stays in its folder; beside what is to be shared (an adapter, a page) it is removed by
its owner while it is held. A process that opened it a moment earlier then holds a file without a name, sees that, and
opens it again.

Rejected: the library filelock, which takes the same flock but doesn't say who holds a lock, has nothing to fall back on
where a network mount answers ENOLCK or EOPNOTSUPP, and leaves its file beside what is shared (all but ten lines here
would stay); a pid file alone (a killed run's pid comes back, and then nothing starts); writing beside the target and
renaming at the end (the work of the one that comes second is lost, though it could have been told at once).
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deltaw.errors import InputError
from deltaw.files import atomic
from deltaw.files.output import check_file, make_folder

NO_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)
LOCK = ".lock"
WAIT = 0.1  # seconds between two looks at a lock that is waited for


@contextlib.contextmanager
def locked(
    file: Path,
    what: str,
    *,
    wait: bool = False,
    remove: Callable[[], bool] = lambda: False,
    waiting: Callable[[str], object] = str,
) -> Iterator[None]:
    """Hold `file` inside the block. Raises InputError that names the owner when another process holds it (unless the
    caller will `wait`; `waiting` is told once for whom), and where the file can't be made. `remove`, asked at the end:
    whether the file goes."""
    descriptor = _opened(file, what)
    try:
        _take(descriptor, file, what, wait, waiting)
        while os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            descriptor = _opened(file, what)
            _take(descriptor, file, what, wait, waiting)
        try:
            yield
            os.ftruncate(descriptor, 0)
        finally:
            if remove():
                file.unlink(missing_ok=True)  # once, and by the holder: what is there afterwards is another's
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claimed(folder: Path, check: Callable[[], None], *, keep_lock: bool = True) -> Iterator[None]:
    """`folder` is this process's alone inside the block. `check` refuses it: at once, and again when it is locked, for
    what another process may have begun in between. A folder that was made for the block and stays empty goes again."""
    check()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder, f"output {folder}")

    def unused() -> bool:
        return bool(made) and not holds_anything(folder)

    try:
        with locked(folder / LOCK, f"output {folder}", remove=lambda: not keep_lock or unused()):
            try:
                check()
                yield
            finally:
                if unused():
                    atomic.sweep(folder)
    finally:
        with contextlib.suppress(OSError):  # not empty: it is used, or another process's by now
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder to write into, empty or not there yet, and this process's alone inside the block. What an error leaves
    in it goes. Raises InputError."""
    folder = Path(output)

    def check() -> None:
        if folder.exists() and (not folder.is_dir() or holds_anything(folder)):
            raise InputError(f"output {output} exists already", fix="choose another folder")

    with claimed(folder, check, keep_lock=False):
        atomic.sweep(folder)
        try:
            yield folder
        except BaseException:
            _clear(folder)
            raise


@contextlib.contextmanager
def claimed_file(path: Path) -> Iterator[None]:
    """No other command writes this file inside the block. Raises InputError where it can't be written."""
    check_file(path, f"output {path}")
    with locked(path.with_name(f".{path.name}{LOCK}"), f"output {path}", remove=lambda: True):
        yield


def in_use(file: Path) -> bool:
    """Whether a living process holds `file`. Looks only: an owner that has ended in order left the file empty, and only
    what a killed one left is tried, for a moment, with a lock that others may share."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        owner = os.pread(descriptor, 300, 0).decode("utf-8", "replace").split()
        if not owner:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return _lives(owner)
    finally:
        os.close(descriptor)


def held_in(folder: Path) -> list[Path]:
    """All that is in it but the lock and what a killed process was still writing."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path for path in paths if path.name != LOCK and not atomic.is_temporary(path)]


def holds_anything(folder: Path) -> bool:
    """As `held_in`."""
    return bool(held_in(folder))


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != LOCK:
            atomic.remove(path)


def _opened(file: Path, what: str) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{what}: can't be written to: {error.strerror}", fix="choose another output") from None


def _take(descriptor: int, file: Path, what: str, wait: bool, waiting: Callable[[str], object]) -> None:
    told = False
    try:
        while not _is_free(descriptor, owner := os.pread(descriptor, 300, 0).decode("utf-8", "replace").split()):
            if not wait:
                break
            if not told:
                waiting(" on ".join(owner) or "unknown")
                told = True
            time.sleep(WAIT)
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            return
    except OSError as error:
        raise InputError(f"{what}: can't be locked: {error.strerror}", fix="choose another output") from None
    pid, host = owner if len(owner) == 2 else ("unknown", "unknown")
    raise InputError(
        f"{what} is in use by process {pid} on {host}",
        fix=f"wait for it, stop it (kill {pid}), or choose another output; if it is gone, remove {file}",
    )


def _is_free(descriptor: int, owner: list[str]) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return not _lives(owner)
    return True


def _lives(owner: list[str]) -> bool:
    """Whether the process that a lock names may still be there."""
    if len(owner) != 2 or not owner[0].isdigit():
        return False
    if owner[1] != socket.gethostname():
        return True
    try:
        os.kill(int(owner[0]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(owner[0]) != os.getpid()
