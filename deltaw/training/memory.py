"""Memory: how much there is, how much a piece of work takes, and a name for the work in which it ran out.

Memory is measured as the peak of the process on a CPU (Linux lets it be reset) and of its tensors on a GPU. On a CPU
two things let it grow with every new shape of a batch, until it is twice what a step needs: oneDNN keeps 1,024 compiled
kernels at half a megabyte each, and the C library keeps the holes that tensors of other sizes left. `bound_caches` and
`Heap` keep both small, so that what was measured at first still holds at the end. Within one step holes come, too,
and more of them the larger the tensors: where memory is short, `few_holes` trades some speed for most of them.

On Linux, too little memory isn't an error but a kill by the kernel. Inside `bounded` it is an error.

Whoever starts an evaluation names it (`working_on`), so an out-of-memory error says what was too large. Work
without a name is a training step, or its rehearsal. Rejected: reading the name off the modules in the traceback, which
a renamed file silently breaks.

Read by hand and not through psutil, which has the process's size but neither its data segment, which `bounded` limits,
nor the control groups' limits: it would replace ten lines of these.
"""

import ctypes
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from deltaw.errors import RunError

KERNELS = 256  # compiled by oneDNN and kept; a step of new shapes needs about 50
KERNEL_BYTES = 1 << 19  # of one of them, about
GROWTH = 1.1  # of what one step leaves behind, before the C library is asked for it
SHAPES, SETTLED = 5, 16  # kernels that a step of another shape adds; steps until the holes are as large as they get
UNLIMITED = 1 << 60
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
APART, KEPT = 8 << 20, 64 << 20  # bytes from which a tensor has pages of its own; free bytes that the heap may keep
GROUP_FILES = (  # of a control group: its limit, what it uses, and which line of memory.stat can be dropped
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def bound_caches() -> None:
    """Make oneDNN keep fewer kernels than its 1,024. Of use before the first product of the process."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def release(device: torch.device) -> None:
    """Give memory that is free inside the process back to the machine."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def few_holes(device: torch.device) -> None:
    """From now on give each large tensor pages of its own, which go back to the machine with it. By itself glibc does
    so for a while, then puts up to 32 MB into one heap, from which only the top ever goes back: at 1B and 2,048 tokens
    a step that was 1.1 of 3.7 GB. Fresh pages cost 2 to 6 % of a step's time (measured on the builtin), so this is for
    runs that memory is short for. Can't be taken back."""
    if device.type == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc
        libc.mallopt(M_MMAP_THRESHOLD, APART)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


class Heap:
    """Keeps the C library's holes to a tenth of the whole. `tidy` is called after each step."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._limit = device, 0.0

    def tidy(self) -> None:
        """Release where the process has grown since the first step after the last release."""
        if self._device.type != "cpu":
            return
        size = held_memory(self._device)
        if not self._limit:
            self._limit = GROWTH * size
        elif size > self._limit:
            release(self._device)
            self._limit = 0.0


def of_all_steps(peak: int, steps: int, device: torch.device) -> int:
    """The peak of so many steps, of which the largest came to `peak` by itself: on a CPU, steps of other shapes add
    holes as far as `Heap` lets them, and kernels."""
    if device.type != "cpu":
        return peak
    holes = (GROWTH - 1) * min(1, steps / SETTLED)
    return peak + round(holes * peak) + min(KERNELS, SHAPES * steps) * KERNEL_BYTES


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
    size, free = _status("VmData"), free_memory(device)
    if device.type != "cpu" or not size or free >= UNLIMITED:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (size + free, before[1]))
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
    """Measure a piece of work. Where a peak can't be reset (macOS), it is the process's so far."""
    release(device)
    _before[os.getpid(), str(device)] = peak_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    seen, began = Window(), time.monotonic()
    yield seen
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seen.peak, seen.seconds = _peak(device), time.monotonic() - began


_before: dict[tuple[int, str], int] = {}  # by process (a fork has a peak of its own) and device: when a window began


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: the process's on a CPU, the tensors' on a GPU."""
    return max(_peak(device), _before.get((os.getpid(), str(device)), 0))


def _peak(device: torch.device) -> int:
    """The same since the last window began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class OutOfMemory(RunError):
    """Memory ran out in a piece of work that has a name ("answering rows")."""

    def __init__(self, work: str) -> None:
        super().__init__(f"out of memory {work}")
        self.work = work


@contextmanager
def working_on(work: str) -> Iterator[None]:
    """Inside, running out of memory raises OutOfMemory of `work`; the innermost name counts. What was held is free."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that were too many
        raise OutOfMemory(work) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in the words of Python, PyTorch, oneDNN, cuBLAS or the C library."""
    words = ("can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc", "ALLOC_FAILED")
    made = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in (*words, "could not create a"))
    return isinstance(error, OutOfMemory | MemoryError | torch.OutOfMemoryError) or made


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
        with suppress(OSError, ValueError):  # "max" isn't a number
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            taken = int((group / usage).read_text()) - int(stat.get(cached, 0))
            return int((group / limit).read_text()) - taken
    return UNLIMITED
