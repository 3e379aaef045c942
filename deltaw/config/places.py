"""Where a run's relative names lead: a run is opened from any folder, and after it was moved.

A run file says `data.train: words.jsonl`, and means: in the folder where the run was started. That folder is recorded
in the run's (`started.json`) and never in config.yaml, whose names stay as they were written: a project that is moved
or unpacked elsewhere goes on, and what is published of a run has no path of this machine in it. A name is looked for

    1. in the folder where the run was started, as recorded
    2. where that folder stands to the run's now: a project was moved as a whole
    3. beside the run's folder: it was moved together with its data

A run of a deltaw that recorded nothing has 2 (from its `output`, if that is relative), the current folder, and 3. A
name that is nowhere stays as it is: it may be on a hub.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PlainSerializer

from deltaw.config.run import RunConfig
from deltaw.config.sources import with_names
from deltaw.errors import InputError
from deltaw.files.atomic import write_text_atomic
from deltaw.files.paths import written
from deltaw.files.strict_json import read_json

STARTED = "started.json"
WORDS = ("chatml",)  # stand where a path may stand and are none
PATTERN = frozenset("*?[")


def record(folder: Path) -> None:
    """Keep that the run in `folder` was started in the current folder. Raises RunError when the disk refuses."""
    write_text_atomic(folder / STARTED, json.dumps({"folder": str(Path.cwd())}) + "\n")


def placed(config: RunConfig, folder: Path) -> RunConfig:
    """`config`, of the run in `folder`, with every relative path where it leads from the current folder."""
    places = roots(config, folder)
    if not places or _same(places[0], Path.cwd()):
        places = [Path(), *places[1:]]
    new: RunConfig = _replaced(config, places)
    data = {}
    for field in ("train", "eval"):
        value = getattr(config.data, field)
        if isinstance(value, str | tuple) and (to := with_names(value, lambda name: place(name, places))) != value:
            data[field] = to
    return new.model_copy(update={"data": new.data.model_copy(update=data)}) if data else new


def roots(config: RunConfig, folder: Path) -> list[Path]:
    """The folders in which the run's relative names are looked for, in this order."""
    began, here = _recorded(folder), folder.absolute()
    places = [began] if began else []
    output = os.path.join(began, config.output) if began else config.output
    if began or not os.path.isabs(output):
        places.append(Path(os.path.normpath(here / os.path.relpath(began or ".", output))))
    places += [*([] if began else [Path.cwd()]), here.parent]
    return list(dict.fromkeys(places))


def check_there(name: str, config: RunConfig, folder: Path, what: str, fix: str) -> None:
    """Raise InputError with every place that was looked in where the run's `name` is a path and nowhere."""
    places = roots(config, folder)
    if not _is_relative(name) or any(_exists(place / name) for place in places):
        return
    tried = " nor in ".join(dict.fromkeys(map(str, places[:2])))
    began = " (where the run was started)" if _recorded(folder) else ""
    first, nor, rest = tried.partition(" nor in ")
    raise InputError(f"{folder}: its {what}, {name}, is neither in {first}{began}{nor}{rest}" if nor
                     else f"{folder}: its {what}, {name}, isn't in {first}", fix=fix)  # fmt: skip


def _recorded(folder: Path) -> Path | None:
    try:
        began = read_json(folder / STARTED, max_bytes=100_000).get("folder")
    except InputError:  # an older run, or a file that is damaged: the other places are left
        return None
    return Path(began) if isinstance(began, str) and os.path.isabs(began) else None


def _replaced(value: Any, places: list[Path], is_path: bool = False) -> Any:
    """`value` with the paths in it replaced: fields of a section whose type is PathText, one or several."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        new = {
            name: _replaced(getattr(value, name), places, _takes_paths([field.annotation, *field.metadata]))
            for name, field in fields.items()
        }
        return value.model_copy(update={name: to for name, to in new.items() if to != getattr(value, name)})
    if isinstance(value, list | tuple):
        return type(value)(_replaced(each, places, is_path) for each in value)
    return place(value, places) if is_path and isinstance(value, str) else value


def _takes_paths(parts: list[Any]) -> bool:
    """Whether a field's type has PathText in it, whose mark is how it is written."""
    return any(
        (isinstance(part, PlainSerializer) and part.func is written) or _takes_paths(list(_arguments(part)))
        for part in parts
    )


def _arguments(part: Any) -> Iterator[Any]:
    yield from getattr(part, "__args__", ())
    yield from getattr(part, "__metadata__", ())


def place(name: str, places: Sequence[Path]) -> str:
    """A name where it leads: in the first of `places` that has it, else as it is."""
    if not _is_relative(name):
        return name
    return next((str(place / name) for place in places if _exists(place / name)), name)


def _is_relative(name: str) -> bool:
    return name not in WORDS and not os.path.isabs(name) and ":" not in name.partition("/")[0]


def _exists(path: Path) -> bool:
    try:
        if path.exists():
            return True
        return not PATTERN.isdisjoint(path.name) and next(path.parent.glob(path.name), None) is not None
    except (OSError, ValueError):  # a name too long for a path, or one that mustn't be looked into
        return False


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
