"""GGUF in: a `.gguf` file -> an ordinary model folder in the cache, once.

Two steps, kept apart. `read_header` walks the file's header with a bounds check before every read and
believes no count: what a count promises must fit into the bytes that are left. So a hostile file costs
milliseconds and no memory. Only a file that passes is given to transformers, which dequantises it (about 20 s
for 135M parameters, nearly all of it parsing metadata) and whose result is written to the cache as
safetensors + config + tokenizer.

The cache holds bfloat16, not float32: it is half as large, it is the dtype that training uses, and a 4-bit weight
loses nothing that matters. Rounding moves a weight by at most 2^-8 of itself (measured on SmolLM2's Q4_1: 0.389 % at
worst, 0.14 % of a tensor's norm), while Q4_1 itself has 16 levels for each block of 32 weights.

The cache's key is the file's SHA-256, so that a copied or renamed file is found again; the hash is remembered
by (path, size, mtime), so that a second opening reads nothing. A conversion runs under a file lock, in a
hidden folder beside the final one, is fsynced and renamed: a folder that can be seen is complete, and whoever
waited uses it.

Rejected: gguf-py's reader on untrusted bytes (it trusts counts: a few bytes make it allocate gigabytes),
dequantising on every start (20 s), and training on the quantised weights (the base would be approximated
twice).
"""

import contextlib
import copy
import fcntl
import hashlib
import io
import math
import mmap
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from deltaw.base.weights import fsync, write_text_atomic
from deltaw.errors import InputError, RunError

FORMAT = "v1"  # of the converted folder; a change makes every file convert anew
ALIGNMENT = "general.alignment"
MAX_ENTRIES = 65_536  # metadata keys, and tensors: the largest published models have some 2,000
MAX_NAME = 65_535
MAX_STRINGS = 4_000_000  # in all arrays; the largest vocabularies with merges have 0.8 million
MAX_KEPT = 4_096  # a longer array is checked and skipped

STRING, ARRAY = 8, 9
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
# Sizes in the metadata that would become allocations; none can be larger than the largest tensor's side.
SIZES = (
    "embedding_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_count",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.relative_buckets_count",
    "rope.dimension_count",
    "shortconv.l_cache",
    "ssm.conv_kernel",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.time_step_rank",
)
# Sizes whose product is that of weights in the file (or less), so that many large ones can't stand together.
PRODUCTS = (
    ("embedding_length", "vocab_size"),
    ("block_count", "embedding_length", "feed_forward_length"),
    ("block_count", "embedding_length", "attention.head_count", "attention.key_length"),
    ("block_count", "embedding_length", "attention.head_count", "rope.dimension_count"),
    ("block_count", "embedding_length", "ssm.inner_size"),
)


class Header(NamedTuple):
    """Metadata (long arrays left out) and tensor shapes, in GGUF's order (fastest side first)."""

    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


class _Cursor:
    """Reads forward through bytes, and never past their end. Raises InputError."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)
        self.strings = 0

    def fail(self, reason: str) -> InputError:
        return InputError(f"{self.path}: not a usable GGUF file: {reason}", fix="get the file again")

    def take(self, size: int) -> int:
        """Move over `size` bytes; returns where they start."""
        if size > self.end - self.at:
            raise self.fail(f"it ends at byte {self.end:,}, inside its header")
        self.at += size
        return self.at - size

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("<Q")
        if length > self.end - self.at:
            raise self.fail(f"a text of {length:,} bytes at byte {self.at:,}")
        start = self.take(length)
        # Tokens of byte-level vocabularies needn't be UTF-8; names are checked by their use.
        return bytes(self.data[start : start + length]).decode("utf-8", errors="replace")

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


def read_header(path: Path) -> Header:
    """Metadata and tensor shapes of a GGUF file, every count and offset checked. Raises InputError."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise InputError(f"{path}: too short for a GGUF file", fix="get the file again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _walk(_Cursor(path, data))
    except (OSError, ValueError) as error:
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
            raise cursor.fail(f"metadata {name!r} stands twice")
        metadata[name] = cursor.value()
    places: dict[str, tuple[int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for _ in range(tensors):
        name = cursor.name()
        if name in shapes:
            raise cursor.fail(f"tensor {name!r} stands twice")
        shapes[name], places[name] = _tensor(cursor, name)
    _check_data(cursor, metadata.get(ALIGNMENT, 32), places)
    _check_sizes(cursor, metadata, shapes)
    return Header(metadata, shapes)


def _tensor(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(shape, (offset, bytes)) of the next tensor."""
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
    return shape, (offset, count // block * size)


def _check_data(cursor: _Cursor, alignment: Any, places: dict[str, tuple[int, int]]) -> None:
    """Every tensor lies aligned inside the file, and no two overlap."""
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise cursor.fail(f"alignment {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    taken = 0
    for name, (offset, size) in sorted(places.items(), key=lambda item: item[1]):
        if offset % alignment or offset < taken:
            raise cursor.fail(f"tensor {name!r} is misaligned or overlaps another")
        taken = offset + size
        if start + taken > cursor.end:
            raise cursor.fail(f"tensor {name!r} ends {start + taken - cursor.end:,} bytes behind the file")


def _check_sizes(cursor: _Cursor, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """A model built after the metadata is no larger than the tensors in the file."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not shapes:
        raise cursor.fail("it holds no model (no architecture or no tensors)")
    if metadata.get("general.type", "model") != "model":
        raise cursor.fail(f"it holds no model but {str(metadata['general.type'])[:40]!r}")
    limits = dict.fromkeys(SIZES, max(max(shape) for shape in shapes.values()))
    limits["block_count"] = len(shapes)
    routers = [shape for name, shape in shapes.items() if name.endswith("ffn_gate_inp.weight")]
    limits["expert_count"] = max((shape[-1] for shape in routers), default=0)
    for key, limit in limits.items():
        value = metadata.get(f"{architecture}.{key}", 0)
        for size in value if isinstance(value, tuple) else (value,):
            if not isinstance(size, int) or not 0 <= size <= limit:
                raise cursor.fail(f"{architecture}.{key} = {size!r}, but its tensors are smaller")
    total = sum(map(math.prod, shapes.values()))
    for keys in PRODUCTS:
        sizes = [metadata.get(f"{architecture}.{key}", 0) for key in keys]
        if all(isinstance(size, int) for size in sizes) and math.prod(sizes) > total:
            raise cursor.fail(f"{' x '.join(keys)} = {math.prod(sizes):,}, but it holds {total:,} numbers")


def to_folder(path: Path, cache: Path, *, progress: Callable[[str], None] | None = None) -> Path:
    """The model folder made from a GGUF file: out of `cache`, or converted into it now.

    `progress` is called with one line before the conversion. Raises InputError for a file that can't be used,
    RunError when the cache can't be written.
    """
    try:
        (cache / "known").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{cache}: can't be written: {error}", fix="point DELTAW_CACHE at another folder") from None
    folder = cache / f"{_content_hash(path, cache)[:32]}-{FORMAT}"
    if folder.is_dir():
        return folder
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError(f"{path}: reading GGUF needs a package", fix="pip install 'deltaw[gguf]'") from None
    read_header(path)
    with _locked(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            if progress is not None:
                progress(f"converting {path.name} to safetensors, once (about 20 s for 135M parameters)")
            _convert_into(folder, path)
    return folder


def _content_hash(path: Path, cache: Path) -> str:
    """The file's SHA-256 in hex, remembered by path, size and modification time."""
    try:
        status = path.stat()
        identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        memo = cache / "known" / hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.fullmatch(r"[0-9a-f]{64}", known := memo.read_text()):
                return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error}") from None
    write_text_atomic(memo, digest)
    return digest


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system releases the lock of a process that died."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_into(folder: Path, path: Path) -> None:
    """Convert beside `folder`, fsync, rename. Under the lock: a half-made folder there is a dead one's."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _convert(path, temporary)
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.iterdir():
            file.chmod(mode)  # safetensors leaves 0600
            fsync(file)
        fsync(temporary)
        temporary.rename(folder)
        fsync(folder.parent)
    except OSError as error:
        raise RunError(
            f"{folder}: could not be written: {error}",
            fix="free some space, or set DELTAW_CACHE to another disk",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(path: Path, folder: Path) -> None:
    """Dequantise with transformers and save model, config and tokenizer into `folder`, all bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltaw.base.load import check_loading, quiet

    try:
        # The dequantiser's progress bar listens to nothing but stderr.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a foreign reader makes of a stranger's file
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise InputError(
            f"{path}: transformers can't read this model ({type(error).__name__}: {reason})",
            fix="use a safetensors version of the model",
        ) from None
    check_loading(path, info)
    with quiet():
        _plain(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _plain(model: Any) -> Any:
    """The same weights in a model that doesn't think it is quantised (such a one refuses to be saved)."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
