"""What a model says of rows that are measured, batch by batch: passes forward, without gradient.

On a GPU the pass is recorded once per evaluation and replayed for each batch (base/recorded.py): one size holds all the
batches that aren't larger than they are meant to be. While one batch is computed the host packs the next. What is
filled up behind a batch has no label, and rows without one stand behind all others in the answer, so the first K are
the batch's own.

A recording lasts as long as its evaluation: which adapter is on, how far it is scaled, what a layer has ready of its
factors are the host's to say, and may be otherwise in the next one. Rejected: keeping it for the run, held to a pass
of the model itself at the start of each evaluation; that costs half of what a recording costs, and a recording reads
addresses that only its maker knows to be good still.

A recorded pass must give what the pass itself gives, to the bit. Where that fails, or a pass can't be recorded (work
that waits for the device, memory that is short), the evaluation goes on without, and a line says so.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.base.batch import Batch
from deltaw.base.filled import Size, fill
from deltaw.base.forward import Forward
from deltaw.base.frozen import InParts
from deltaw.base.recorded import OfSize, Record, Recording, Work, recorder_on
from deltaw.data.examples import lengths_of, supervised_of
from deltaw.data.weighed import Weighed
from deltaw.errors import first_line
from deltaw.evaluation.batches import TOKENS_AT_ONCE, batches, groups
from deltaw.generate.cache import evaluating
from deltaw.kernels.logprobs import Logprobs

FEW = 4  # batches, for which a recording, which costs about two passes, doesn't pay

Say = Callable[[str], object]

_refused = WeakSet[nn.Module]()  # models whose passes couldn't be recorded: it isn't tried again


def unsaid(line: str) -> None:
    """A line that nobody reads."""


def scored_batches(
    forward: Forward,
    weighed: Weighed,
    units: Sequence[int] | None = None,
    *,
    say: Say = unsaid,
) -> Iterator[tuple[list[int], Batch, Logprobs]]:
    """(numbers of the examples, their batch, what the head says of its labels, on the batch's device) until all are
    through. `units`: as for `batches`; `say`: where a line goes that says why nothing can be recorded."""
    with passes(forward, forward.logprobs, weighed, units, say=say) as recorded:
        if not recorded.is_recorded:
            device = next(forward.model.parameters()).device
            for numbers, batch in batches(forward, weighed, units):
                batch = batch.to(device)
                with evaluating(forward.model):
                    scores = forward.scores(batch)
                yield numbers, batch, scores
            return
        before: tuple[list[int], Batch, _Coming] | None = None
        for numbers, batch in batches(forward, weighed, units):
            now = numbers, batch, _Coming(recorded(batch))
            if before is not None:
                yield before[0], before[1], before[2].scores
            before = now
        if before is not None:
            yield before[0], before[1], before[2].scores


@contextmanager
def passes(
    forward: Forward,
    ask: Callable[[Batch], Tensor],
    weighed: Weighed,
    units: Sequence[int] | None = None,
    *,
    at_once: int = TOKENS_AT_ONCE,
    say: Say = unsaid,
) -> Iterator["Passes"]:
    """The passes of an evaluation, whose recording is gone afterwards. `ask`: what is asked of a batch, [K, ...]: of
    its `rows_K`, where it has some, else of its labelled rows."""
    device = next(forward.model.parameters()).device
    record, size = recorder_on(device), None
    if record is not None and _recordable(forward):
        size = _size(weighed, groups(forward, weighed, units, at_once=at_once), at_once)
    recorded = Passes(forward, ask, device, size, record, say)
    try:
        yield recorded
    finally:
        recorded.release()


class Passes:
    """Passes over batches that are on a CPU. `size`: up to which they are filled; None where none is recorded."""

    def __init__(
        self,
        forward: Forward,
        ask: Callable[[Batch], Tensor],
        device: torch.device,
        size: Size | None,
        record: Record | None,
        say: Say,
    ) -> None:
        self._forward, self._ask, self._device = forward, ask, device
        self._size, self._record, self._say = size, record, say
        self._pass = None if size is None else OfSize(size, device, ask, record, at_once=True)

    @property
    def is_recorded(self) -> bool:
        """Whether there is a size to record."""
        return self._pass is not None

    def __call__(self, batch: Batch) -> Tensor:
        """[K, ...] on the device, for each label of the batch, in order."""
        with evaluating(self._forward.model):
            if self._pass is not None and self._size is not None and self._fits(batch):
                try:
                    return self._pass(fill(_bare(batch), self._size), self._proven)[: batch.supervised]
                except Exception as error:
                    self._refuse(error)
            return self._ask(batch.to(self._device))

    def release(self) -> None:
        """Give up what was recorded."""
        if self._pass is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # it may be running
        self._pass = None

    def _fits(self, batch: Batch) -> bool:
        """Whether it has room, and is of the kind that is filled up."""
        size = self._size
        if size is None or batch.updates or batch.retained or batch.documents.tree is not None:
            return False
        room = len(batch.tokens_T) <= size.tokens and batch.documents.longest <= size.longest
        return room and 0 < batch.supervised <= size.labels

    def _proven(self, work: Work) -> Recording:
        """The pass recorded, after it has shown that it gives what the pass gives."""
        assert self._record is not None
        truth = work()
        replay, place = self._record(work)
        replay()
        if not torch.equal(place.nan_to_num(), truth.nan_to_num()):
            off = float((place - truth).abs().max())
            raise RuntimeError(f"a recorded pass isn't the pass itself: it is off by {off:.1e}")
        return replay, place

    def _refuse(self, error: Exception) -> None:
        self.release()
        short = isinstance(error, torch.OutOfMemoryError)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if not short:  # which may be otherwise in the next one
            _refused.add(self._forward.model)
        why = "there isn't memory enough" if short else first_line(error)
        self._say(f"evaluations aren't captured, so they are slower on this device: {why:.200}")


class _Coming:
    """Log-probabilities of labels [K] on their way to a CPU."""

    def __init__(self, logp_K: Tensor) -> None:
        self._logp_K, self._event = logp_K.to("cpu", non_blocking=True), None
        if logp_K.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def scores(self) -> Logprobs:
        """As soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        return Logprobs(self._logp_K, -self._logp_K.sum())


def _recordable(forward: Forward) -> bool:
    """Whether a pass may be recorded, as far as that can be seen. The parts of a model that lies on several devices are
    put together by all processes or by none."""
    if not forward.packed or forward.prefix is not None or forward.model in _refused:
        return False
    return not any(isinstance(module, InParts) for module in forward.model.modules())


def _size(weighed: Weighed, groups: Sequence[Sequence[int]], at_once: int) -> Size | None:
    """That holds all batches of up to `at_once` tokens; None where they are few."""
    lengths, trained = lengths_of(weighed.examples), supervised_of(weighed.examples)
    fitting = [numbers for numbers in groups if lengths[numbers].sum() <= at_once]
    if len(fitting) <= FEW:
        return None
    counts = [(int(lengths[each].sum()), len(each), int(trained[each].sum())) for each in fitting]
    return Size.holding(counts, at_once, int(lengths[np.concatenate(fitting)].max()))


def _bare(batch: Batch) -> Batch:
    """What a pass has to know of it."""
    return replace(batch, origins=(), weights=(), parts=(), references=(), beside=None, rewarded=None)
