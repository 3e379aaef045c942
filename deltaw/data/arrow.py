"""Arrow's files -> rows: Parquet, .arrow and .feather, and the folders that `datasets` writes with `save_to_disk`.

Arrow gives every object of a column the same fields and fills those that a row lacks with null, so a null in an object
is taken as lacking (a tool that has no `dock` isn't shown `"dock": null`). A null that a row had on purpose can't be
told from those and goes, too; JSON keeps it. Arrow also has one order of fields for all rows, that in which it first
met them.

    saved/  dataset_info.json  state.json  data-00000-of-00001.arrow …    one set: state.json lists its files, in order
    saved/  dataset_dict.json  train/  test/                              a set per split, {"splits": ["train", "test"]}

An .arrow file is a stream of record batches (what `datasets` writes) or has Arrow's file format (.feather of today).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from deltaw.data.row import Item, Note, Row
from deltaw.errors import InputError, first_line
from deltaw.files.strict_json import NotJSON, parse, read_json

SET, SPLITS = "state.json", "dataset_dict.json"


def read_parquet(file: BinaryIO, name: str) -> Iterator[Item]:
    arrow = _arrow(name, "Parquet")
    import pyarrow.parquet as parquet

    with _damage(arrow, name, "a Parquet file"):
        yield from _rows(parquet.ParquetFile(file).iter_batches(), name)


def read_arrow(file: BinaryIO, name: str) -> Iterator[Item]:
    """A .arrow or .feather file."""
    arrow = _arrow(name, "an Arrow file")
    with _damage(arrow, name, "an Arrow file"):
        yield from _rows(_batches(arrow, file), name)


def read_saved(folder: Path, split: str | None) -> Iterator[Item]:
    """What `save_to_disk` wrote. Raises InputError on a split that isn't there."""
    if (folder / SPLITS).is_file():
        splits = [name for name in read_json(folder / SPLITS).get("splits", ()) if isinstance(name, str)]
        chosen = split or (splits[0] if len(splits) == 1 else "train")
        if chosen not in splits:
            raise InputError(
                f"{folder}: has no split {chosen!r}", fix=" or ".join(f"{folder}:{name}" for name in splits[:5])
            )
        if not split and len(splits) > 1:
            yield Note(f"{folder}: the split train of {', '.join(splits)}")
        folder = folder / Path(chosen).name
    elif split:
        raise InputError(f"{folder}: is one set, without splits", fix=f"name it as {folder}")
    state = read_json(folder / SET)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise InputError(
            f"{folder}: holds a choice of rows, made by an old version of datasets",
            fix="in Python: load_from_disk(…).flatten_indices().save_to_disk(…)",
        )
    arrow, number = _arrow(str(folder), "what datasets saved"), 0
    for part in state.get("_data_files") or ():
        path = folder / Path(str(part.get("filename") if isinstance(part, dict) else part)).name
        try:
            with path.open("rb") as file, _damage(arrow, str(path), "an Arrow file"):
                for row in _rows(_batches(arrow, file), folder.name, number):
                    number += 1
                    yield row
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}", fix="save the set again") from None


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / SPLITS).is_file() or ((folder / SET).is_file() and (folder / "dataset_info.json").is_file())


def zstd_stream(file: BinaryIO, name: str) -> Any:
    """A .zst file, to be read unpacked."""
    arrow = _arrow(name, "a .zst file")
    return arrow.CompressedInputStream(arrow.PythonFile(file, mode="r"), "zstd")


def columns(value: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """An Arrow table's row; a column that is null stays, as in any table. `schema`: its types, None if unknown."""
    return {name: _without_filling(item, _type_of(schema, name)) for name, item in value.items()}


def _arrow(name: str, what: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InputError(f"{name}: reading {what} needs pyarrow", fix="pip install 'deltaw[parquet]'") from None
    return pyarrow


class _damage:
    """Arrow's errors inside the block are an InputError that says what the file isn't."""

    def __init__(self, arrow: Any, name: str, kind: str) -> None:
        self._arrow, self._name, self._kind = arrow, name, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, self._arrow.ArrowException) or (isinstance(error, OSError) and error.errno is None):
            raise InputError(
                f"{self._name}: not {self._kind}, or a damaged one: {first_line(error)}",
                fix="make or download the file again",
            ) from None


def _batches(arrow: Any, file: BinaryIO) -> Iterator[Any]:
    head = file.read(6)
    file.seek(0)
    if head[:4] == b"FEA1":
        import pyarrow.feather as feather

        yield from feather.read_table(file).to_batches()
    elif head == b"ARROW1":
        reader = arrow.ipc.open_file(file)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        yield from arrow.ipc.open_stream(file)


def _rows(batches: Any, name: str, number: int = 0) -> Iterator[Row]:
    for batch in batches:
        batch.validate(full=True)
        for value in batch.to_pylist():
            number += 1
            yield Row(columns(value, batch.schema), f"{name}:{number}")


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
