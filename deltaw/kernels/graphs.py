"""Work that is recorded on a GPU as a CUDA graph and replayed: one launch, where the host made one per operation.

What is recorded sees the same tensors at the same addresses for ever, every number that the host gave it included; what
would wait for the device can't be recorded. Who records says what may change, and looks whether a replay is the work
itself (training/captured.py, generate/captured.py).
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROOM = 0.2  # of the free memory, that a recording must leave

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]  # work -> (replay, its result's place)


def can_record(device: torch.device) -> bool:
    """Whether it has such graphs."""
    return device.type == "cuda" and torch.version.hip is None


class TooLarge(RuntimeError):
    """A recording keeps more memory than it may."""


def capture(work: Callable[[], Any], pool: Any = None) -> tuple[Any, Any]:
    """(the graph, the work's result), in that pool of memory. Raises what the work raised, or what made it impossible
    to record; the process can go on as before then."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads may go on (a progress display, another run's): only this one can spoil a recording.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
    except Exception as error:
        _put_back(stream)
        first = error.__context__  # ending a recording that has failed fails, too, and says less
        if isinstance(first, Exception):
            raise first from None
        raise
    return graph, result


def _put_back(stream: Any) -> None:
    """What a recording that failed leaves behind: its own stream, and a generator that believes to be recorded, so that
    whoever draws next gets an error. A copy of its state doesn't believe that, and draws the same."""
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


class Recorder:
    """Records CUDA graphs. They share memory: they never run at once, and only their results outlive a replay."""

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        pool = next((other.pool() for other in self._graphs), None)  # one whose graphs are gone is gone
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        graph, result = capture(work, pool)
        left, _ = torch.cuda.mem_get_info()
        if left < free * ROOM:
            raise TooLarge("a recording keeps its memory, and too little would be left")
        self._graphs.add(graph)
        return graph.replay, result
