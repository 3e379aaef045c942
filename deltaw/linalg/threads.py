"""One thread for many small decompositions.

LAPACK's work on a matrix of some hundred rows is a long chain of short steps; with several threads they wait for each
other at each. On a busy machine that made 42 modules take 23 s instead of 0.2 s, and it gains little on an idle one.
Several modules at once, a thread each, is what uses the cores.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on a single thread for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
