"""Where a command may write: asked before anything is read or computed, and answered with the real reason.

What can be known beforehand is whether the nearest folder that exists is one, may be written in, and lies on a disk
that takes anything. That the disk fills up later is for the writer to say (atomic.py).
"""

import errno
import os
from pathlib import Path

from deltaw.errors import InputError

ANOTHER = "choose another output"
FULL = (errno.ENOSPC, errno.EDQUOT)


def gib(count: float) -> str:
    """Bytes as people read them: "1.5 GiB", "20 MiB", "12 KiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}" if name == "GiB" else f"{count / unit:.0f} {name}"
    return f"{count / 2**10:.0f} KiB" if count >= 2**10 else f"{count:.0f} bytes"


def check_writable(path: Path, what: str) -> None:
    """Raise InputError where nothing can be made at `path`, a folder or a file that needn't exist yet."""
    try:
        existing = next(each for each in [path.absolute(), *path.absolute().parents] if os.path.lexists(each))
        if existing == path.absolute() and not existing.is_dir():
            existing = existing.parent
        if not existing.is_dir():
            raise InputError(f"{what}: {existing} is not a folder", fix=ANOTHER)
        if not os.access(existing, os.W_OK | os.X_OK):
            why = "{} is on a read-only disk" if _is_read_only(existing) else "no permission to write in {}"
            raise InputError(f"{what}: {why.format(existing)}", fix=ANOTHER)
    except (OSError, ValueError) as error:
        raise InputError(f"{what}: {getattr(error, 'strerror', None) or error}", fix=ANOTHER) from None


def make_folder(folder: Path, what: str) -> None:
    """Make it, and those above it. Raises InputError where that can't be."""
    check_writable(folder, what)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(f"{what}: can't be made: {why}", fix=ANOTHER) from None


def check_file(path: Path, what: str) -> None:
    """Raise InputError where no file can be written at `path`: a folder or a device is there, or no folder for it."""
    if path.is_dir():
        raise InputError(f"{what}: is a folder, and a file is to be written", fix="name a file in it")
    if is_special(path):
        raise InputError(f"{what}: is a device or a pipe, and a file is to be written", fix="name a file")
    if not path.parent.is_dir():
        raise InputError(f"{what}: there is no folder {path.parent}", fix="make it, or choose another output")
    check_writable(path, what)


def is_special(path: Path) -> bool:
    """Whether a device, a pipe or a socket is there: renamed over, it would be gone (`-o /dev/null`, as root)."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _is_read_only(folder: Path) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & getattr(os, "ST_RDONLY", 1))
