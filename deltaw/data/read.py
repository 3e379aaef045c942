"""A source's name -> rows.

A source is a file (.jsonl .ndjson .json .csv .parquet .txt .md), a folder of such files, `builtin:NAME`, or
a hub id (`org/name`, `org/name:split`, `name:split`). A row that can't be read is a `Problem` with its line
number and the reading goes on: a file of a million lines isn't thrown away for one, and the caller decides
how many are too many. A source that can't be read at all is an `InputError`.

How each format becomes rows:
- `.jsonl`, `.ndjson`: one object per line; empty lines are skipped but counted, so that line numbers stay an
  editor's.
- `.json`: an array of objects (a file that turns out to hold one object per line is read as such).
- `.csv`: the first record names the columns; a quote that never closes is an error and not one long field.
- `.txt`, `.md`: the whole file is one document, `{"text": …}`; `text_files.py` splits one where that is asked for.
- `.parquet` and hub sets: Arrow gives every object of a column the same fields and fills those that a row lacks
  with null, so a null in an object is taken as lacking (a tool that has no `dock` isn't shown `"dock": null`). A
  null that a row had on purpose can't be told from those and goes, too; JSON keeps it. Arrow also has one order of
  fields for all rows, that in which it first met them.
- a folder: every such file in it, in name order; the origin has the path below the folder.

Lines are split at LF only, in bytes: Python's text mode would also take CR, and `str.splitlines` U+2028,
which is legal inside a JSON string. JSON is read strictly (no NaN, no key twice): Python's default would
let the last key win.

Rejected: streaming (every later stage wants to shuffle, count and hold out, and fine-tuning sets fit in
memory), and compressed files (a bomb to guard against, for something `gunzip` does).
"""

import csv
import difflib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from deltaw.data.builtin import BUILTINS, read_builtin
from deltaw.data.row import Problem, Row
from deltaw.errors import InputError, Rejected
from deltaw.files.strict_json import NotJSON, json_kind, parse

MAX_LINE = 32 * 2**20  # bytes; a longer line is a fault of the file, not a document
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")
HUB_ID = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<split>[\w.+\[\]%:-]+))?")

Item = Row | Problem


def read_rows(source: str, *, limit: int | None = None) -> tuple[list[Row], list[Problem]]:
    """All rows of `source`, or the first `limit`, and a problem for each that can't be read.

    Raises InputError when the source is missing, of an unknown kind, or unreadable as a whole.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for item in _items(source):
        if isinstance(item, Problem):
            problems.append(item)
            continue
        rows.append(item)
        if len(rows) == limit:
            break
    return rows, problems


def _items(source: str) -> Iterator[Item]:
    if source.startswith("builtin:"):
        return read_builtin(source.removeprefix("builtin:"))
    if "\0" in source or not source:
        raise InputError(f"{source!r} isn't the name of a data source")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        return _read_file(path, path.name)
    hub = HUB_ID.fullmatch(source)
    if hub and ("/" in source or hub["split"]) and not source.startswith(".") and not _is_data_file(path):
        return _read_hub(hub["name"], hub["split"] or "train")
    raise InputError(f"{source}: no such file or folder", fix=_near_miss(path))


def _read_folder(folder: Path) -> Iterator[Item]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if _is_data_file(path) and path.is_file() and not path.relative_to(folder).as_posix().startswith(".")
    )
    if not files:
        raise InputError(f"{folder}: no data file in this folder", fix=f"known kinds: {' '.join(READERS)}")
    for path in files:
        yield from _read_file(path, path.relative_to(folder).as_posix())


def _read_file(path: Path, name: str) -> Iterator[Item]:
    """The rows of one file. `name` is how origins call it."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        raise InputError(f"{path}: compressed files can't be read", fix="decompress it first and name the result")
    if suffix not in READERS:
        raise InputError(f"{path}: unknown kind of file {suffix!r}", fix=f"known kinds: {' '.join(READERS)}")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(4)
            marked = head[:2] in (b"\xff\xfe", b"\xfe\xff")
            if suffix != ".parquet" and (marked or b"\0\0" in (head[::2], head[1::2])):
                raise InputError(f"{path}: not UTF-8 text (it looks like UTF-16)", fix="save it as UTF-8")
            file.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
            yield from READERS[suffix](file, name)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def _read_jsonl(file: BinaryIO, name: str) -> Iterator[Item]:
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
                yield Row(_object(line), origin)
            except Rejected as rejected:
                cut = "" if line.endswith(b"\n") else " (the file ends here: cut off?)"
                yield Problem(origin, f"{rejected}{cut}")


def _object(line: bytes) -> dict[str, Any]:
    """One line's JSON object. Raises Rejected."""
    try:
        value = parse(line)
    except NotJSON as error:
        raise Rejected(str(error)) from None
    if not isinstance(value, dict):
        raise Rejected(f"expected an object, but this is {json_kind(value)}")
    return value


def _read_json(file: BinaryIO, name: str) -> Iterator[Item]:
    start = file.tell()
    data = file.read()
    try:
        values = parse(data)
    except NotJSON as error:
        if error.more and data.lstrip().startswith(b"{"):  # JSON lines under the wrong name
            file.seek(start)
            yield from _read_jsonl(file, name)
            return
        where = f"{name}:{error.line}" if error.line else name
        raise InputError(f"{where}: {error}", fix="fix it there, or save it as UTF-8 JSON") from None
    if not isinstance(values, list):
        fix = "write [ {…}, {…} ], or one object per line in a .jsonl file"
        raise InputError(f"{name}: expected an array of objects, but this is {json_kind(values)}", fix=fix)
    for number, value in enumerate(values, 1):
        origin = f"{name}:{number}"
        if isinstance(value, dict):
            yield Row(value, origin)
        else:
            yield Problem(origin, f"expected an object, but this is {json_kind(value)}")


def _read_csv(file: BinaryIO, name: str) -> Iterator[Item]:
    # A byte that isn't UTF-8 becomes a lone surrogate, which is refused later, in its row, if its column is used.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    limit, number = csv.field_size_limit(MAX_LINE), 0
    try:
        reader = csv.DictReader(text, strict=True)
        if not reader.fieldnames:
            return
        if len(set(reader.fieldnames)) < len(reader.fieldnames):
            raise InputError(f"{name}: two columns have the same name", fix="rename one in the first line")
        for number, value in enumerate(reader, 1):
            origin = f"{name}:{number}"
            if None in value or None in value.values():
                yield Problem(origin, f"the row doesn't have {len(reader.fieldnames)} fields as the first line has")
            else:
                yield Row(dict(value), origin)
    except csv.Error as error:
        fix = "fix the quotes there: a quote inside a quoted field is written twice"
        raise InputError(f"{name}:{number + 1}: not CSV: {error}", fix=fix) from None
    finally:
        csv.field_size_limit(limit)
        text.detach()


def _read_parquet(file: BinaryIO, name: str) -> Iterator[Item]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"{name}: reading Parquet needs pyarrow", fix="pip install 'deltaw[parquet]'") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield Row(_columns(value, batch.schema), f"{name}:{number}")
    except arrow.ArrowException as error:
        raise InputError(f"{name}: not a Parquet file: {str(error).splitlines()[0]}") from None


def _columns(value: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """An Arrow table's row; a column that is null stays, as in any table. `schema`: its types, None if unknown."""
    return {name: _without_filling(item, _type_of(schema, name)) for name, item in value.items()}


def _without_filling(value: Any, kind: Any) -> Any:
    """A value without the nulls that fill up its objects. Maps come as pairs, JSON may as text: neither is filled."""
    if getattr(kind, "extension_name", "") == "arrow.json":
        return _from_json(value)
    if isinstance(value, dict):
        filled = {name: item for name, item in value.items() if item is not None}
        return {name: _without_filling(item, _type_of(kind, name)) for name, item in filled.items()}
    if isinstance(value, list):
        if hasattr(kind, "item_type"):
            return {key: _without_filling(item, kind.item_type) for key, item in value}
        return [_without_filling(item, getattr(kind, "value_type", None)) for item in value]
    return value


def _type_of(kind: Any, name: str) -> Any:
    """The type of a field of a schema or an object; None where it isn't known."""
    index = kind.get_field_index(name) if hasattr(kind, "get_field_index") else -1
    return kind.field(index).type if index >= 0 else None


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value  # a hub set's are read already
    try:
        return parse(value)
    except NotJSON:
        return value


def _read_text(file: BinaryIO, name: str) -> Iterator[Item]:
    data = file.read()
    if data.strip():
        first = 1 + data[: len(data) - len(data.lstrip(b"\r\n"))].count(b"\n")
        yield _document(data, f"{name}:{first}")


def _document(data: bytes, origin: str) -> Item:
    try:
        return Row({"text": data.decode("utf-8").replace("\r\n", "\n").strip("\n")}, origin)
    except UnicodeDecodeError as error:
        return Problem(origin, f"not UTF-8: byte {data[error.start]:#04x}")


READERS: dict[str, Callable[[BinaryIO, str], Iterator[Item]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}


def _read_hub(name: str, split: str) -> Iterator[Item]:
    try:
        import datasets
    except ImportError:
        what = f"{name}: no such file or folder, and reading it from the hub needs the datasets package"
        raise InputError(what, fix="name a file that exists, or pip install 'deltaw[hub-data]'") from None
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds, all of them about the name or the network
        raise InputError(f"{name}:{split}: {str(error).strip().splitlines()[0]}") from None
    schema = getattr(getattr(table, "features", None), "arrow_schema", None)
    for number, value in enumerate(table, 1):
        yield Row(_columns(value, schema), f"{name}:{split}:{number}")


def _is_data_file(path: Path) -> bool:
    return path.suffix.lower() in READERS or path.suffix.lower() in COMPRESSED


def _near_miss(path: Path) -> str:
    names = [entry.name for entry in islice(path.parent.iterdir(), 10_000)] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    builtins = ", ".join(f"builtin:{name}" for name in BUILTINS)
    return f"name a file ({' '.join(READERS)}), a folder of such files, {builtins}, or a hub id org/name"
