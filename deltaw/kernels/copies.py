"""Copies of a base's matrices that steps of decoding read faster than the matrices themselves: when they are made.

A copy takes as long as a few products and as much memory as the matrix (bags.py: of a byte per code; prepacked.py:
blocked for one kind of product). So none is made unasked: inside `making`, and where memory isn't short. That is where
answers are all that is done (`chat`, `generate`, `eval`, a server), not in a run's evaluations, whose next step needs
the memory. Once made they are read by whatever decodes.
"""

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

SPARE = 2**31  # bytes of memory that stay free

_making: ContextVar[bool] = ContextVar("making", default=False)


@contextlib.contextmanager
def making(make: bool = True) -> Iterator[None]:
    """Inside, copies are made where there are none yet."""
    token = _making.set(make)
    try:
        yield
    finally:
        _making.reset(token)


def are_made() -> bool:
    """Whether this is inside `making`."""
    return _making.get()


def fits(nbytes: int) -> bool:
    """Whether there is room for a copy of this size, twice, since making it takes memory, too."""
    return _available() > SPARE + 2 * nbytes


def _available() -> float:
    """Bytes of memory that may still be had, where the system says so."""
    with contextlib.suppress(OSError):
        if told := re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii")):
            return 1024 * int(told[1])
    return float("inf")
