"""Files and folders written whole or not at all, and what a killed process leaves of them.

Whatever is written lies under a temporary name beside the final one (`TEMPORARY`), is fsynced and renamed, and the
folder is fsynced. A reader sees the old bytes or the new ones, also after a power cut; a kill leaves at most a
temporary, which `sweep` removes. Modes follow the umask, or stay what they were: the safetensors library leaves 0600,
so that a server run by another user couldn't read the file.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from deltaw.errors import RunError
from deltaw.files.output import FULL, gib, is_special

TEMPORARY = re.compile(r"\..+\.([0-9a-f]{16}|new|old)\.tmp", re.DOTALL)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file at once or not at all. Raises RunError when the disk refuses."""
    data = text.encode()
    with replacing(path, len(data)) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, needed: int = 0, *, private: bool = False) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends, or vanishes when it fails.

    `needed` is the size in bytes, for the message; `private`: for its owner alone. Raises RunError for whatever the
    operating system refuses.
    """
    temporary = temporary_name(path)
    try:
        if is_special(path):
            raise OSError(errno.EINVAL, "it is a device or a pipe")
        # Creating it ourselves shows what the umask allows, without the race of reading the umask.
        with temporary.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        if path.exists():
            mode = path.stat().st_mode
        yield temporary
        temporary.chmod(0o600 if private else mode & 0o7777)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        remedy = "free some space" if error.errno in FULL else "free space or choose another folder"
        fix = f"nothing was lost; {remedy}, then run it again"
        raise RunError(f"{path}: could not be written: {refusal(error, path, needed)}", fix=fix) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(final: Path, fix: str) -> Iterator[Path]:
    """A hidden folder that becomes `final` when the block ends, or vanishes when it fails. What was there stays until
    the new one is whole. One process at a time: the caller holds a lock, or nobody else knows of `final`.

    Raises RunError with `fix` for whatever the operating system refuses.
    """
    new, old = _beside(final)
    try:
        recover(final)
        new.mkdir()
        yield new
        _settle(new)
        if final.exists():
            final.rename(old)
        new.rename(final)
        fsync(final.parent)
    except OSError as error:
        raise RunError(f"{final}: could not be written: {refusal(error, final)}", fix=fix) from None
    finally:
        with contextlib.suppress(OSError):
            recover(final)


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A name beside `path` for what isn't, or is no longer, whole."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether it has a name that is made here, which another program's files hardly have."""
    return TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove what killed processes were still writing in `folder`, which is this process's alone."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(path):
            remove(path)


def remove(path: Path) -> None:
    """A file, a link, or a folder and all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def recover(final: Path) -> None:
    """Put back what `replacing_folder` had moved aside where a kill kept it from going on, and remove what it left."""
    new, old = _beside(final)
    if old.exists() and not final.exists():
        old.rename(final)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def _beside(final: Path) -> tuple[Path, Path]:
    """The names of the new folder and of the old one while one takes the other's place."""
    return final.with_name(f".{final.name}.new.tmp"), final.with_name(f".{final.name}.old.tmp")


def _settle(folder: Path) -> None:
    """Modes as the umask has them, bytes and names on the disk."""
    mode = folder.stat().st_mode & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)
        fsync(path)
    fsync(folder)


def refusal(error: OSError, path: Path, needed: int = 0) -> str:
    """Why the operating system wouldn't write `path`, which needs so many bytes."""
    why = error.strerror or str(error)
    if error.errno not in (*FULL, None):  # None: of a library that says it in words alone
        return why
    with contextlib.suppress(OSError):
        wants = f"it needs {gib(needed)}, and " if needed else ""
        return f"{why}: {wants}{gib(shutil.disk_usage(path.parent).free)} are free"
    return why
