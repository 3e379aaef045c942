"""Weights on disk: read with checks, written whole or not at all.

Reading. A file from a stranger is looked at in Python first: the 8-byte length, the JSON header under a cap,
the number and names of tensors, where the data ends. Only then does the safetensors library map it. That
order turns each broken file into one InputError that names it, and a hostile header (99 MB, a million
tensors) costs milliseconds. Pickles (`.bin`, `.pt`) are never opened: loading one runs whatever code it
holds.

Writing. `replacing(path)` hands out a temporary file in the same folder; after the block it is fsynced and
renamed over `path`, and the folder is fsynced. A reader sees the old bytes or the new ones; a crash leaves at
most a `.*.tmp`. The safetensors library renames too, but never fsyncs and always leaves mode 0600, so that a
server run by another user can't read the file. Here the mode follows the umask, or stays what it was.

Rejected: an own safetensors writer (the format is small, but the dtype table would have to follow torch), and
`safetensors.torch.load_file` for untrusted files (its errors don't name the file, and its tensors stay mapped
to a file that somebody may truncate, which is a SIGBUS).

This module imports no torch: folders are checked before the heavy imports.
"""

import contextlib
import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open

from deltaw.errors import InputError, RunError, listed

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
NAMED = "transformers_weights"  # in config.json: the name of another file
MAX_HEADER_BYTES = 10_000_000  # an adapter of 1,000 modules needs 250 kB
MAX_TENSORS = 100_000
MAX_NAME = 1_000
MAX_SIDES = 8  # of a tensor's shape


class Header(NamedTuple):
    """What a safetensors file says of itself, by tensor name, and the free-form metadata. `dtypes`: in the file's words
    ("BF16"); `spans`: the first byte in the file and the one behind the last."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    dtypes: dict[str, str]
    spans: dict[str, tuple[int, int]]


def read_json(path: Path, *, max_bytes: int = 10_000_000, allow_nan: bool = False) -> dict[str, Any]:
    """The JSON object in a small UTF-8 file; no key may stand twice. Raises InputError naming the file."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    if len(data) > max_bytes:
        raise InputError(f"{path}: more than {max_bytes:,} bytes, too large for its kind")
    return _parse_json(path, data, allow_nan=allow_nan)


def read_header(path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS) -> Header:
    """Names, shapes and metadata; checks all that can be checked without the data. Raises InputError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                _corrupt(path, "it ends inside its header, so it was cut short or is no safetensors file")
            if length > max_header_bytes:
                _corrupt(path, f"its header has {length:,} bytes; at most {max_header_bytes:,} are accepted")
            data = file.read(length)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    # Counted in the bytes first, by a sign that JSON can't spell otherwise: a million entries shouldn't be parsed.
    if (count := data.count(b"{") - 1 - (b'"__metadata__"' in data)) > max_tensors:
        _corrupt(path, f"it holds {count:,} tensors; at most {max_tensors:,} are accepted")
    raw = _parse_json(path, data, allow_nan=False)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _corrupt(path, "its metadata isn't text by name")
    shapes, dtypes, spans, end = {}, {}, {}, 0
    for name, entry in raw.items():
        shapes[name], dtypes[name], (tensor_start, tensor_end) = _entry(path, name, entry)
        spans[name] = 8 + length + tensor_start, 8 + length + tensor_end
        end = max(end, tensor_end)
    if 8 + length + end != size:
        missing = 8 + length + end - size
        state = f"{missing:,} bytes are missing at its end" if missing > 0 else f"{-missing:,} bytes too many"
        _corrupt(path, state)
    return Header(shapes, metadata, dtypes, spans)


def load_safetensors(
    path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS
) -> "dict[str, Tensor]":
    """All tensors of a small, untrusted file, copied into memory. Raises InputError for any fault of it."""
    header = read_header(path, max_header_bytes=max_header_bytes, max_tensors=max_tensors)
    with _reading(path) as file:
        return {name: file.get_tensor(name).clone() for name in header.shapes}


def weights_file(folder: Path) -> Path | None:
    """The file of a model folder that transformers would load: the one that config.json names, else the single file,
    else the index of the shards; None for a folder without weights. Every reader here starts from it."""
    named = None
    if (folder / "config.json").is_file():
        named = read_json(folder / "config.json", allow_nan=True).get(NAMED)
    if named is not None:
        if (
            not isinstance(named, str)
            or Path(named).name != named
            or not named.endswith((SUFFIX, f"{SUFFIX}.index.json"))
        ):
            raise InputError(
                f"{folder / 'config.json'}: {NAMED} is {str(named)[:80]!r}, no file of weights in its folder"
            )
        return folder / named
    return next((folder / name for name in (SINGLE, INDEX) if (folder / name).is_file()), None)


def shards(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a model folder with their tensors' names; checks headers, reads no data.

    As transformers reads them: a shard gives all its tensors, also those that the index doesn't name, and one that
    stands in two shards is taken from the later.
    """
    chosen = weights_file(folder)
    if chosen is None:
        raise InputError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    promised: dict[Path, list[str]] = {chosen: []}
    if chosen.name.endswith(".json"):
        promised = _by_file(chosen, read_json(chosen, max_bytes=100_000_000).get("weight_map"))
    gone = [file.name for file in promised if not file.is_file()]
    if gone:
        raise InputError(f"{folder}: {len(gone)} of {len(promised)} weight files are missing:\n{listed(gone, 2)}")
    places: dict[str, Path] = {}
    for file in sorted(promised):
        shapes = _base_header(file).shapes
        if absent := sorted(set(promised[file]) - set(shapes)):
            raise InputError(f"{file}: lacks {len(absent)} tensors that {chosen.name} places there: {absent[0]!r}")
        places |= dict.fromkeys(shapes, file)
    return {file: [name for name, place in places.items() if place == file] for file in sorted(promised)}


def read_tensors(folder: Path) -> "Iterator[tuple[str, Tensor]]":
    """(name, tensor) over all shards of a model folder, one tensor in memory at a time. Raises InputError."""
    for path, names in shards(folder).items():
        with _reading(path) as file:
            for name in names:
                yield name, file.get_tensor(name)


def read_tensor(path: Path, name: str) -> "Tensor":
    """One tensor, copied into memory, of a file that `read_header` or `shards` checked. Raises InputError."""
    with _reading(path) as file:
        return file.get_tensor(name).clone()


def readable_tensors(path: Path, names: Iterable[str]) -> "Iterator[tuple[str, Tensor]]":
    """(name, tensor) of a file that `read_header` checked, one in memory at a time, opened once; what torch has no type
    for is left out. Raises InputError for a file that can't be opened."""
    with _reading(path) as file:
        for name in names:
            try:
                tensor = file.get_tensor(name).clone()
            except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError):
                continue
            yield name, tensor


def read_rows(path: Path, name: str, rows: "Sequence[int]") -> "Tensor":
    """Some rows of a tensor of such a file: only they are read. Raises InputError, also for a row that isn't there."""
    import torch

    with _reading(path) as file:
        part = file.get_slice(name)
        if any(not 0 <= row < part.get_shape()[0] for row in rows):
            _corrupt(path, f"{name} has {part.get_shape()[0]} rows")
        return torch.cat([part[row : row + 1] for row in rows])


def check_readable(path: Path) -> None:
    """Raise InputError for whatever the safetensors library finds wrong in a file: overlaps, gaps, sizes, types."""
    with _reading(path):
        pass


def save_safetensors(tensors: "Mapping[str, Tensor]", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write all tensors to `path` at once or not at all. Raises RunError when the disk refuses."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
    with replacing(path, needed) as temporary:
        save_file(plain, temporary, metadata={"format": "pt", **(metadata or {})})


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file at once or not at all. Raises RunError when the disk refuses."""
    data = text.encode()
    with replacing(path, len(data)) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends, or vanishes when it fails.

    `needed` is the size in bytes, for the message. Raises RunError for whatever the operating system refuses.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # Creating it ourselves shows what the umask allows, without the race of reading the umask.
        with temporary.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        if path.exists():
            mode = path.stat().st_mode
        yield temporary
        temporary.chmod(mode & 0o7777)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: could not be written: {_disk(path, needed)}{error}", fix=_MAKE_ROOM) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_MAKE_ROOM = "nothing was lost; free space or choose another folder, then run it again"


def _disk(path: Path, needed: int) -> str:
    with contextlib.suppress(OSError):
        return f"needs {needed:,} bytes, {shutil.disk_usage(path.parent).free:,} free; "
    return ""


def _corrupt(path: Path, reason: str) -> NoReturn:
    raise InputError(f"{path}: {reason}", fix="get the file again from where it came")


def _parse_json(path: Path, data: bytes, *, allow_nan: bool) -> dict[str, Any]:
    def constant(name: str) -> float:
        if not allow_nan:
            raise ValueError(f"{name} is no number")
        return float(name)

    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=constant, object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text", fix="save it as UTF-8, or get it again") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path}: not valid JSON: {reason}", fix="get the file again from where it came") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object, not {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} is set {counts.most_common(1)[0][1]} times")
    return value


def _entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    """(shape, dtype, offsets) of one tensor. Overlaps, gaps and sizes are the library's to check."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        _corrupt(path, f"it holds a tensor with an impossible name: {name[:40]!r}")
    shape = _naturals(entry.get("shape") if isinstance(entry, dict) else None)
    offsets = _naturals(entry.get("data_offsets") if isinstance(entry, dict) else None)
    # The sides are counted first: the product of half a million of them takes minutes.
    if shape is None or len(shape) > MAX_SIDES or math.prod(shape) >= 2**63 or offsets is None or len(offsets) != 2:
        _corrupt(path, f"tensor {name!r} has no possible shape or place")
    return tuple(shape), str(entry.get("dtype")), (offsets[0], offsets[1])


def _naturals(value: Any) -> list[int] | None:
    """`value` if it is a list of integers in [0, 2^63)."""
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value):
        return value
    return None


def _base_header(path: Path) -> Header:
    return read_header(path, max_header_bytes=100_000_000, max_tensors=1_000_000)


def _by_file(index: Path, weight_map: Any) -> dict[Path, list[str]]:
    """The index's `tensor -> file` turned round. A file outside the folder is refused."""
    if not isinstance(weight_map, dict) or not weight_map:
        _corrupt(index, "it has no weight_map")
    names: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(SUFFIX):
            _corrupt(index, f"{name!r} is placed in {file!r}, which is no safetensors file of this folder")
        names.setdefault(index.parent / file, []).append(name)
    return names


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """safe_open with its errors turned into ours; the other kinds are torch's, for odd dtypes and shapes."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        _corrupt(path, f"not a readable safetensors file: {str(error).splitlines()[0]}")
