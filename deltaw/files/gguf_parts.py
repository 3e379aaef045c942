"""A GGUF in parts: `m-00001-of-00003.gguf` and its siblings, any of which may be named, are one model.

The first part holds the metadata, each part some of the tensors. Every part says `split.no`, `split.count` and
`split.tensors.count`; a set is taken only if all of that agrees with the names, no tensor appears twice, and no later
part says anything that the first doesn't. Readers of single files then get one: the first part's metadata byte for
byte, all tensors' entries, and all their data, copied in pieces, so that no part is held in memory.

Rejected: handing tensors to transformers one by one (its reader takes a path), and joining with gguf-py's writer (it
reads each value and writes it again, where the bytes are there).
"""

import re
import struct
from pathlib import Path
from typing import Any

from deltaw.errors import InputError, listed
from deltaw.files.gguf_header import ALIGNMENT, Header, read_part
from deltaw.files.gguf_sizes import check_sizes

NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 1_000
PIECE = 16 * 2**20


def parts_of(path: Path) -> list[Path]:
    """The file, or all the parts of the set that its name says it belongs to. Raises InputError naming missing ones."""
    match = NAME.fullmatch(path.name)
    count = int(match["count"]) if match else 1
    if match is None or count == 1:
        return [path]
    if not 1 <= int(match["part"]) <= count <= MAX_PARTS:
        raise InputError(f"{path}: from its name it is part {int(match['part'])} of {count}, which is impossible")
    parts = [path.with_name(f"{match['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise InputError(
            f"{path}: is one of {count} parts, and not all the others are beside it:\n{listed(missing, 2)}",
            fix="put all the parts into one folder, and name any of them",
        )
    return parts


def read_model(parts: list[Path]) -> Header:
    """The header of a model in one file or in parts, every count and offset checked. Raises InputError."""
    headers = [read_part(part) for part in parts]
    first = headers[0]
    _check_numbers(parts, headers)
    shapes: dict[str, Any] = {}
    for part, header in zip(parts, headers, strict=True):
        if twice := sorted(shapes.keys() & header.shapes.keys()):
            raise _unfit(part, f"tensor {twice[0]!r} is also in an earlier part")
        repeated = {
            key: value for key, value in header.metadata.items() if key != ALIGNMENT and not key.startswith("split.")
        }
        if odd := [key for key, value in repeated.items() if key not in first.metadata or first.metadata[key] != value]:
            raise _unfit(part, f"it says {odd[0]}, which the first part doesn't")
        shapes |= header.shapes
    _check_total(parts, headers, len(shapes))
    places = {name: place for header in headers for name, place in header.places.items()}
    whole = first._replace(shapes=shapes, places=places)
    check_sizes(parts[0], whole)
    return whole


def _check_numbers(parts: list[Path], headers: list[Header]) -> None:
    """Each part says its number and how many there are, as the names do."""
    for number, (part, header) in enumerate(zip(parts, headers, strict=True)):
        index, count = (header.metadata.get(f"split.{key}", default) for key, default in (("no", 0), ("count", 1)))
        if len(parts) == 1 and count not in (0, 1):
            raise InputError(
                f"{part}: is one of {str(count)[:20]} parts, but isn't called …-00001-of-0000N.gguf as they are",
                fix="give the parts back the names that they came with",
            )
        if len(parts) > 1 and [index, count] != [number, len(parts)]:
            raise _unfit(part, f"it says that it is number {str(index)[:20]} (from 0) of {str(count)[:20]}")


def _check_total(parts: list[Path], headers: list[Header], total: int) -> None:
    """Each part that says how many tensors there are in all says the same, and so many there are."""
    totals = {str(header.metadata.get("split.tensors.count", total)) for header in headers}
    if len(parts) > 1 and totals != {str(total)}:
        numbers = " and ".join(sorted(totals))[:60]
        raise _unfit(parts[0], f"they say that there are {numbers} tensors in all, but hold {total}")


def _unfit(part: Path, reason: str) -> InputError:
    return InputError(
        f"{part}: doesn't fit the other parts: {reason}", fix="download all the parts again, from one place"
    )


def join(parts: list[Path], header: Header, path: Path) -> None:
    """Write the model in `parts`, whose header `read_model` gave, into one file."""
    alignment = header.metadata.get(ALIGNMENT, 32)
    entries, at = bytearray(), 0
    for name, shape in header.shapes.items():
        place, encoded = header.places[name], name.encode()
        entries += struct.pack("<Q", len(encoded)) + encoded + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        entries += struct.pack("<IQ", place.kind, at)
        at += _padded(place.size, alignment)
    with parts[0].open("rb") as first, path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(header.shapes), len(header.metadata)))
        first.seek(file.tell())
        file.write(first.read(header.entries - file.tell()))
        file.write(entries)
        file.write(bytes(_padded(file.tell(), alignment) - file.tell()))
        for place in header.places.values():
            with place.file.open("rb") as source:
                source.seek(place.start)
                left = place.size
                while left:
                    piece = source.read(min(left, PIECE))
                    if not piece:
                        raise InputError(f"{place.file}: became shorter while it was read")
                    left -= file.write(piece)
            file.write(bytes(_padded(place.size, alignment) - place.size))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
