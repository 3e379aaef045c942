"""The header of a `.gguf` file: metadata and tensors' shapes, read with a bounds check before every read.

It believes no count: what a count promises must fit into the bytes that are left. So a hostile file costs
milliseconds and no memory, and every lie is an InputError that names the file.

Rejected: gguf-py's reader. On untrusted bytes it trusts counts (a few bytes make it allocate gigabytes), so it would
have to run in the bounded process; and it makes an object of every token: 8 s for SmolLM2's file, of which this walk
takes 0.1 s.
"""

import contextlib
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from deltaw.errors import InputError

ALIGNMENT = "general.alignment"
MAX_ENTRIES = 65_536  # metadata keys, and tensors: the largest published models have some 2,000
MAX_NAME = 65_535
MAX_STRINGS = 4_000_000  # in all arrays; the largest vocabularies with merges have 0.8 million
MAX_KEPT = 4_096  # a longer array is checked and skipped

STRING, ARRAY = 8, 9
FLOAT32 = 0  # ggml's number of the type
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


class Place(NamedTuple):
    """Where a tensor's bytes lie, and ggml's number of their type."""

    start: int
    size: int
    kind: int
    file: Path


class Header(NamedTuple):
    """Metadata (long arrays are None), tensor shapes, in GGUF's order (fastest side first), and their places.
    `entries`: where the metadata ends in its file and the tensors' entries begin."""

    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, Place]
    entries: int


class Typed(NamedTuple):
    """A value of the metadata as it stands there: ggml's number of its type, and for an array (`of`) of its items'.
    Texts are bytes, since tokens needn't be UTF-8."""

    value: Any
    kind: int
    of: int | None = None


class _Cursor:
    """Reads forward through bytes, and never past their end. Raises InputError."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)
        self.strings = 0

    def fail(self, reason: str) -> InputError:
        return unusable(self.path, reason)

    def take(self, size: int) -> int:
        """Move over `size` bytes; returns where they start."""
        if size > self.end - self.at:
            raise self.fail(f"it ends at byte {self.end:,}, inside its header")
        self.at += size
        return self.at - size

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def raw(self) -> bytes:
        """The bytes of a text."""
        length = self.number("<Q")
        if length > self.end - self.at:
            raise self.fail(f"a text of {length:,} bytes at byte {self.at:,}")
        start = self.take(length)
        return bytes(self.data[start : start + length])

    def text(self) -> str:
        # Tokens of byte-level vocabularies needn't be UTF-8; names are checked by their use.
        return self.raw().decode("utf-8", errors="replace")

    def name(self) -> str:
        name = self.text()
        if not 0 < len(name) <= MAX_NAME or not name.isprintable() or "\ufffd" in name:
            raise self.fail(f"an impossible name: {name[:40]!r}")
        return name

    def value(self) -> Any:
        kind = self.number("<I")
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise self.fail(f"metadata of unknown type {kind}")
        return self.number(SCALARS[kind])

    def typed(self) -> Typed:
        """The same with its type, and whole: only for a file that was walked through before."""
        kind = self.number("<I")
        if kind == STRING:
            return Typed(self.raw(), kind)
        if kind != ARRAY:
            return Typed(self.number(SCALARS[kind]), kind)
        of, count = self.number("<I"), self.number("<Q")
        if of == STRING:
            return Typed([self.raw() for _ in range(count)], kind, of)
        start = self.take(struct.calcsize(SCALARS[of]) * count)
        return Typed(list(struct.unpack_from(f"<{count}{SCALARS[of][1]}", self.data, start)), kind, of)

    def array(self) -> tuple[Any, ...] | None:
        """The values of a short array of numbers; None for any other, which is walked over."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind == STRING:
            self.strings += count
            if count > (self.end - self.at) // 8 or self.strings > MAX_STRINGS:
                raise self.fail(f"an array of {count:,} texts")
            for _ in range(count):
                self.take(self.number("<Q"))
            return None
        if kind not in SCALARS:
            raise self.fail(f"an array of unknown type {kind}")
        size = struct.calcsize(SCALARS[kind])
        if count > (self.end - self.at) // size:
            raise self.fail(f"an array of {count:,} numbers")
        start = self.take(size * count)
        if count > MAX_KEPT:
            return None
        return struct.unpack_from(f"<{count}{SCALARS[kind][1]}", self.data, start)


def unusable(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: not a usable GGUF file: {reason}", fix="download the file again")


def architecture(header: Header) -> str:
    return str(header.metadata["general.architecture"])


def type_name(kind: int) -> str:
    """ggml's name of a type that a checked header has."""
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType(kind).name


def read_part(path: Path) -> Header:
    """Metadata and tensor shapes of one file, every count, offset and size checked. Raises InputError.

    Whether it holds a model, or a part of one, is for gguf_parts.py to see."""
    with _opened(path) as cursor:
        return _walk(cursor)


def read_metadata(path: Path, wanted: Callable[[str], bool]) -> dict[str, Typed]:
    """The keys that are `wanted`, whole, of one file or part. Raises InputError as `read_part` does."""
    with _opened(path) as cursor:
        keys = len(_walk(cursor).metadata)  # every count is checked
        cursor.at, values = 24, dict[str, Typed]()
        for _ in range(keys):
            name, value = cursor.name(), cursor.typed()
            if wanted(name):
                values[name] = value
    return values


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Cursor]:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise InputError(f"{path}: too short for a GGUF file", fix="download the file again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield _Cursor(path, data)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def read_floats(path: Path, header: Header, name: str) -> tuple[float, ...]:
    """The values of a short float32 tensor of a file whose header was read. Raises InputError for any other."""
    place = header.places[name]
    if place.kind != FLOAT32 or place.size > 4 * MAX_KEPT:
        raise InputError(
            f"{path}: tensor {name!r} isn't a short list of float32 numbers", fix="download the file again"
        )
    try:
        with place.file.open("rb") as file:
            file.seek(place.start)
            return struct.unpack(f"<{place.size // 4}f", file.read(place.size))
    except (OSError, struct.error) as error:
        raise InputError(f"{path}: {error}") from None


def _walk(cursor: _Cursor) -> Header:
    if cursor.data[:4] != b"GGUF":
        raise cursor.fail(f"it begins with {bytes(cursor.data[:4])!r}")
    cursor.take(4)
    version, tensors, keys = cursor.number("<I"), cursor.number("<Q"), cursor.number("<Q")
    if version not in (2, 3):
        raise cursor.fail(f"version {version}; 2 and 3 (little-endian) are known")
    if tensors > MAX_ENTRIES or keys > MAX_ENTRIES:
        raise cursor.fail(f"it promises {tensors:,} tensors and {keys:,} metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.name()
        if name in metadata:
            raise cursor.fail(f"metadata {name!r} appears twice")
        metadata[name] = cursor.value()
    entries, places = cursor.at, dict[str, Place]()
    shapes: dict[str, tuple[int, ...]] = {}
    for _ in range(tensors):
        name = cursor.name()
        if name in shapes:
            raise cursor.fail(f"tensor {name!r} appears twice")
        shapes[name], places[name] = _tensor(cursor, name)
    start = _check_data(cursor, metadata.get(ALIGNMENT, 32), places)
    return Header(metadata, shapes, {name: at._replace(start=start + at.start) for name, at in places.items()}, entries)


def _tensor(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], Place]:
    """(shape, place behind the header) of the next tensor."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    sides = cursor.number("<I")
    if not 1 <= sides <= 4:
        raise cursor.fail(f"tensor {name!r} has {sides} sides")
    shape = tuple(cursor.number("<Q") for _ in range(sides))
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise cursor.fail(f"tensor {name!r} is of unknown type {kind}") from None
    count = 1
    for side in shape:
        count *= side
    if count == 0 or count >= 2**63 or shape[0] % block:
        raise cursor.fail(f"tensor {name!r} has the impossible shape {shape}")
    return shape, Place(offset, count // block * size, kind, cursor.path)


def _check_data(cursor: _Cursor, alignment: Any, places: dict[str, Place]) -> int:
    """Where the tensors' data starts. Every tensor lies aligned inside the file, and no two overlap."""
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise cursor.fail(f"alignment {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    taken = 0
    for name, (offset, size, *_) in sorted(places.items(), key=lambda item: item[1]):
        if offset % alignment or offset < taken:
            raise cursor.fail(f"tensor {name!r} is misaligned or overlaps another")
        taken = offset + size
        if start + taken > cursor.end:
            raise cursor.fail(f"tensor {name!r} ends {start + taken - cursor.end:,} bytes past the end of the file")
    return start
