"""`deltaw cache`: what lies in `$DELTAW_CACHE` so that it needn't be made twice, and how to be rid of it.

    rows     prepared data sets (data/cache.py): a user's own data
    model    GGUF bases as folders of safetensors (base/gguf.py)
    kernels  of attention, as a package compiled them (kernels/flash.py)

All of it is made again when it is needed. Rows that a living process has open stay, and so do models that one is
converting just now.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from deltaw.base.source import cache_root, compiled_kernels
from deltaw.data.cache import kept_rows
from deltaw.data.cache import remove as remove_rows
from deltaw.errors import InputError
from deltaw.files import atomic
from deltaw.files.lock import LOCK, in_use
from deltaw.files.output import gib
from deltaw.files.strict_json import read_json
from deltaw.show.result import Result
from deltaw.show.table import table
from deltaw.show.text import counted, one_line

DAY = 86_400
OBJECT = ".o"  # how a compiled kernel's file ends


@dataclass(frozen=True)
class Item:
    """Something that was kept. `used`: when last, in seconds since 1970."""

    kind: str
    what: str
    path: Path
    size: int
    used: float


def cache_listed(*, clean: bool = False, older_than: float | None = None) -> Result:
    """What there is; with `clean`, what was removed of it. Raises InputError."""
    if older_than is not None and not clean:
        raise InputError("--older-than says what to remove, so it needs --clean", fix="add --clean")
    root, items = cache_root(), sorted([*_rows(), *_models(), *_kernels()], key=lambda item: -item.used)
    chosen = [item for item in items if time.time() - item.used >= (older_than or 0) * DAY] if clean else []
    removed = [item for item in chosen if _remove(item)]
    left = [item for item in items if item not in removed]
    size = sum(item.size for item in left)
    data = {
        "folder": str(root),
        "bytes": size,
        "items": [_json(item) for item in left],
        "removed": [_json(item) for item in removed],
        "in_use": [str(item.path) for item in chosen if item not in removed],
    }
    if clean:
        gone = f"{counted(len(removed), 'item')} removed, {gib(sum(item.size for item in removed))}"
        stay = [f"{one_line(item.what, 60)}: in use, so it stays" for item in chosen if item not in removed]
        return Result(data, "\n".join([gone, *stay]))
    if not items:
        return Result(data, f"nothing in {root}")
    rows = [[item.kind, one_line(item.what, 60), gib(item.size), _moment(item.used)] for item in items]
    total = f"{counted(len(items), 'item')} in {root}, {gib(size)}; deltaw cache --clean removes them"
    return Result(data, "\n".join([table(rows, ["kind", "what", "size", "last used"], align="llrl"), "", total]))


def _rows() -> list[Item]:
    return [
        Item(
            "rows", f"{kept.what}: {counted(kept.rows, 'row')}, {kept.tokens:,} tokens", kept.file, kept.size, kept.used
        )
        for kept in kept_rows()
    ]


def _models() -> list[Item]:
    folder, items = cache_root() / "gguf", []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".") or not (path / "config.json").is_file():
            continue
        try:
            config = read_json(path / "config.json", allow_nan=True)
            name, layers, width = (config.get(key, "?") for key in ("model_type", "num_hidden_layers", "hidden_size"))
            size = sum(file.stat().st_size for file in path.iterdir())
            items.append(
                Item("model", f"{name} of {layers} layers, {width} wide, out of a GGUF", path, size, _used(path))
            )
        except (InputError, OSError):
            continue
    return items


def _kernels() -> list[Item]:
    files = list((folder := compiled_kernels()).rglob(f"*{OBJECT}"))
    if not files:
        return []
    size, used = sum(file.stat().st_size for file in files), max(_used(file.parent) for file in files)
    return [Item("kernels", f"of attention, {counted(len(files), 'file')}", folder, size, used)]


def _used(folder: Path) -> float:
    """When a file in it was read last, as far as the file system tells."""
    return max(max(file.stat().st_atime, file.stat().st_mtime) for file in folder.iterdir())


def _remove(item: Item) -> bool:
    if item.kind == "rows":
        return any(remove_rows(kept) for kept in kept_rows() if kept.file == item.path)
    if item.kind == "kernels":  # the files alone: a process that compiles another one wants the folder
        for file in item.path.rglob(f"*{OBJECT}"):
            file.unlink(missing_ok=True)
        return True
    if in_use(item.path.with_name(f"{item.path.name}{LOCK}")):
        return False
    aside = atomic.temporary_name(item.path)
    try:
        item.path.rename(aside)
    except OSError:
        return False
    atomic.remove(aside)
    return True


def _json(item: Item) -> dict[str, object]:
    return {"kind": item.kind, "what": item.what, "path": str(item.path), "bytes": item.size, "last_used": item.used}


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
