"""A GGUF of a whole model, written tensor by tensor, and the tokenizer of one that there is, copied.

A value of the metadata is kept with GGUF's type of it, so that what is copied from a file stays what it was, byte for
byte: names that aren't UTF-8, integers of every width. What is written anew has one type for each of Python's.

    bool · int, unsigned 32 · float, 32 · text         lists: of texts, of int (32), of float (32)
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deltaw.export.gguf_types import Place, number

if TYPE_CHECKING:
    import numpy as np

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
TOKENIZER = "tokenizer."
KEPT = ("general.license", "general.license.name", "general.license.link", "general.languages")


class Typed(NamedTuple):
    """A value of the metadata with GGUF's type; `of`: that of an array's items."""

    value: Any
    kind: int
    of: int | None = None


def typed(value: Any) -> Typed:
    """A value of Python's with the type that GGUF writers give it."""
    if isinstance(value, list):
        kinds: dict[type, int] = {str: STRING, int: INT32, float: FLOAT32}
        return Typed(value, ARRAY, kinds[type(value[0])])
    kinds = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING}
    return Typed(value, kinds[type(value)])


def read_block(file: Path, *, prefix: str = TOKENIZER, names: Sequence[str] = ()) -> dict[str, Typed]:
    """All keys of a GGUF that begin with `prefix`, and those of `names`, as they stand there. The file's header must
    have been checked (base/gguf_header.py): gguf-py believes every count."""
    from gguf import GGUFReader

    block = {}
    for key, field in GGUFReader(file).fields.items():
        if not (key.startswith(prefix) or key in names):
            continue
        kind = int(field.types[0])
        if kind == ARRAY:
            items = [_item(field.parts[at], int(field.types[-1])) for at in field.data]
            if items:  # an empty list says nothing
                block[key] = Typed(items, ARRAY, int(field.types[-1]))
        else:
            block[key] = Typed(_item(field.parts[field.data[0]], kind), kind)
    return block


def _item(part: Any, kind: int) -> Any:
    return part.tobytes() if kind == STRING else part[0].item()


def text(value: Typed) -> str:
    """A text of the metadata."""
    return value.value.decode("utf-8", errors="replace") if isinstance(value.value, bytes) else str(value.value)


def write_file(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Typed],
    places: Sequence[Place],
    values: Iterable["np.ndarray"],
) -> None:
    """Write the file; `values` are made when their turn comes, in the order of `places`."""
    from gguf import GGUFWriter
    from gguf.constants import GGUFValueType

    writer = GGUFWriter(path, architecture)
    for key, (value, kind, of) in metadata.items():
        writer.add_key_value(key, value, GGUFValueType(kind), None if of is None else GGUFValueType(of))
    for place in places:
        import numpy as np

        writer.add_tensor_info(place.name, place.shape, np.dtype(np.float32), place.size, raw_dtype=number(place.type))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for value in values:
            writer.write_tensor_data(value)
    finally:
        writer.close()
