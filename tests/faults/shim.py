"""A disk that fails on demand, from Python: shim.c compiled once, preloaded into workers, armed around a block.

    with failing(folder, "write", 3, errno.EIO): ...      the third write below the folder fails
    with full_after(folder, 1_000): ...                   1,000 bytes fit below the folder

Without a C compiler, or elsewhere than on Linux, there is none; then those checks are not made.
"""

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

COMPILER = (shutil.which("cc") or shutil.which("gcc")) if sys.platform == "linux" else None
SOURCE = Path(__file__).with_name("shim.c")
KINDS = ("open", "write", "fsync", "rename", "mkdir")
KILL = 0  # instead of an errno: the process dies there


def environment() -> dict[str, str]:
    """os.environ for a process that has the library in it."""
    if COMPILER is None:
        return dict(os.environ)
    given = os.environ.get("LD_PRELOAD", "").split(":")
    return {**os.environ, "LD_PRELOAD": ":".join(dict.fromkeys([str(library()), *filter(None, given)]))}


@cache
def library() -> Path:
    """The compiled library; it is built where there is none of this source yet."""
    assert COMPILER is not None
    name = f"deltaw-shim-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    folder = Path(tempfile.gettempdir()) / f"deltaw-faults-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as aside:  # several processes may come here at once
            built = Path(aside) / name
            options = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror"]
            subprocess.run([COMPILER, *options, "-o", built, SOURCE, "-ldl"], check=True)
            built.replace(folder / name)
    return folder / name


@contextmanager
def failing(folder: Path, kind: str, nth: int, error: int, *, lasting: bool = False) -> Iterator[None]:
    """Inside the block the `nth` call of `kind` below `folder` fails with `error`; `lasting`: so do those after it."""
    _loaded().fail_at(_name(folder), KINDS.index(kind), ctypes.c_long(nth), error, lasting)
    try:
        yield
    finally:
        _loaded().disarm()


@contextmanager
def full_after(folder: Path, size: int, error: int = errno.ENOSPC) -> Iterator[None]:
    """Inside the block only `size` bytes can be written below `folder`."""
    _loaded().fail_after(_name(folder), ctypes.c_long(size), error)
    try:
        yield
    finally:
        _loaded().disarm()


def calls(kind: str) -> int:
    """How many calls of `kind` were made below the folder in the last block (also those that failed)."""
    return int(_loaded().calls(KINDS.index(kind)))


def written() -> int:
    """How many bytes were written below the folder in the last block."""
    return int(_loaded().bytes())


def _name(folder: Path) -> bytes:
    return os.fsencode(folder.resolve())


@cache
def _loaded() -> ctypes.CDLL:
    found = ctypes.CDLL(None)
    if not hasattr(found, "fail_at"):
        raise RuntimeError("shim.c's library isn't preloaded: python -m tests.faults.worker has it")
    found.calls.restype = found.bytes.restype = ctypes.c_long
    return found
