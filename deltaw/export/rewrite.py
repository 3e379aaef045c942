"""The weights of a merged model, written from those of its base: the same files, a chunk at a time.

    read       rows of a tensor of the base, their bytes as they lie in the file
    w, Δ       both in float32; Δ of these rows alone, from the factors (DoRA's norms are of rows, so theirs, too)
    Q(w + Δ)   the sum, rounded once to the type of the target
    survival   Q(w + Δ) − Q(w) against Δ (linalg/rounding.py), from the same pass: nothing is read twice

A chunk is small enough for its float32 numbers to stay in the processor's cache, where the dozen passes over them cost
about as much as copying its bytes. Each thread has a chunk of its own and writes it at its place in the file, so that
two of them are as fast as a copy; in memory are a few chunks, whatever the model's size. What takes no update and keeps
its type is copied as bytes, of whatever type: it never becomes a number, except to be looked at for NaN.

Rejected: a survey before the pass. It costs the pass twice; what is written lies in a hidden folder until everything
has been said (target.py), so nothing is lost by writing first.

GPT-2's DoRA is the one update whose rows are not the file's: its W is read whole.

Letters: M outputs, N inputs.
"""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltaw.base.linear_weights import HEADER_BYTES, TENSORS
from deltaw.base.stream import Entry, Stream, stream_size, streamed
from deltaw.base.weights import Header, check_readable, read_header
from deltaw.errors import InputError
from deltaw.export.merged import FLOATS, MergePlan, Planned, not_finite
from deltaw.factors import DoRA, LowRank, Update, as_plain
from deltaw.linalg.rounding import Survival, survived, survived_of
from deltaw.linalg.threads import one_thread

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WORDS = {dtype: word for word, dtype in TYPES.items()}
CHUNK = 1 << 17  # numbers: 512 kB in float32, of which three stand beside each other in a cache of 2 MB
PIECE = 1 << 22  # bytes of the base that a thread takes at a time
FLUSHED = 1 << 25  # bytes after which the disk is told to begin
THREADS = 4


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor on its way: from which bytes to which, and what it takes."""

    planned: Planned
    source: int  # descriptor
    start: int  # its first byte there
    size: int
    stream: Stream
    dtype: torch.dtype | None  # of the target; None: its bytes are copied
    update: Update | None  # in the file's layout
    weight: bool  # NaN would be the model's

    @property
    def columns(self) -> int:
        """Numbers in each row."""
        return math.prod(self.planned.shape[1:])

    @property
    def pieces(self) -> Iterator[tuple[int, int]]:
        """What one thread takes at a time: bytes where they are copied, else rows."""
        whole, step = self.size, PIECE
        if self.dtype is not None:
            whole = self.planned.shape[0] if self.planned.shape else 1
            step = max(1, PIECE * whole // max(1, self.size))
        return ((first, min(first + step, whole)) for first in range(0, whole, step))


class _Piece(NamedTuple):
    tensor: _Tensor
    first: int
    last: int


class _Scratch(threading.local):
    """A thread's own buffers: new memory for each chunk would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or len(buffer) < count:
            self._buffers[name] = buffer = torch.empty(count, dtype=dtype)
        return buffer[:count]


_scratch = _Scratch()


class _Buffers(NamedTuple):
    """Of a chunk: W + Δ, Δ, the rounded sum in float32 again, and the rounded sum. Together they fit in a cache."""

    total: Tensor
    delta: Tensor
    again: Tensor
    rounded: Tensor


def size(plan: MergePlan, dtype: torch.dtype | None = None) -> int:
    """Bytes of all files of weights."""
    headers = {file: _header(file) for file in plan.by_file}
    return sum(stream_size(entries(plan, file, h, dtype), h.metadata) for file, h in headers.items())


def rewrite(
    plan: MergePlan, folder: Path, dtype: torch.dtype | None = None, *, progress: Callable[[int], None] | None = None
) -> dict[str, Survival]:
    """Write every file of the plan into `folder` under its own name; what is left of each module's update.

    `dtype`: of the parameters, None for each as the base stores it. `progress` gets the bytes of the base done so far.
    Raises InputError for NaN and infinity in the base, or by a narrower type; OSError for what the disk refuses.
    """
    survivals = dict.fromkeys(plan.adapter.factors, Survival())
    done = 0
    for file, tensors in plan.by_file.items():
        check_readable(file)
        header = _header(file)
        new = entries(plan, file, header, dtype)
        with (
            _opened(file) as source,
            streamed(folder / file.name, new, header.metadata) as stream,
            _flushed(stream) as flush,
        ):
            ways = [_way(plan, planned, header, source, stream, new[planned.name].dtype) for planned in tensors]
            for piece, read, survival in _in_threads(_Piece(way, *part) for way in ways for part in way.pieces):
                if module := piece.tensor.planned.module:
                    survivals[module] += survival
                done += read
                flush(done)
                if progress:
                    progress(done)
    return survivals


def entries(plan: MergePlan, file: Path, header: Header, dtype: torch.dtype | None) -> dict[str, Entry]:
    """What the file of the merged model holds: each tensor in its type, and the bytes that it takes."""
    return {planned.name: _entry(plan, planned, header, dtype) for planned in plan.by_file[file]}


def _entry(plan: MergePlan, planned: Planned, header: Header, dtype: torch.dtype | None) -> Entry:
    start, end = header.spans[planned.source]
    if dtype is None or planned.dtype not in FLOATS or planned.parameter not in plan.weights or _is_wide(plan, planned):
        return Entry(planned.dtype, planned.shape, end - start)
    numbers = (end - start) // TYPES[planned.dtype].itemsize
    return Entry(WORDS[dtype], planned.shape, numbers * dtype.itemsize)


def _is_wide(plan: MergePlan, planned: Planned) -> bool:
    """Whether the model holds it in float32 whatever its own type (a router's bias, say)."""
    fields = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    wide = {name for field in fields for name in getattr(plan.skeleton, field, None) or ()}
    return planned.dtype == "F32" and bool(wide.intersection((planned.parameter or "").split(".")))


def _way(plan: MergePlan, planned: Planned, header: Header, source: int, stream: Stream, word: str) -> _Tensor:
    start, end = header.spans[planned.source]
    update = plan.update(planned)
    if update is not None and planned.transposed:
        w_NM = torch.empty(planned.shape, dtype=TYPES[planned.dtype])
        _fill(w_NM, source, start)
        update = as_plain(update, _wide(w_NM).T).turned() if isinstance(update, DoRA) else update.turned()
    numbers = update is not None or word != planned.dtype
    dtype, weight = TYPES[word] if numbers else None, planned.dtype in FLOATS and planned.parameter in plan.weights
    return _Tensor(planned, source, start, end - start, stream, dtype, update, weight)


def _in_threads(pieces: Iterator[_Piece]) -> Iterator[tuple[_Piece, int, Survival]]:
    """Each piece with the bytes read of it and what is left of its update. An error ends them all."""
    pool = ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
    try:
        with one_thread():
            yield from pool.map(_written, pieces)
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _flushed(stream: Stream) -> Iterator[Callable[[int], None]]:
    """Has the disk write what there is while the rest is computed; it would be waited for in the end."""
    last, running = 0, None
    with ThreadPoolExecutor(1) as pool:

        def flush(done: int) -> None:
            nonlocal last, running
            if done - last >= FLUSHED and (running is None or running.done()):
                if running is not None:
                    running.result()  # an error of the disk
                last, running = done, pool.submit(os.fsync, stream.descriptor)

        yield flush
        if running is not None:
            running.result()


@torch.no_grad()
def _written(piece: _Piece) -> tuple[_Piece, int, Survival]:
    tensor, first, last = piece
    if tensor.dtype is None:
        return piece, last - first, _copied(tensor, first, last)
    dtype, columns = TYPES[tensor.planned.dtype], tensor.columns
    raw = _scratch.get("raw", (last - first) * columns * dtype.itemsize, torch.uint8)
    _fill(raw, tensor.source, tensor.start + first * columns * dtype.itemsize)
    base, step = raw.view(dtype).view(last - first, columns), max(1, CHUNK // max(1, columns))
    wide = torch.promote_types(dtype, torch.float32)
    total, delta, again = (
        _scratch.get(name, step * columns, wide).view(step, columns) for name in ("total", "delta", "again")
    )
    rounded = _scratch.get("rounded", step * columns, tensor.dtype).view(step, columns)
    buffers = _Buffers(total, delta, again, rounded)
    survival = Survival()
    for row in range(first, last, step):
        chunk = base[row - first : row - first + step]
        survival += _summed(tensor, chunk, row, _Buffers._make(buffer[: len(chunk)] for buffer in buffers))
    return piece, raw.numel(), survival


def _copied(tensor: _Tensor, first: int, last: int) -> Survival:
    raw = _scratch.get("raw", last - first, torch.uint8)
    _fill(raw, tensor.source, tensor.start + first)
    if tensor.weight and raw.numel():
        # aminmax hands NaN on and reads each number once.
        extremes = torch.aminmax(raw.view(TYPES[tensor.planned.dtype]))
        if not all(torch.isfinite(extreme) for extreme in extremes):
            raise not_finite(tensor.planned)
    tensor.stream.write(_bytes(raw), tensor.stream.starts[tensor.planned.name] + first)
    return Survival()


def _summed(tensor: _Tensor, base: Tensor, row: int, buffers: _Buffers) -> Survival:
    """One chunk: rows of the base from `row` on, with what they take, rounded and written; what is left of it."""
    total, delta, again, rounded = buffers
    total.copy_(base)
    survival, finite = Survival(), True
    if tensor.update is None:
        rounded.copy_(total)
        if tensor.weight and base.numel():
            finite = all(math.isfinite(extreme) for extreme in torch.aminmax(again.copy_(rounded)))
    else:
        delta = _delta(tensor.update.rows(row, row + len(base)), total, out=delta)
        rounded.copy_(total.add_(delta))
        again.copy_(rounded)
        if base.dtype == rounded.dtype != total.dtype:
            survival = survived_of(again.sub_(total), delta, _differing(rounded, base))
        else:
            survival = survived(again.sub_(total.copy_(base).to(rounded.dtype)), delta)
        finite = math.isfinite(survival.lost)
    if not finite:
        raise _overflow(tensor, base)
    at = tensor.stream.starts[tensor.planned.name] + row * tensor.columns * rounded.itemsize
    tensor.stream.write(_bytes(rounded), at)
    return survival


def _differing(x: Tensor, y: Tensor) -> int:
    """How many entries of two tensors of 16 bits differ."""
    return int(np.count_nonzero(np.not_equal(x.view(torch.int16).numpy(), y.view(torch.int16).numpy())))


def _delta(update: Update, w: Tensor, *, out: Tensor) -> Tensor:
    """ΔW of these rows."""
    if not isinstance(update, LowRank):
        return as_plain(update, w).dense()
    # In the buffer, and with the scale in the product.
    return torch.addmm(out, update.b_MR, update.a_RN, beta=0, alpha=update.scale, out=out)


def _overflow(tensor: _Tensor, base: Tensor) -> InputError:
    if not torch.isfinite(base).all():
        return not_finite(tensor.planned)
    name, largest = str(tensor.dtype).removeprefix("torch."), float(base.abs().max())
    return InputError(
        f"{tensor.planned.name}: merged, it has a number too large for {name} (up to {largest:.3g} in the base)",
        fix="merge with --dtype bfloat16 or float32",
    )


def _bytes(x: Tensor) -> memoryview:
    """A contiguous tensor's own memory."""
    return memoryview(x.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fill(buffer: Tensor, source: int, at: int) -> None:
    """Read as many bytes as the buffer has. OSError for a file that has become shorter."""
    view = _bytes(buffer)
    while view:
        read = os.preadv(source, [view], at)
        if not read:
            raise OSError("a file of the base was cut short while it was read")
        view, at = view[read:], at + read


def _header(file: Path) -> Header:
    return read_header(file, max_header_bytes=HEADER_BYTES, max_tensors=TENSORS)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
