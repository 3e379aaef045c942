"""A source's name -> rows.

A source is a file, a folder or a pattern of files (`data/*.jsonl`, `**` for any depth), a folder that `datasets` saved,
`builtin:NAME`, `reasoning-gym:TASK` (gym.py), or a hub id (`org/name`, `org/name:split`, `name:split`). What exists
here under a name is meant before the hub's set of that name, which is said. A row that can't be read is a `Problem`
with its line number and the reading goes on: a file of a million lines isn't thrown away for one, and the caller
decides how many are too many. A source that can't be read at all is an `InputError`.

How each kind of file becomes rows:
- `.jsonl`, `.ndjson`: one object per line; empty lines are skipped but counted, so that line numbers stay an
  editor's. A file that turns out to be one array is read as such.
- `.json`: an array of objects, or an object with such a list inside (`{"data": […]}`; of `{"train": […], "test": […]}`
  the one called train, or `file.json:test`). A file that turns out to hold one object per line is read as such.
- `.csv`, `.tsv`: tables.py. `.parquet`, `.arrow`, `.feather`: arrow.py.
- `.txt`, `.md`: the whole file is one document, `{"text": …}`; `text_files.py` splits one where that is asked for.
- any of them packed: unpack.py; text in another encoding than UTF-8: encoding.py.
- a folder: every such file in it, in name order; the origin has the path below the folder.

In a text and in a table a line ends as its file's lines do, so CR LF is read as LF (and CR in a text that knows no LF).

Lines of JSON are split at LF only, in bytes: Python's text mode would also take CR, and `str.splitlines` U+2028,
which is legal inside a JSON string. JSON is read strictly (no NaN, no key twice): Python's default would
let the last key win.

Rejected: streaming (every later stage wants to shuffle, count and hold out, and fine-tuning sets fit in memory: as
lines, rows.py).
"""

import glob
import io
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from deltaw.data.arrow import is_saved, read_arrow, read_parquet, read_saved
from deltaw.data.builtin import BUILTINS, read_builtin
from deltaw.data.gym import PREFIX as GYM
from deltaw.data.gym import read_gym
from deltaw.data.hub import files_of_hub, read_hub
from deltaw.data.row import MAX_LINE, Item, Note, Problem, Row
from deltaw.data.rows import Rows
from deltaw.data.tables import read_csv, read_tsv
from deltaw.data.unpack import ARCHIVES, PACKED, unpacked
from deltaw.errors import InputError, Rejected
from deltaw.files.encoding import UTF8, as_utf8, setting
from deltaw.files.paths import MANY, similar
from deltaw.files.strict_json import MARK, NotJSON, json_kind, parse
from deltaw.show.text import counted

HUB_ID = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<split>[\w.+\[\]%:-]+))?")
OF_A_ROW = ("messages", "conversations", "tools", "history", "prompt", "completion", "chosen", "rejected", "input")


def read_rows(
    source: str, *, limit: int | None = None, encoding: str = UTF8, note: Callable[[str], object] = str
) -> tuple[list[Row], list[Problem]]:
    """All rows of `source`, or the first `limit`, and a problem for each that can't be read. `encoding`: of its text
    files; `note` is told what was decided about the source.

    Raises InputError when the source is missing, of an unknown kind, or unreadable as a whole.
    """
    rows: list[Row] = []
    problems = read_into(rows, source, limit=limit, encoding=encoding, note=note)
    return rows, problems


def read_into(
    rows: list[Row] | Rows,
    source: str,
    *,
    limit: int | None = None,
    encoding: str = UTF8,
    note: Callable[[str], object] = str,
) -> list[Problem]:
    """The same, the rows appended to `rows`."""
    problems: list[Problem] = []
    for item in _items(source, encoding):
        match item:
            case Note(text=text):
                note(text)
            case Problem():
                problems.append(item)
            case Row():
                rows.append(item)
                if len(rows) == limit:
                    break
    return problems


def files_of(source: str) -> list[Path]:
    """The files whose bytes decide what `read_rows` reads of `source`, or more; none where that isn't known (built-in
    sets, names that lead nowhere)."""
    if source.startswith(("builtin:", GYM)) or "\0" in source or not source:
        return []
    path = Path(source)
    whole = Path(source.rpartition(":")[0] or source)
    if not path.exists() and (is_saved(whole) or whole.is_file()):
        path = whole
    if path.exists():
        return _files_in(path)
    if glob.has_magic(source) and (paths := sorted(glob.glob(source, recursive=True))):
        return sorted({file for match in paths for file in _files_in(Path(match))})
    hub = HUB_ID.fullmatch(source)
    return files_of_hub(hub["name"], hub["split"] or "train") if hub and not _is_data_file(path) else []


def _files_in(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file()) if is_saved(path) else _data_files(path)
    return [path] if path.is_file() else []


def _items(source: str, encoding: str) -> Iterator[Item]:
    if source.startswith("builtin:"):
        return read_builtin(source.removeprefix("builtin:"))
    if source.startswith(GYM):
        return read_gym(source.removeprefix(GYM))
    if "\0" in source or not source:
        raise InputError(f"{source!r} isn't the name of a data source")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, encoding, of_hub=bool(HUB_ID.fullmatch(source)) and "/" in source)
    if path.exists():
        return _read_file(path, path.name, encoding)
    whole, _, part = source.rpartition(":")
    if whole and (is_saved(Path(whole)) or (Path(whole).is_file() and _kind(Path(whole)) == ".json")):
        return _read_part(Path(whole), part, encoding)
    if glob.has_magic(source) and (paths := sorted(glob.glob(source, recursive=True))):
        return _read_matches(source, [Path(path) for path in paths], encoding)
    hub = HUB_ID.fullmatch(source)
    if hub and ("/" in source or hub["split"]) and not source.startswith(".") and not _is_data_file(path):
        return read_hub(hub["name"], hub["split"] or "train", similar(path))
    if glob.has_magic(source):
        raise InputError(f"{source}: no file here matches it", fix=_beside(source))
    raise InputError(f"{source}: no such file or folder", fix=similar(path) or _known())


def _read_part(path: Path, part: str, encoding: str) -> Iterator[Item]:
    """One of the sets that a saved folder or a JSON file holds."""
    return read_saved(path, part) if path.is_dir() else _read_file(path, path.name, encoding, part)


def _read_folder(folder: Path, encoding: str, *, of_hub: bool = False) -> Iterator[Item]:
    if of_hub:
        yield Note(f"{folder}: the folder here, not the hub's set of that name")
    if is_saved(folder):
        yield from read_saved(folder, None)
        return
    files = _data_files(folder)
    if not files:
        raise InputError(f"{folder}: no data file in this folder", fix=f"known kinds: {' '.join(READERS)}")
    for path in files:
        yield from _read_file(path, path.relative_to(folder).as_posix(), encoding)


def _read_matches(pattern: str, paths: list[Path], encoding: str) -> Iterator[Item]:
    """The data files that match a pattern, and those in folders that do; a saved folder is read as one set."""
    base = _fixed(pattern)
    saved = [path for path in paths if path.is_dir() and is_saved(path)]
    files = {path for path in paths if path.is_file() and _is_data_file(path)}
    files |= {file for path in paths if path.is_dir() and not _is_recursive(pattern) for file in _data_files(path)}
    files = {file for file in files if not any(folder in file.parents for folder in saved)}
    if not files and not saved:
        what = f"{pattern}: none of the {len(paths)} that match is a data file"
        raise InputError(what, fix=f"known kinds: {' '.join(READERS)}")
    yield Note(f"{pattern} matches {counted(len(files) + len(saved), 'data file')}")
    for path in sorted([*files, *saved]):
        name = path.relative_to(base).as_posix() if base in path.parents else path.name
        yield from read_saved(path, None) if path.is_dir() else _read_file(path, name, encoding)


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if _is_data_file(path) and path.is_file() and not path.relative_to(folder).as_posix().startswith(".")
    )


def _is_recursive(pattern: str) -> bool:
    return "**" in Path(pattern).parts


def _fixed(pattern: str) -> Path:
    """The folder in front of a pattern's first wildcard."""
    parts = Path(pattern).parts
    return Path(*parts[: next(number for number, part in enumerate(parts) if glob.has_magic(part))])


def _read_file(path: Path, name: str, encoding: str, part: str | None = None) -> Iterator[Item]:
    """The rows of one file. `name` is how origins call it; `part`: which of the lists in a JSON file."""
    kind, packed = _kind(path), path.suffix.lower() in PACKED
    if path.suffix.lower() in ARCHIVES:
        raise InputError(f"{path}: archives aren't read", fix="unpack it and name the folder or the file")
    if packed and kind not in READERS:
        raise InputError(
            f"{path}: its name doesn't say what is in it", fix=f"rename it: {path.stem}.jsonl{path.suffix}"
        )
    if kind not in READERS:
        what = f"unknown kind of file {kind!r}" if kind else "its name doesn't say what kind of file it is"
        fix = f"known kinds: {' '.join(READERS)}"
        raise InputError(f"{path}: {what}", fix=f"save it as CSV; {fix}" if kind in SHEETS else fix)
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    if packed and kind in BINARY:
        raise InputError(f"{path}: a {kind} file is read only unpacked", fix="unpack it: it is packed inside already")
    try:
        with path.open("rb") as file:
            stream = unpacked(file, path) if packed else file
            if kind not in BINARY:
                stream = _as_utf8(stream, path, encoding)
            if part is not None:
                yield from _read_json(stream, name, part)
            else:
                yield from READERS[kind](stream, name)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def _as_utf8(file: Any, path: Path, encoding: str) -> BinaryIO:
    """The text without UTF-8's mark."""
    head = file.peek(4)[:4]
    if head.startswith(MARK):
        file.read(len(MARK))
        return file
    marked = head[:2] in (b"\xff\xfe", b"\xfe\xff")
    if encoding == UTF8 and (marked or b"\0\0" in (head[::2], head[1::2])):
        raise InputError(f"{path}: not UTF-8 text (it looks like UTF-16)", fix="set data.encoding: utf-16")
    return as_utf8(file, encoding, str(path))


def _read_jsonl(file: Any, name: str) -> Iterator[Item]:
    if file.peek(1).lstrip().startswith(b"["):
        data = file.read()
        if _is_array(data):  # JSON under the wrong name
            yield Note(f"{name}: one array, not an object per line")
            yield from _read_json(io.BytesIO(data), name)
            return
        file = io.BytesIO(data)
    yield from _read_lines(file, name)


def _is_array(data: bytes) -> bool:
    """Whether all of it is an array with an object in it."""
    try:
        values = parse(data)
    except NotJSON:
        return False
    return isinstance(values, list) and any(isinstance(value, dict) for value in values)


def _read_lines(file: BinaryIO, name: str) -> Iterator[Item]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        origin = f"{name}:{number}"
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):  # skip the rest without holding it
                line = file.readline(2**20)
            yield Problem(origin, f"the line is longer than {MAX_LINE // 2**20} MiB")
        elif line.strip():
            try:
                yield Row(_object(line), origin, line)
            except Rejected as rejected:
                cut = "" if line.endswith(b"\n") else " (the file ends here: cut off?)"
                yield Problem(origin, f"{rejected}{cut}")


def _object(line: bytes) -> dict[str, Any]:
    """One line's JSON object. Raises Rejected."""
    try:
        value = parse(line)
    except NotJSON as error:
        comma = "a comma behind the object" if error.more and line.rstrip().endswith(b"},") else ""
        wrong = setting(line) or comma
        raise Rejected(f"{error} ({wrong})" if wrong else str(error)) from None
    if not isinstance(value, dict):
        raise Rejected(f"expected an object, but this is {json_kind(value)}")
    return value


def _read_json(file: BinaryIO, name: str, part: str | None = None) -> Iterator[Item]:
    data = file.read()
    try:
        values = parse(data)
    except NotJSON as error:
        if error.more and data.lstrip().startswith(b"{"):  # JSON lines under the wrong name
            yield from _read_lines(io.BytesIO(data), name)
            return
        where = f"{name}:{error.line}" if error.line else name
        raise InputError(f"{where}: {error}", fix=setting(data) or "fix it there") from None
    if isinstance(values, dict):
        key = _list_inside(values, name, part)
        yield Note(f"{name}: the rows under {key!r}" + _beside_it(values, key))
        values = values[key]
    elif part is not None:
        raise InputError(f"{name}: is one list, so it has no {part!r} in it", fix="name it without that")
    if not isinstance(values, list):
        fix = "write [ {…}, {…} ], or one object per line in a .jsonl file"
        raise InputError(f"{name}: expected an array of objects, but this is {json_kind(values)}", fix=fix)
    for number, value in enumerate(values, 1):
        origin = f"{name}:{number}"
        if isinstance(value, dict):
            yield Row(value, origin)
        else:
            yield Problem(origin, f"expected an object, but this is {json_kind(value)}")


def _list_inside(value: dict[str, Any], name: str, part: str | None) -> str:
    """The key of a file's rows: the only list of objects in it, or the one that is asked for, or train."""
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    lists = [key for key in lists if key not in OF_A_ROW]
    if part is None and (len(lists) == 1 or "train" in lists):
        return lists[0] if len(lists) == 1 else "train"
    if part in lists:
        return str(part)
    if part is None and not lists:
        fix = "write [ {…}, {…} ], or one object per line in a .jsonl file"
        raise InputError(f"{name}: expected an array of objects, but this is an object without one inside", fix=fix)
    what = f"{name}: has several lists of rows" if part is None else f"{name}: has no list of rows {part!r}"
    raise InputError(what, fix=f"name one: {' or '.join(f'{name}:{key}' for key in lists[:5]) or 'there are none'}")


def _beside_it(value: dict[str, Any], key: str) -> str:
    rest = [f"{name!r}" for name in value if name != key]
    return f"; not {', '.join(rest[:5])}{' …' if len(rest) > 5 else ''}" if rest else ""


def _read_text(file: BinaryIO, name: str) -> Iterator[Item]:
    data = file.read()
    if data.strip():
        first = 1 + data[: len(data) - len(data.lstrip(b"\r\n"))].count(b"\n")
        yield _document(data, f"{name}:{first}")


def _document(data: bytes, origin: str) -> Item:
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
        return Row({"text": (text if "\n" in text else text.replace("\r", "\n")).strip("\n")}, origin)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        where = f"{origin.rpartition(':')[0]}:{line + 1}"
        return Problem(where, f"not UTF-8: byte {data[error.start]:#04x} ({setting(data)})")


READERS: dict[str, Callable[[BinaryIO, str], Iterator[Item]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".txt": _read_text,
    ".md": _read_text,
}
BINARY = (".parquet", ".arrow", ".feather")
SHEETS = (".xlsx", ".xls", ".ods", ".numbers")


def _kind(path: Path) -> str:
    """The suffix that says how a file is read: of a packed one, the one in front."""
    path = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return path.suffix.lower()


def _is_data_file(path: Path) -> bool:
    return _kind(path) in READERS or path.suffix.lower() in (*PACKED, *ARCHIVES)


def _beside(pattern: str) -> str:
    """What is in the folder of a pattern."""
    folder = _fixed(pattern)
    if not folder.is_dir():
        return similar(folder) or f"there is no folder {folder}"
    names = sorted(entry.name for entry in islice(folder.iterdir(), MANY) if not entry.name.startswith("."))
    return f"in {folder}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}" if names else f"{folder} is empty"


def _known() -> str:
    builtins = ", ".join(f"builtin:{name}" for name in BUILTINS)
    made = f"{builtins}, {GYM}TASK"
    return f"name a file ({' '.join(READERS)}), a folder of such files, {made}, or a hub id org/name"
