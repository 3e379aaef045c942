"""A GGUF of a whole model, written tensor by tensor.

A value of the metadata comes with GGUF's type of it (files/gguf_header.py), so that what is copied from a file stays
what it was, byte for byte: tokens that aren't UTF-8, integers of every width. What is rewritten has one type for
each of Python's:

    bool · int, unsigned 32 · float, 32 · text         lists: of texts, of int (32), of float (32)
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.files.gguf_header import ARRAY, STRING, Typed
from deltaw.shipping.gguf.types import Place, number

if TYPE_CHECKING:
    import numpy as np

UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7


def typed(value: Any) -> Typed:
    """A value of Python's with the type that GGUF writers give it."""
    if isinstance(value, list):
        kinds: dict[type, int] = {str: STRING, int: INT32, float: FLOAT32}
        return Typed(value, ARRAY, kinds[type(value[0])])
    kinds = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING}
    return Typed(value, kinds[type(value)])


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
    import numpy as np
    from gguf import GGUFWriter
    from gguf.constants import GGUFValueType

    writer = GGUFWriter(path, architecture)
    for key, (value, kind, of) in metadata.items():
        writer.add_key_value(key, value, GGUFValueType(kind), None if of is None else GGUFValueType(of))
    for place in places:
        writer.add_tensor_info(place.name, place.shape, np.dtype(np.float32), place.size, raw_dtype=number(place.type))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for value in values:
            writer.write_tensor_data(value)
    finally:
        writer.close()
