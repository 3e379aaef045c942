"""A safetensors file that is written piece by piece, so that no tensor of it has to be in memory.

    8 bytes    length of the header, little-endian
    header     JSON: {"__metadata__": {…}, name: {"dtype", "shape", "data_offsets": [start, end]}, …}, spaces at its end
    data       the tensors without gaps, offsets counted from here

What a type's word means is the business of whoever writes the bytes: a copied tensor keeps the word that its source
had, so that files hold whatever types they hold (safetensors.py rejected a writer for whole tensors for that reason;
this one knows no table). Larger items stand first, the order is otherwise the given one: a tensor then begins at a
multiple of its item, which readers that map the file ask for.

Pieces are written at their place in the file (`pwrite`), by several threads if need be.
"""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ALIGNED = 8  # the data begins at a multiple of it


class Entry(NamedTuple):
    """A tensor to write: its type in the format's words, and its bytes in all."""

    dtype: str
    shape: tuple[int, ...]
    size: int


class Stream(NamedTuple):
    """An open file and the place of each tensor's first byte in it."""

    descriptor: int
    starts: dict[str, int]

    def write(self, data: memoryview, at: int) -> None:
        """All of it. OSError for what the disk refuses."""
        while data:
            written = os.pwrite(self.descriptor, data, at)
            data, at = data[written:], at + written


@contextlib.contextmanager
def streamed(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Iterator[Stream]:
    """A new file of these tensors, of its full length, the header written."""
    header, starts, size = _layout(entries, metadata)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _allocate(descriptor, size)
        stream = Stream(descriptor, starts)
        stream.write(memoryview(header), 0)
        yield stream
    finally:
        os.close(descriptor)


def stream_size(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> int:
    """The bytes that such a file has."""
    return _layout(entries, metadata)[2]


def _allocate(descriptor: int, size: int) -> None:
    """The file's length, and its place on the disk where that can be had at once: a disk that is too full is found out
    before the first number is computed, and writing is faster."""
    os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _layout(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """(length and header, each tensor's first byte, the file's size)."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name in sorted(entries, key=lambda name: -_item(entries[name])):
        start, end = end, end + entries[name].size
        offsets[name] = start
        described[name] = {"dtype": entries[name].dtype, "shape": entries[name].shape, "data_offsets": (start, end)}
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: begin + at for name, at in offsets.items()}, begin + end


def _item(entry: Entry) -> int:
    """Bytes of one number; 0 where a tensor has none, or where several share a byte."""
    count = math.prod(entry.shape)
    return entry.size // count if count else 0
