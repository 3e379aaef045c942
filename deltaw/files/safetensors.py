"""One safetensors file: its header checked, its tensors read, a small file written.

A file from a stranger is looked at in Python first: the 8-byte length, the JSON header under a cap, the number and
names of tensors, where the data ends. Only then does the safetensors library map it. That order turns each broken file
into one InputError that names it, and a hostile header (99 MB, a million tensors) costs milliseconds. Pickles (`.bin`,
`.pt`) are never opened: loading one runs whatever code it holds.

Rejected: an own safetensors writer (the format is small, but the dtype table would have to follow torch), and
`safetensors.torch.load_file` for untrusted files (its errors don't name the file, and its tensors stay mapped to a
file that somebody may truncate, which is a SIGBUS).

This module imports no torch: folders are checked before the heavy imports.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open

from deltaw.errors import InputError
from deltaw.files.atomic import replacing
from deltaw.files.strict_json import parse_object

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
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


def read_header(path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS) -> Header:
    """Names, shapes and metadata; checks all that can be checked without the data. Raises InputError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                corrupt(path, "it ends inside its header, so it was cut short or isn't a safetensors file")
            if length > max_header_bytes:
                corrupt(path, f"its header has {length:,} bytes; at most {max_header_bytes:,} are accepted")
            data = file.read(length)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    # Counted in the bytes first, by a sign that JSON can't spell otherwise: a million entries shouldn't be parsed.
    if (count := data.count(b"{") - 1 - (b'"__metadata__"' in data)) > max_tensors:
        corrupt(path, f"it holds {count:,} tensors; at most {max_tensors:,} are accepted")
    raw = parse_object(path, data)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        corrupt(path, "its metadata isn't text by name")
    shapes, dtypes, spans, end = {}, {}, {}, 0
    for name, entry in raw.items():
        shapes[name], dtypes[name], (tensor_start, tensor_end) = _entry(path, name, entry)
        spans[name] = 8 + length + tensor_start, 8 + length + tensor_end
        end = max(end, tensor_end)
    if 8 + length + end != size:
        missing = 8 + length + end - size
        state = f"{missing:,} bytes are missing at its end" if missing > 0 else f"{-missing:,} bytes too many"
        corrupt(path, state)
    return Header(shapes, metadata, dtypes, spans)


def load_safetensors(
    path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS
) -> "dict[str, Tensor]":
    """All tensors of a small, untrusted file, copied into memory. Raises InputError for any fault of it."""
    header = read_header(path, max_header_bytes=max_header_bytes, max_tensors=max_tensors)
    with opened(path) as file:
        return {name: file.get_tensor(name).clone() for name in header.shapes}


def read_tensor(path: Path, name: str) -> "Tensor":
    """One tensor, copied into memory, of a file that `read_header` or `shards` checked. Raises InputError."""
    with opened(path) as file:
        return file.get_tensor(name).clone()


def readable_tensors(path: Path, names: Iterable[str]) -> "Iterator[tuple[str, Tensor]]":
    """(name, tensor) of a file that `read_header` checked, one in memory at a time, opened once; what torch has no type
    for is left out. Raises InputError for a file that can't be opened."""
    with opened(path) as file:
        for name in names:
            try:
                tensor = file.get_tensor(name).clone()
            except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError):
                continue
            yield name, tensor


def read_rows(path: Path, name: str, rows: "Sequence[int]") -> "Tensor":
    """Some rows of a tensor of such a file: only they are read. Raises InputError, also for a row that isn't there."""
    import torch

    with opened(path) as file:
        part = file.get_slice(name)
        if any(not 0 <= row < part.get_shape()[0] for row in rows):
            corrupt(path, f"{name} has {part.get_shape()[0]} rows")
        return torch.cat([part[row : row + 1] for row in rows])


def check_readable(path: Path) -> None:
    """Raise InputError for whatever the safetensors library finds wrong in a file: overlaps, gaps, sizes, types."""
    with opened(path):
        pass


def save_safetensors(tensors: "Mapping[str, Tensor]", path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write all tensors to `path` at once or not at all. Raises RunError when the disk refuses."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
    with replacing(path, needed) as temporary:
        try:
            save_file(plain, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from None


def corrupt(path: Path, reason: str) -> NoReturn:
    raise InputError(f"{path}: {reason}", fix="download the file again")


def _entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    """(shape, dtype, offsets) of one tensor. Overlaps, gaps and sizes are the library's to check."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        corrupt(path, f"it holds a tensor with an impossible name: {name[:40]!r}")
    shape = _naturals(entry.get("shape") if isinstance(entry, dict) else None)
    offsets = _naturals(entry.get("data_offsets") if isinstance(entry, dict) else None)
    # The sides are counted first: the product of half a million of them takes minutes.
    if shape is None or len(shape) > MAX_SIDES or math.prod(shape) >= 2**63 or offsets is None or len(offsets) != 2:
        corrupt(path, f"tensor {name!r} has no possible shape or place")
    return tuple(shape), str(entry.get("dtype")), (offsets[0], offsets[1])


def _naturals(value: Any) -> list[int] | None:
    """`value` if it is a list of integers in [0, 2^63)."""
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value):
        return value
    return None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """safe_open with its errors turned into ours; the other kinds are torch's, for odd dtypes and shapes."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        corrupt(path, f"not a readable safetensors file: {str(error).splitlines()[0]}")
