"""What is in a file, as a SHA-256 that is remembered: a second look at it reads nothing.

Remembered by what the system says of the file: its place, size, inode, and the times of its last change and of the
last change to what is known about it (ctime, which no program can set, so that a file whose time of change was put
back is read again). Such times are coarse, some file systems' as much as two seconds: a file that changes again within
the tick has the same ones. So nothing is remembered of a file that was changed less than `SETTLED` seconds before it
was read, nor of one that changed meanwhile.
"""

import contextlib
import hashlib
import os
import re
import time
from pathlib import Path

from deltaw.errors import InputError, RunError
from deltaw.files.atomic import write_text_atomic

SETTLED = 4.0  # seconds
Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp:
    """What the system says of a file. Raises OSError."""
    status = path.stat()
    return status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def content_hash(path: Path, memory: Path) -> str:
    """The file's SHA-256 in hex. `memory`: the folder of what is remembered; one that can't be written forgets. Raises
    InputError."""
    try:
        before = stamp(path)
        name = hashlib.sha256(f"{path.resolve()}\0{before}".encode(errors="surrogateescape")).hexdigest()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.fullmatch(r"[0-9a-f]{64}", known := (memory / name).read_text()):
                return known
        begun = time.time()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            status = os.fstat(file.fileno())
        settled = max(status.st_mtime, status.st_ctime) < begun - SETTLED and stamp(path) == before
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if settled:
        with contextlib.suppress(RunError, OSError):
            memory.mkdir(parents=True, exist_ok=True)
            write_text_atomic(memory / name, digest)
    return digest
