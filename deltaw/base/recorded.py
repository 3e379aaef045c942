"""Work that is recorded on a GPU and replayed: one launch, where the host made 150 per layer.

    as it is    at first: memory is found, kernels are chosen and compiled
    recorded    then, and shown to give what the work gives
    replayed    from then on: the same operations at the same addresses

`Recorded` is work on tensors that stay where they are. `OfSize` is a pass over batches, which are filled up to one size
(filled.py) and copied into that size's places. It has two users: the passes of training, forward and backward
(training/captured.py), and those of evaluations, forward alone (evaluation/scoring.py). Each says how a recording is
shown to be right, and what happens where it can't be made.

All that a process records on a device shares one pool of memory, so an evaluation between two steps takes nothing that
the steps haven't taken already. The pool lasts as long as one of its recordings does.

Without a GPU all of this runs as it is: `record=None`. Tests have a recorder of their own (tests/tape.py).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from deltaw.base.batch import Batch
from deltaw.base.filled import Places, Size
from deltaw.errors import first_line
from deltaw.kernels.graphs import Record, Recorder, can_record

Work = Callable[[], Tensor]
Recording = tuple[Callable[[], object], Tensor]  # (replay, its result's place)


class OfSize:
    """The pass `work` over batches of one size. `record`: None where it is never to be recorded; `at_once`: recorded
    when it is met for the first time, not the second."""

    def __init__(
        self,
        size: Size,
        device: torch.device,
        work: Callable[[Batch], Tensor],
        record: Record | None,
        *,
        at_once: bool = False,
    ) -> None:
        self._places, self._work, self._recorded = Places(size, device), work, record is not None
        self._replay: Callable[[], object] | None = None
        self._result = torch.empty(0)
        self._met = at_once

    @property
    def is_recorded(self) -> bool:
        """Whether it is replayed from now on."""
        return self._replay is not None

    def __call__(
        self,
        filled: Batch,
        prove: Callable[[Work], Recording],
        drawing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Tensor:
        """What the pass gives of a batch of this size. `prove`: records the work, and raises where that isn't the work
        itself; inside `drawing` what is random is this batch's."""
        self._places.put(filled)

        def work() -> Tensor:  # a pass that will be replayed may know no batch's documents
            return self._work(self._places.batch(None if self._recorded else filled.documents))

        if self._replay is None and self._recorded and self._met:
            self._replay, self._result = prove(work)
        self._met = True
        with drawing():
            if self._replay is None:
                return work()
            self._replay()
            return self._result.clone()


class Recorded:
    """Work that is run as it is the first time, recorded the second, and replayed from then on; where it can't be
    recorded, it is run as it is."""

    def __init__(self, work: Work, record: Record | None, say: Callable[[str], None]) -> None:
        self._work, self._record, self._say, self._met = work, record, say, False
        self._replay: Callable[[], object] | None = None
        self._result = torch.empty(0)

    def __call__(self) -> Tensor:
        """Its result, good until the next call."""
        if self._replay is None and self._record is not None and self._met:
            try:
                self._replay, self._result = self._record(self._work)
            except Exception as error:
                self._record = None
                self._say(f"updates aren't captured, so they are slower on this device: {first_line(error):.200}")
        self._met = True
        if self._replay is None:
            return self._work()
        self._replay()
        return self._result


@cache
def recorder_on(device: torch.device) -> Recorder | None:
    """What records on a device; None where nothing can."""
    return Recorder() if can_record(device) else None
