"""Prepared rows on disk: rendered and tokenised once, mapped into memory ever after.

    $DELTAW_CACHE/rows/KEY.safetensors   the arrays of `Columns`, `train` and `eval` (row numbers), and `record`: the
                                         report and all else that a `Dataset` says, as JSON
                       KEY.json          written last: a CRC-32 of every 16 MiB of the file; and what is in it, for
                                         `deltaw cache`
                       KEY.lock          held by the one process that prepares these rows while others wait
                       known/            SHA-256 of files that were looked at (files/content.py)

The key is a hash over all that decides the rows: the bytes and names of the files read, the tokenizer's files, the chat
template, the `data` section as it stands, the versions of the libraries that read and tokenise, and the source of the
code that prepares (this room, files/, config/, show/). Whatever it may be that changes, an entry that doesn't fit isn't
found. The files are looked at again before an entry is written: one that changed meanwhile has no entry.

An entry is read through and its checksums compared before it is used (0.3 s for 600 MB that are in the page cache):
cut short or with a flipped bit it is prepared again, and a line says so. What takes less than `WORTH` seconds to
prepare isn't written. At most `LIMIT` bytes are kept: the entries that were used longest ago go first, but none that a
living process has open, which holds a shared flock on it. Where nothing can be written a line says so, and the rows are
prepared as if there were no cache. The rows are a user's data: the folder is his alone (0700, files 0600).

Rejected: Arrow (a second format beside safetensors for eight flat arrays); one file (its checksum would have to be
inside of what it covers); a pickle.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import mmap
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.base.source import cache_root
from deltaw.config import DataConfig
from deltaw.config.sources import rows_given, sources_of
from deltaw.data.asking import Asking
from deltaw.data.dataset import Dataset
from deltaw.data.examples import Columns, Examples, Kind
from deltaw.data.forms import Reads
from deltaw.data.prepare import prepare, prepare_held_out
from deltaw.data.read import files_of
from deltaw.data.render import Renderer
from deltaw.data.report import DataReport, Share
from deltaw.errors import InputError, RunError
from deltaw.files.atomic import is_temporary, replacing, write_text_atomic
from deltaw.files.content import Stamp, content_hash, stamp
from deltaw.files.lock import locked
from deltaw.files.output import gib
from deltaw.files.safetensors import read_header
from deltaw.files.stream import Entry, stream_size, streamed
from deltaw.show.progress import QUIET, Display
from deltaw.show.text import counted
from deltaw.version import VERSION

FORMAT = 1
WORTH = 2.0  # seconds of preparing
LIMIT = 20 * 2**30  # bytes of all entries
SPARE = 2**30  # bytes that stay free on the disk
BLOCK = 2**24  # bytes of a checksum
STALE = 3600.0  # seconds after which nobody is still writing a temporary file
LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "jinja2", "pyarrow", "datasets", "numpy")
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
CODE = ("data", "files", "config", "show")
DTYPES = {"int8": "I8", "uint8": "U8", "int16": "I16", "int32": "I32", "uint32": "U32", "int64": "I64", "bool": "BOOL"}


def prepared(config: DataConfig, renderer: Renderer, *, reads: Reads = "auto", display: Display = QUIET) -> Dataset:
    """`prepare`, out of the cache where it was done before. Raises InputError as that does."""
    key = None if renderer.shape == "prompts" else Key.of(config, renderer, reads)  # a reward wants the rows themselves
    if key is None:
        return prepare(config, renderer, reads=reads, display=display)
    if dataset := load(key, display.say):
        return dataset
    waited: list[str] = []

    def waiting(owner: str) -> None:
        waited.append(owner)
        display.say(f"another process ({owner}) is preparing these rows: waiting for it")

    with contextlib.ExitStack() as stack:
        try:
            _make_folder()
            lock = locked(key.lock, "the cache", wait=True, remove=lambda: True, waiting=waiting)
            stack.enter_context(lock)
        except (OSError, InputError) as error:
            display.say(f"prepared rows aren't kept: {getattr(error, 'what', error)}")
            return prepare(config, renderer, reads=reads, display=display)
        if waited and (dataset := load(key, display.say)):
            return dataset
        if waited:  # whoever had the lock found it not worth keeping: all that waited can go on at once
            stack.close()
        begun = time.monotonic()
        dataset = prepare(config, renderer, reads=reads, display=display)
        if waited or time.monotonic() - begun < WORTH or not key.is_still_true():
            return dataset
        return (store(key, dataset, display.say) and load(key, display.say)) or dataset


def prepared_held_out(config: DataConfig, renderer: Renderer, *, display: Display = QUIET) -> Examples:
    """`prepare_held_out`, out of the cache where all rows were prepared before."""
    key = None if renderer.shape == "prompts" else Key.of(config, renderer, "auto")
    dataset = load(key, display.say) if key else None
    return dataset.eval if dataset else prepare_held_out(config, renderer)


def rows_folder() -> Path:
    """Where they lie."""
    return cache_root() / "rows"


def _make_folder() -> None:
    rows_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    rows_folder().chmod(0o700)


@dataclass(frozen=True)
class Key:
    """What rows come of: a hash over all of it, and the files as they were seen."""

    digest: str
    stamps: Mapping[Path, Stamp]
    what: str

    @staticmethod
    def of(config: DataConfig, renderer: Renderer, reads: Reads) -> "Key | None":
        """None where it can't be told: rows from Python, built-in ones, files that aren't there."""
        values = [config.train, *([] if config.eval_sources is None else [config.eval_sources])]
        folder = Path(renderer.tokenizer.name_or_path)
        if any(rows_given(value) for value in values) or not folder.is_dir():
            return None
        files: list[tuple[str, Path]] = []
        for source in (source for value in values for source in sources_of(value)):
            read = files_of(source.path)
            if not read:
                return None
            files += [(str(path), path) for path in read]
        files += [(f"tokenizer/{path.relative_to(folder)}", path) for path in _of_tokenizer(folder)]
        with contextlib.suppress(OSError):
            _make_folder()  # before what is remembered of files is written into it
        try:
            stamps = {path: stamp(path) for _, path in files}
            contents = [(name, content_hash(path, rows_folder() / "known")) for name, path in files]
        except (OSError, InputError):
            return None
        decides = [FORMAT, config.model_dump(mode="json"), reads, renderer.rules, contents, _versions(), _code()]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
        return Key(digest, stamps, " + ".join(source.path for source in sources_of(config.train)))

    def is_still_true(self) -> bool:
        """Whether the files are those that the hash is of."""
        try:
            return all(stamp(path) == seen for path, seen in self.stamps.items())
        except OSError:
            return False

    @property
    def file(self) -> Path:
        return rows_folder() / f"{self.digest}.safetensors"

    @property
    def lock(self) -> Path:
        return rows_folder() / f"{self.digest}.lock"


def _of_tokenizer(folder: Path) -> list[Path]:
    files = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return sorted(path for path in files if path.is_file() and path.suffix not in WEIGHTS)


def _versions() -> list[str]:
    versions = [VERSION, sys.version]
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{library} {importlib.metadata.version(library)}")
    return versions


def _code() -> str:
    """A hash of the source that prepares."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for room in CODE for path in (root / room).rglob("*.*") if path.suffix != ".pyc"):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def store(key: Key, dataset: Dataset, say: Callable[[str], object]) -> bool:
    """Write an entry; a line where that isn't possible. The caller holds the key's lock."""
    arrays = _arrays(dataset)
    entries = {name: Entry(DTYPES[array.dtype.name], array.shape, array.nbytes) for name, array in arrays.items()}
    size = stream_size(entries, {"format": "pt"})
    try:
        make_room(size)
        free = shutil.disk_usage(rows_folder()).free
        if size > LIMIT or size + SPARE > free:
            room = f"the cache holds {gib(LIMIT)}" if size > LIMIT else f"the disk of {rows_folder()} has {gib(free)}"
            say(f"prepared rows aren't kept: they take {gib(size)}, and {room}")
            return False
        with replacing(key.file, size, private=True) as temporary:
            temporary.unlink()
            with streamed(temporary, entries, {"format": "pt"}) as stream:
                for name, array in arrays.items():
                    stream.write(array.reshape(-1).view(np.uint8).data, stream.starts[name])
            sums = _checksums(temporary)
        about = {"what": key.what, "rows": len(dataset.rows), "tokens": int(dataset.rows.lengths.sum())}
        sidecar = key.file.with_suffix(".json")
        write_text_atomic(sidecar, json.dumps({**about, "bytes": size, "crc32": sums}))
        sidecar.chmod(0o600)
    except (OSError, RunError) as error:
        say(f"prepared rows aren't kept: {getattr(error, 'what', error)}")
        return False
    return True


def load(key: Key, say: Callable[[str], object]) -> Dataset | None:
    """The entry, mapped; None where there is none. A broken one is no entry, and a line says so."""
    sidecar = key.file.with_suffix(".json")
    try:
        file = key.file.open("rb")
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return None
    try:
        if _checksums(key.file) != json.loads(sidecar.read_bytes())["crc32"]:
            raise ValueError("its checksums don't fit")
        dataset = _mapped(key.file, file)
        with contextlib.suppress(OSError):
            os.utime(sidecar)
    except (OSError, ValueError, LookupError, TypeError, InputError) as error:
        file.close()
        if key.file.exists() and sidecar.exists():
            say(f"the prepared rows in {key.file} are damaged ({error}): they are prepared again")
        return None
    say(f"{counted(len(dataset.rows.distinct), 'row')} prepared before (deltaw cache lists such)")
    return dataset


def _checksums(path: Path) -> list[int]:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            return [zlib.crc32(view[at : at + BLOCK]) for at in range(0, len(view), BLOCK)]


def _arrays(dataset: Dataset) -> dict[str, np.ndarray]:
    columns = dataset.train.columns
    record = {
        "names": columns.names,
        "kinds": columns.kinds,
        "report": asdict(dataset.report),
        "asking": asdict(dataset.asking),
        "example": dataset.example,
        "fingerprint": dataset.fingerprint,
    }
    rows = {"train": dataset.train.rows, "eval": dataset.eval.rows}
    return {**columns.arrays, **rows, "record": np.frombuffer(json.dumps(record).encode(), np.uint8)}


def _mapped(path: Path, file: Any) -> Dataset:
    header = read_header(path)
    data = np.memmap(file, np.uint8, "r")
    kinds = {word: np.dtype(name) for name, word in DTYPES.items()}

    def array(name: str) -> np.ndarray:
        begin, end = header.spans[name]
        return np.asarray(data[begin:end]).view(kinds[header.dtypes[name]])

    record = json.loads(array("record").tobytes())
    tables: dict[str, Any] = {
        "names": tuple(record["names"]),
        "kinds": tuple(Kind.of_json(one) for one in record["kinds"]),
    }
    arrays: dict[str, Any] = {name: array(name) for name in Columns.stored()}
    columns = Columns(**arrays, **tables, keeps=file)
    report = record["report"]
    return Dataset(
        Examples(columns, array("train")),
        Examples(columns, array("eval")),
        DataReport(**{**report, "sources": [Share(**share) for share in report["sources"]]}),
        Asking(**record["asking"]),
        record["example"],
        record["fingerprint"],
    )


@dataclass(frozen=True)
class Kept:
    """An entry, for whoever lists or removes it."""

    file: Path
    size: int
    used: float  # seconds since 1970
    what: str
    rows: int
    tokens: int


def kept_rows() -> list[Kept]:
    """All entries, the one used last first."""
    entries = []
    for file in rows_folder().glob("*.safetensors"):
        sidecar, known = file.with_suffix(".json"), ("damaged", 0, 0)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            about = json.loads(sidecar.read_bytes())
            known = str(about["what"]), int(about["rows"]), int(about["tokens"])
        with contextlib.suppress(OSError):
            used = (sidecar if sidecar.exists() else file).stat().st_mtime
            entries.append(Kept(file, file.stat().st_size, used, *known))
    return sorted(entries, key=lambda entry: -entry.used)


def remove(entry: Kept) -> bool:
    """Remove an entry that no living process has open; whether it is gone."""
    try:
        with entry.file.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entry.file.with_suffix(".json").unlink(missing_ok=True)
            entry.file.unlink()
    except OSError:
        return False
    return True


def make_room(needed: int) -> None:
    """Remove the entries used longest ago as far as `needed` bytes more would be beyond the limit, and what killed
    processes left."""
    entries = kept_rows()
    total, free = sum(entry.size for entry in entries), shutil.disk_usage(rows_folder()).free
    for entry in reversed(entries):
        if total + needed <= LIMIT and free - needed >= SPARE:
            break
        if remove(entry):
            total, free = total - entry.size, free + entry.size
    for path in _leftovers():
        with contextlib.suppress(OSError):
            path.unlink()


def _leftovers() -> Iterator[Path]:
    for path in rows_folder().glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if is_temporary(path) and path.stat().st_mtime < time.time() - STALE:
                yield path
