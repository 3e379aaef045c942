"""Which of several ways to do one thing is the quickest on this GPU, by trying them on the very tensors.

How many columns a kernel should take at once, or whether two launches beat one, depends on the chip, the model's sizes
and the rows of a pass; a rule made on one card is wrong on the next. So the ways are timed when they are first wanted,
as a recorded pass will use them: recorded and replayed, some milliseconds for each, and the answer is kept for as long
as the process lives. A way that can't be taken at all (it wants more of a multiprocessor than there is) is out. Rows
are told apart by powers of two, so that batches of like sizes don't ask again.

What is recorded can't be timed: a pass runs as it is before it is recorded, and so has asked.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from functools import cache

import torch

RUNS = 8  # in one recording
REPLAYS = 3

Way = Callable[[], object]  # may be taken again: it gives the same

_known: dict[Hashable, int] = {}


def quickest(what: str, rows: int, sizes: Hashable, ways: Callable[[], Sequence[Way]]) -> int:
    """The number of the way that is the quickest for this many rows; 0 while a graph is being recorded that hasn't been
    run before. `ways` is asked where they have to be tried."""
    key = (what, rows.bit_length(), sizes)
    if key not in _known:
        if torch.cuda.is_current_stream_capturing():
            return 0
        _known[key] = decide(ways(), replayed_ms)
    return _known[key]


def decide(ways: Sequence[Way], clock: Callable[[Way], float]) -> int:
    """The number of the quickest by that clock; of the first, where none can be timed."""
    times = []
    for way in ways:
        try:
            times.append(clock(way))
        except Exception:  # whatever a compiler or a recording says
            times.append(math.inf)
    return times.index(min(times))


def replayed_ms(way: Way) -> float:
    """A replay of it, in milliseconds."""
    here = torch.cuda.current_stream()
    side = _side(here.device)
    side.wait_stream(here)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        way()  # compiled, and its memory found
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(RUNS):
                way()
        finally:
            graph.capture_end()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        graph.replay()
        for mark in marks[:-1]:
            mark.record()
            graph.replay()
        marks[-1].record()
        marks[-1].synchronize()
    here.wait_stream(side)
    return min(before.elapsed_time(after) for before, after in itertools.pairwise(marks)) / RUNS


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One for all: products keep a workspace for each stream that they have met."""
    return torch.cuda.Stream(device)
