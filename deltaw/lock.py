"""One process at a time in a run folder.

`flock` on a file in it: the kernel lets go of the lock when its owner dies, however it dies, so no stale lock is left
to be recovered by guessing, and a pid that was since given to another process means nothing. What the file says (pid,
host) is for the message. Where the file system has no flock (some network mounts), what it says must do: a living
process of this host, or any process of another host, is taken for the owner.

Rejected: a pid file alone (a killed run's pid comes back, and then nothing starts), and removing the file at the end
(between a second process's open and its flock the file may be another's).
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltaw.errors import InputError

NO_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold `file` inside the block. Raises InputError that names the owner when another process holds it, and where the
    file can't be made."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{what}: can't be written to: {error.strerror}", fix="choose another output") from None
    try:
        _take(descriptor, file, what)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take(descriptor: int, file: Path, what: str) -> None:
    owner = os.pread(descriptor, 300, 0).decode("utf-8", "replace").split()
    try:
        if _is_free(descriptor, owner):
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
