"""The weights of a merged model, written from those of its base: the same files, a piece at a time.

    read       rows of a tensor of the base, their bytes as they lie in the file
    w, Δ       both in float32; Δ of these rows alone, from the factors (DoRA's norms are of rows, so theirs, too)
    Q(w + Δ)   the sum, rounded once to the type of the target
    survival   Q(w + Δ) − Q(w) against Δ (linalg/rounding.py), from the same pass: nothing is read twice

Each thread has a piece of its own and writes it at its place in the file; in memory are a few pieces, whatever the
model's size. The passes over a piece's float32 numbers are what a merge costs beside a copy, so there are few: which
entries change is counted in full, the sums of their rounding errors are those of every fourth row, scaled. What takes
no update and keeps its type is copied as bytes, of whatever type: it never becomes a number, except to be looked at for
NaN.

Rejected: a survey before the pass. It costs the pass twice; what is written lies in a hidden folder until everything
has been said (target.py), so nothing is lost by writing first.

GPT-2's DoRA is the one update whose rows are not the file's: its W is read whole.

Letters: M outputs, N inputs.
"""

import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltaw.base.linear_weights import HEADER_BYTES, TENSORS
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.files.forked import usable_cores
from deltaw.files.safetensors import Header, check_readable, read_header
from deltaw.files.stream import Entry, Stream, stream_size, streamed
from deltaw.kernels.weight import DenseWeight
from deltaw.linalg.rounding import Survival, survived, survived_of
from deltaw.linalg.threads import one_thread
from deltaw.shipping.merge.plan import FLOATS, MergePlan, Planned, not_finite
from deltaw.shipping.merge.stack import Stacked
from deltaw.show.progress import Progress, unseen
from deltaw.updates import Update

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WORDS = {dtype: word for word, dtype in TYPES.items()}
EVERY, SMALL = 4, 1 << 16  # rows whose rounding errors are added up, in pieces of more numbers than that
PIECE = 1 << 22  # bytes of the base that a thread takes at a time; with smaller ones threads wait for each other
FLUSHED = 1 << 25  # bytes after which the disk is told to begin
THREADS, AHEAD = 4, 4  # at most so many, and pieces that wait for each


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor on its way: from which bytes to which, and what it takes."""

    planned: Planned
    source: int  # descriptor
    start: int  # its first byte there
    size: int
    stream: Stream
    dtype: torch.dtype | None  # of the target; None: its bytes are copied
    update: Update | Stacked | None  # in the file's layout
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
    """A thread's own buffers: new memory for each piece would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or len(buffer) < count:
            self._buffers[name] = buffer = torch.empty(count, dtype=dtype)
        return buffer[:count]


_scratch = _Scratch()


class _Buffers(NamedTuple):
    """Of a piece: W + Δ, the rounded sum in float32 again, and the rounded sum."""

    total: Tensor
    again: Tensor
    rounded: Tensor


def size(plan: MergePlan, dtype: torch.dtype | None = None) -> int:
    """Bytes of all files of weights."""
    headers = {file: _header(file) for file in plan.by_file}
    return sum(stream_size(entries(plan, file, h, dtype), h.metadata) for file, h in headers.items())


def rewrite(
    plan: MergePlan, folder: Path, dtype: torch.dtype | None = None, *, progress: Progress = unseen
) -> dict[str, Survival]:
    """Write every file of the plan into `folder` under its own name; what is left of each module's update.

    `dtype`: of the parameters, None for each as the base stores it. `progress` gets the bytes of the base done so far.
    Raises InputError for NaN and infinity in the base, or by a narrower type; OSError for what the disk refuses.
    """
    survivals = dict.fromkeys(plan.modules, Survival())
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
            ways = (_way(plan, planned, header, source, stream, new[planned.name].dtype) for planned in tensors)
            for piece, read, survival in _in_threads(_Piece(way, *part) for way in ways for part in way.pieces):
                if module := piece.tensor.planned.module:
                    survivals[module] += survival
                done += read
                flush(done)
                progress(done)
    return survivals


def entries(plan: MergePlan, file: Path, header: Header, dtype: torch.dtype | None) -> dict[str, Entry]:
    """What the file of the merged model holds: each tensor in its type, and the bytes that it takes."""
    return {planned.name: _entry(plan, planned, header, dtype) for planned in plan.by_file[file]}


def _entry(plan: MergePlan, planned: Planned, header: Header, dtype: torch.dtype | None) -> Entry:
    start, end = header.spans[planned.source]
    end += (end - start) // max(1, planned.shape[0] - planned.more) * planned.more if planned.shape else 0
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
    if isinstance(update, Update) and planned.transposed:
        w_NM = torch.empty(planned.shape, dtype=TYPES[planned.dtype])
        _fill(w_NM, source, start)
        update = update.relative_to(DenseWeight(_wide(w_NM).T)).turned()
    numbers = update is not None or word != planned.dtype
    dtype, weight = TYPES[word] if numbers else None, planned.dtype in FLOATS and planned.parameter in plan.weights
    return _Tensor(planned, source, start, end - start, stream, dtype, update, weight)


def _in_threads(pieces: Iterator[_Piece]) -> Iterator[tuple[_Piece, int, Survival]]:
    """Each piece with the bytes read of it and what is left of its update, a few ahead. An error ends them all."""
    workers = min(THREADS, usable_cores())
    pool, begun = ThreadPoolExecutor(workers), deque[Future[tuple[_Piece, int, Survival]]]()
    try:
        with one_thread():
            for piece in pieces:
                begun.append(pool.submit(_written, piece))
                if len(begun) > AHEAD * workers:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
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
    rows, wide = last - first, torch.promote_types(dtype, torch.float32)
    raw = _scratch.get("raw", rows * columns * dtype.itemsize, torch.uint8)
    stored = min(rows, max(0, tensor.planned.shape[0] - tensor.planned.more - first)) if tensor.planned.more else rows
    _fill(raw[: stored * columns * dtype.itemsize], tensor.source, tensor.start + first * columns * dtype.itemsize)
    raw[stored * columns * dtype.itemsize :] = 0  # tokens that were added have no row yet
    total, again = (_scratch.get(name, rows * columns, wide).view(rows, columns) for name in ("total", "again"))
    buffers = _Buffers(total, again, _scratch.get("rounded", rows * columns, tensor.dtype).view(rows, columns))
    return piece, raw.numel(), _summed(tensor, raw.view(dtype).view(rows, columns), first, buffers)


def _copied(tensor: _Tensor, first: int, last: int) -> Survival:
    raw = _scratch.get("raw", last - first, torch.uint8)
    _fill(raw, tensor.source, tensor.start + first)
    if tensor.weight and raw.numel() and not _finite(raw.view(TYPES[tensor.planned.dtype])):
        raise not_finite(tensor.planned)
    tensor.stream.write(_bytes(raw), tensor.stream.starts[tensor.planned.name] + first)
    return Survival()


def _summed(tensor: _Tensor, base: Tensor, row: int, buffers: _Buffers) -> Survival:
    """One piece: rows of the base from `row` on, with what they take, rounded and written; what is left of it."""
    total, again, rounded = buffers
    total.copy_(base)
    survival, finite = Survival(), True
    if tensor.update is None:
        rounded.copy_(total)
        if tensor.weight and base.numel():
            finite = _finite(rounded)
    elif base.dtype == rounded.dtype != total.dtype and isinstance(tensor.update, LowRank):
        survival, finite = _added(tensor.update.rows(row, row + len(base)), base, buffers)
    else:
        delta = tensor.update.rows(row, row + len(base)).relative_to(DenseWeight(total)).dense().to(total.dtype)
        rounded.copy_(total.add_(delta))
        survival = survived(again.copy_(rounded).sub_(total.copy_(base).to(rounded.dtype)), delta)
        finite = math.isfinite(survival.lost)
    if not finite:
        raise _overflow(tensor, base)
    at = tensor.stream.starts[tensor.planned.name] + row * tensor.columns * rounded.itemsize
    tensor.stream.write(_bytes(rounded), at)
    return survival


def _added(update: LowRank, base: Tensor, buffers: _Buffers) -> tuple[Survival, bool]:
    """W + B A of 16-bit numbers, rounded to their own type: what is left of the update, and whether all is finite."""
    total, again, rounded = buffers
    every = EVERY if base.numel() > SMALL else 1
    a_RN, b_MR = update.a_RN.float(), update.b_MR.float()
    rounded.copy_(torch.addmm(total, b_MR, a_RN, alpha=update.scale, out=total))
    error = again[: -(-len(again) // every)].copy_(rounded[::every]).sub_(total[::every])
    delta = _scratch.get("delta", error.numel(), torch.float32).view(error.shape)
    torch.addmm(delta, b_MR[::every], a_RN, beta=0, alpha=update.scale, out=delta)
    differs = _scratch.get("differs", base.numel(), torch.bool).numpy().reshape(base.shape)
    np.not_equal(rounded.view(torch.int16).numpy(), base.view(torch.int16).numpy(), out=differs)
    return survived_of(error, delta, int(np.count_nonzero(differs)), base.numel()), _finite(rounded)


def _finite(x: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    if x.itemsize != 2:
        return all(torch.isfinite(extreme) for extreme in torch.aminmax(x))  # it hands NaN on
    # Their patterns are the largest of either sign; numpy finds those five times as fast.
    bits, infinity = x.view(torch.int16).numpy(), torch.tensor(math.inf, dtype=x.dtype).view(torch.int16).item()
    return bool(bits.max() < infinity and bits.view(np.uint16).max() < infinity + 0x8000)


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
    """Read as many bytes as the buffer has."""
    view = _bytes(buffer)
    while view:
        read = os.preadv(source, [view], at)
        if not read:
            raise InputError("a file of the base was cut short while it was read", fix="download the base again")
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
