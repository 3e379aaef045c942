"""Memory: what is free, and keeping what was freed for the next tensor.

glibc hands every large block (above 32 MiB at most, often far less) back to the system when it is freed and asks for a
new one at the next tensor, which the system then maps page by page, zeroing each. A training step frees and takes the
same few hundred blocks again and again: on two cores that was 10 % of a dense step of 2048 tokens. PyTorch's own
CPU allocator keeps nothing. Two of glibc's documented parameters (mallopt(3)) make it keep what was freed; a process's
peak is what it was, only its ebb is gone.
"""

import ctypes
import os
import sys

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 1 << 30  # bytes; a larger block is still the system's


def keep_freed_memory() -> bool:
    """Tell glibc, for this process. True where it listened; elsewhere (musl, macOS, Windows) nothing changes."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, 2 * LARGEST - 1))


def free_memory(device: torch.device) -> int:
    """Bytes that a tensor on `device` could take now; a tebibyte where the system doesn't tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 40
