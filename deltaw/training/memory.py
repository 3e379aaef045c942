"""Memory: what there is, what a step takes of it, and what to change when it is too little.

    memory = a + b · tokens + c · supervised tokens        of one batch, forward and backward

a: weights, factors, their gradients and moments, and the process itself; b: activations kept for the backward; c: rows
that meet the head. The three are fitted to the measured peaks of a few small batches, by least squares, so nothing is
assumed about the model. Rejected: a formula from the config (kernels, recomputation and the allocator decide).

Memory is measured as the peak of the process on a CPU (Linux lets it be set back) and of its tensors on a GPU. On a CPU
two things let it grow with every new shape of a batch, until it is twice what a step needs: oneDNN keeps 1,024 compiled
kernels at half a megabyte each, and the C library keeps the holes that tensors of other sizes left. `bound_caches` and
`Heap` keep both small, so that what was measured at first is what is held at the end.

On Linux too little memory is no error but a kill, by the kernel. Inside `bounded` it is an error.
"""

import ctypes
import math
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from deltaw.base.batch import Batch
from deltaw.data.example import Example
from deltaw.data.pack import pack
from deltaw.kernels.logprobs import IGNORE
from deltaw.training.log import peak_memory_bytes

if TYPE_CHECKING:
    from deltaw.training.trainer import Trainer

KERNELS = 256  # compiled by oneDNN and kept; a step of new shapes needs about 50
KERNEL_BYTES = 1 << 19  # of one of them, about
GROWTH = 1.1  # of what one step leaves behind, before the C library is asked for it
UNLIMITED = 1 << 60
GROUP_FILES = (  # of a control group: its limit, what it uses, and which line of memory.stat can be dropped
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def bound_caches() -> None:
    """Make oneDNN keep fewer kernels than its 1,024. Of use before the first product of the process."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def release(device: torch.device) -> None:
    """Give what is free inside the process back to the machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)


class Heap:
    """Keeps the C library's holes to a tenth of the whole. `tidy` is called after each step."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._limit = device, 0.0

    def tidy(self) -> None:
        """Release where the process has grown since the first step after the last release."""
        if self._device.type != "cpu":
            return
        held = held_memory(self._device)
        if not self._limit:
            self._limit = GROWTH * held
        elif held > self._limit:
            release(self._device)
            self._limit = 0.0


def held_memory(device: torch.device) -> int:
    """Bytes held now: by the process on a CPU (0 where the system doesn't tell), by tensors on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken without another process or the kernel minding; 2⁶⁰ where the system doesn't tell.

    On a CPU the least of: available memory, what the control groups leave, what `ulimit -v` and `-d` leave.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    rooms = [_available(), *_control_groups()]
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            rooms.append(soft - _status(used))
    return max(0, min(rooms))


@contextmanager
def bounded(device: torch.device) -> Iterator[None]:
    """Inside, taking more memory than there is raises an error; without it, Linux kills the process."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    held, free = _status("VmData"), free_memory(device)
    if device.type != "cpu" or not held or free >= UNLIMITED:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (held + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@dataclass
class Window:
    """What happened while it was open: the peak in bytes, and how long it took in seconds."""

    peak: int = 0
    seconds: float = 0.0


@contextmanager
def window(device: torch.device) -> Iterator[Window]:
    """Measure a stretch of work. Where a peak can't be set back (macOS) it is the process's so far."""
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    seen, began = Window(), time.monotonic()
    yield seen
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seen.peak, seen.seconds = peak_memory_bytes(device), time.monotonic() - began


@dataclass(frozen=True)
class Point:
    """A batch that was run forward and backward: its size, its peak in bytes, its seconds."""

    tokens: int
    supervised: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """memory = fixed + token · tokens + supervised · supervised tokens, in bytes."""

    fixed: float
    token: float
    supervised: float

    def bytes_at(self, tokens: float, supervised: float) -> int:
        """The peak of a batch of that size."""
        return round(self.fixed + self.token * tokens + self.supervised * supervised)


def fit_memory(points: Sequence[Point]) -> Fit:
    """Least squares over two sizes at least; over fewer than four points, or where noise would make it negative, a
    supervised token costs nothing more."""
    columns = np.array([(1, point.tokens, point.supervised) for point in points], float)
    peaks = np.array([point.peak for point in points], float)
    for kept in ([0, 1, 2], [0, 1])[len(points) < 4 :]:
        found, *_ = np.linalg.lstsq(columns[:, kept], peaks, rcond=None)
        if (found >= 0).all():
            break
    fixed, token, supervised = [*np.maximum(found, 0.0).tolist(), 0.0][:3]
    return Fit(fixed, token, supervised)


def one_pass(trainer: "Trainer", batch: Batch, *, accumulating: bool) -> None:
    """Forward and backward of a batch as a step makes them, with a step's gradients and moments in memory.

    Nothing of it stays: no gradient, no random number drawn, no weight changed.
    """
    device, layers = trainer.model.base.device, trainer.attached.layers.values()
    fresh = [p for p in trainer.attached.parameters if p not in trainer.optimizer.state]
    moments = [torch.empty(2 * p.numel(), device=device) for p in fresh]  # AdamW makes them in its first update
    with torch.random.fork_rng(enabled=bool(trainer.config.adapter.dropout)):
        try:
            for layer in layers:
                layer.train(True)
            if accumulating:  # a batch before this one left its gradient
                for parameter in trainer.attached.parameters:
                    parameter.grad = torch.ones_like(parameter)
            batch = batch.to(device)
            # Not the trainer's forward, which may begin above frozen layers for rows that it knows: these may be cut.
            loss, labels = trainer.model.forward.loss(batch)
            if labels:
                loss.backward()
        finally:
            for layer in layers:
                layer.train(False)
            trainer.optimizer.zero_grad()
            del moments


def measure(
    trainer: "Trainer",
    examples: Sequence[Example],
    sizes: Sequence[int],
    *,
    accumulating: bool,
    seconds: float = math.inf,
) -> Iterator[Point]:
    """Passes over batches of `sizes` tokens cut out of `examples`, ascending, the largest once more with half of its
    labels. Two at least; then those are left out that would take more than `seconds` each, if time goes with the square
    of the tokens as attention's does. Raises whatever PyTorch raises where memory runs out."""

    def measured(batch: Batch) -> Point:
        with window(trainer.model.base.device) as seen:
            one_pass(trainer, batch, accumulating=accumulating)
        return Point(len(batch.tokens_T), batch.supervised, seen.peak, seen.seconds)

    points, largest = list[Point](), None
    for size in sorted(set(sizes)):
        batch = pack(_cut(examples, size))
        if len(points) > 1 and points[-1].seconds * (len(batch.tokens_T) / points[-1].tokens) ** 2 > seconds:
            break
        points.append(measured(largest := batch))
        yield points[-1]
    if largest is not None:
        yield measured(_half_trained(largest))


def _cut(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The first `tokens` tokens of `examples`, the last one cut; at least two, of which one can be trained."""
    taken, room = list[Example](), max(2, tokens)
    for example in examples:
        if room > 1:
            end = min(room, len(example.tokens))
            taken.append(replace(example, tokens=example.tokens[:end], loss_mask=example.loss_mask[:end]))
            room -= end
    return taken


def _half_trained(batch: Batch) -> Batch:
    labels_T = batch.labels_T.clone()
    labels_T[::2] = IGNORE
    return replace(batch, labels_T=labels_T)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, in the words of Python, PyTorch, oneDNN, cuBLAS or the C library."""
    said = ("can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc", "ALLOC_FAILED")
    made = isinstance(error, RuntimeError) and any(words in str(error) for words in (*said, "could not create a"))
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or made


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes; 0 where there is none."""
    return _fields("/proc/self/status").get(name, 0)


def _available() -> int:
    """What Linux calls available: free, or in a cache that can be dropped."""
    return _fields("/proc/meminfo").get("MemAvailable", UNLIMITED)


def _fields(path: str) -> dict[str, int]:
    """`VmRSS:   1234 kB` -> {"VmRSS": 1263616}; nothing where the system has no such file."""
    with suppress(OSError):
        lines = [line.split() for line in Path(path).read_text().splitlines()]
        return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}
    return {}


def _control_groups() -> Iterator[int]:
    """What the process's control groups leave, and those above them, in version 2 (without names) or 1."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names and "memory" not in names.split(","):
                continue
            root = Path("/sys/fs/cgroup", "memory" if names else "")
            group = root / path.lstrip("/")
            yield from (_left_in(folder) for folder in (group, *group.parents) if folder.is_relative_to(root))


def _left_in(group: Path) -> int:
    """What a control group's limit leaves, dropping cached files included."""
    for limit, usage, cached in GROUP_FILES:
        with suppress(OSError, ValueError):  # "max" is no number
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            taken = int((group / usage).read_text()) - int(stat.get(cached, 0))
            return int((group / limit).read_text()) - taken
    return UNLIMITED
