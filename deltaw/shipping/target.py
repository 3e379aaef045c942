"""The folder that a command writes: complete under its final name, or absent.

It is written hidden beside its final name, fsynced and renamed, so whoever sees it sees it complete, even after
a kill or on a full disk. What is known to be too large for the disk is refused before the first byte. An existing
folder is replaced only if that was asked for *and* deltaw wrote all of it (it holds the mark, which has the names):
`--replace` with a slip of the finger must cost neither a home directory nor what a user has put beside what was
written. Nor is one replaced that holds what is read (`sources`: the base, the adapter): a merge over its own base would
leave an adapter without a base. The old one is removed once the new one is in place. A link is followed: its target is
written, the link stays.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.errors import InputError, RunError
from deltaw.files.atomic import recover, replacing_folder, write_text_atomic
from deltaw.files.lock import holds_anything, locked
from deltaw.files.output import check_writable, gib, make_folder
from deltaw.files.strict_json import read_json
from deltaw.version import VERSION

MARK = "deltaw-export.json"  # what was written here, by which version, from what: `files` are its names
SPARE = 1 << 20  # bytes added to what is asked for, for the small files


@contextlib.contextmanager
def target(
    output: str | Path, *, what: Mapping[str, Any], needed: int, replace: bool = False, sources: Sequence[Path] = ()
) -> Iterator[Path]:
    """A folder to write into that becomes `output` when the block ends, or vanishes when it fails.

    `what` is recorded in it (MARK); `needed` is its size in bytes; `sources` are the files and folders that it is made
    from. Raises InputError for an `output` that can't be used, RunError if it can't be written, before and during
    writing.
    """
    final = _place(output)
    try:
        _check(final, replace, sources)
        make_folder(final.parent, f"output {output!s:.200}")
    except OSError as error:
        raise InputError(
            f"output {output!s:.200}: can't be made: {error.strerror}", fix="choose another output"
        ) from None
    with locked(final.with_name(f".{final.name}.lock"), f"output {output}", remove=lambda: True):
        recover(final)  # what a killed process had moved aside
        _check(final, replace, sources)
        _room(final, needed)
        with replacing_folder(final, fix="free some space, or choose another") as hidden:
            yield hidden
            mark = {"deltaw": VERSION, **what, "files": _files(hidden)}
            write_text_atomic(hidden / MARK, json.dumps(mark, indent=2) + "\n")


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _place(output: str | Path) -> Path:
    if not str(output):
        raise InputError("output: it has no name", fix="name a folder that doesn't exist yet")
    try:
        return Path(output).resolve()
    except (OSError, RuntimeError):  # which of the two, for links in a circle, Python's version decides
        raise InputError(f"output {output}: its links lead nowhere", fix="choose another output") from None


def check_output(output: str | Path, replace: bool) -> None:
    """Raise InputError for an `output` that can't be used, before anything is read for it."""
    with contextlib.suppress(OSError):  # a name that no folder can have is `target`'s to say
        final = _place(output)
        _check(final, replace, ())
        check_writable(final.parent if final.exists() else final, f"output {output}")


def _check(final: Path, replace: bool, sources: Sequence[Path]) -> None:
    if not final.exists() or (final.is_dir() and not holds_anything(final)):
        return
    if not replace:
        raise InputError(f"output {final} exists already", fix="choose another folder, or add --replace")
    if not (final / MARK).is_file():
        raise InputError(f"output {final} was not written by deltaw, so it isn't replaced", fix="choose another folder")
    written = _recorded(final / MARK)
    if others := [name for name in _files(final) if written is not None and name not in (MARK, *written)]:
        raise InputError(f"output {final} holds {others[0]}, which deltaw didn't write", fix="move it somewhere else")
    if within := [source for source in sources if source.resolve().is_relative_to(final)]:
        raise InputError(f"output {final} is what this is made from ({within[0]})", fix="choose another folder")


def _recorded(mark: Path) -> list[str] | None:
    """What a mark says that was written; None where it doesn't."""
    try:
        return list(read_json(mark)["files"])
    except (KeyError, TypeError, InputError):
        return None


def _room(final: Path, needed: int) -> None:
    free = shutil.disk_usage(final.parent).free
    if needed + SPARE > free:
        raise RunError(
            f"output {final}: needs {gib(needed)}, but only {gib(free)} are free there",
            fix="free some space, or choose another",
        )
