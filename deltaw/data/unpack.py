"""Compressed files, unpacked as they are read: .gz .bz2 .xz by Python's own libraries, .zst by Python's from 3.14 on,
and by pyarrow before. What is in one is told by the name that is left: `train.jsonl.gz`.

A few kilobytes can unpack to terabytes. So what comes out is counted: beyond `PLENTY` bytes no more than `RATIO` times
the packed size is read. Text is packed to a fifth or a tenth, the same line over and over to a hundredth at most of
what people have; a bomb to a thousandth.
"""

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from deltaw.data.arrow import zstd_stream
from deltaw.errors import InputError, first_line
from deltaw.files.output import gib

PACKED = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")  # of several files
PLENTY, RATIO = 256 * 2**20, 200


def unpacked(file: BinaryIO, path: Path) -> BinaryIO:
    """What is packed in `file`, of which `path` is the name. Raises InputError, also while it is read."""
    size = path.stat().st_size
    if not size:
        raise InputError(f"{path}: damaged: the file is empty", fix="make or download it again")
    most = max(PLENTY, RATIO * size)
    return io.BufferedReader(_Bounded(_opened(file, path), path, most), 2**16)


def _opened(file: BinaryIO, path: Path) -> Any:
    match path.suffix.lower():
        case ".gz":
            return gzip.GzipFile(fileobj=file)
        case ".bz2":
            return bz2.BZ2File(file)
        case ".xz":
            return lzma.LZMAFile(file)
    try:
        return importlib.import_module("compression.zstd").ZstdFile(file)
    except ImportError:
        return zstd_stream(file, path.name)


class _Bounded(io.RawIOBase):
    """Reads from a decompressing stream no more than `most` bytes; damage is an InputError that names the file."""

    def __init__(self, stream: Any, path: Path, most: int) -> None:
        self._stream, self._path, self._most, self._count = stream, path, most, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise InputError(
                f"{self._path}: damaged: what is packed in it can't be read beyond {self._count:,} bytes "
                f"({first_line(error)})",
                fix="make or download the file again",
            ) from None
        self._count += len(data)
        if self._count > self._most:
            raise InputError(
                f"{self._path}: unpacks to more than {gib(self._most)}, {RATIO} times its size, which data doesn't",
                fix="unpack it yourself if it is what you expect, and name the result",
            )
        buffer[: len(data)] = data
        return len(data)
