"""Passes and updates that are recorded once on a GPU and replayed: one launch, where the host made 150 per layer.

    batch  ->  filled up to a size (base/filled.py)  ->  copied into that size's places on the device
    a size's pass (forward, loss / tokens of the step, backward)   run as it is the first time, recorded the second
    clip, update                                                   likewise
    one wait per step: the losses of its batches and the gradient's norm, which decide whether it is applied

The gradients lie in one tensor, at addresses that stay: a pass adds to them, so several batches of a step and several
sizes need nothing else. What the host decides (a loss that isn't a number, a spike, the watchdog) it decides where it
always did, between the gradient and the update, from the same numbers: a captured run skips, stops and resumes as any.
Rejected: reading them a step later, with the update guarded on the device. It would save the wait, and every promise of
watch.py would need a second version of itself; while the device works on a step the host has nothing better to do.

Nothing is taken on trust. A pass that waits for the device couldn't be recorded, so the first one runs where waiting is
an error. A recorded pass must give the loss of the pass itself to the bit, and its gradient to the rounding of sums
whose order a GPU leaves open. Where anything fails the run goes on uncaptured, and a line says why: a step has changed
nothing until its update.

Without a GPU all of this runs as it is, except for recording: `Captured(..., record=None)`.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.base.batch import Batch
from deltaw.base.filled import Places, Size, fill
from deltaw.base.forward import Forward
from deltaw.training.learner import Learner

CLOSE = 1e-2  # of the gradient, by which two runs of one backward may differ: attention adds in any order
SIZES = 32  # recorded at most; batches of others run as they are

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]  # work -> (replay, its result's place)


@dataclass(frozen=True)
class Ran:
    """What a step's passes gave: each batch's loss in nats, the gradient's norm before it was clipped; and the update
    that it is for."""

    losses: list[float]
    norm: float
    update: Callable[[], object]


class Captured:
    """The passes and updates of one learner. `longest`: tokens of its longest document; `say`: where a line goes."""

    def __init__(
        self, forward: Forward, learner: Learner, longest: int, say: Callable[[str], None], record: Record | None
    ) -> None:
        self.forward, self.learner, self._longest, self._say, self._record = forward, learner, longest, say, record
        self._parameters = learner.attached.parameters
        device = self._parameters[0].device
        self._gradient = torch.zeros(sum(p.numel() for p in self._parameters), device=device)
        self._parts = [part.view_as(p) for part, p in zip(self._split(), self._parameters, strict=True)]
        self._supervised = torch.ones((), device=device)
        self._passes: dict[Size, _Pass] = {}
        self._clip, self._step = Recorded(self._clipped, record), Recorded(self._stepped, record)
        self.why_not = ""

    def run(self, batches: Sequence[Batch], supervised: int) -> Ran | None:
        """Forward and backward of a step with so many supervised tokens; the gradient, clipped, is where the optimiser
        looks for it. None where that can't be captured, and then nothing has happened."""
        if self.why_not:
            return None
        self._gradient.zero_()
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            parameter.grad = part
        self._supervised.fill_(supervised)
        try:
            with self.learner.dropping():
                numbered = [(n, batch) for n, batch in enumerate(batches) if batch.supervised]
                losses = {number: self._passed(number, batch) for number, batch in numbered}
            values = torch.stack([*losses.values(), self._clip()]).tolist()  # the one wait
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                self.why_not = "there isn't memory enough to record a pass"
            else:
                self.why_not = next(iter(str(error).splitlines()), type(error).__name__)
            self._say(f"steps aren't captured, so they are slower on this device: {self.why_not:.200}")
            self._passes.clear()
            self.learner.optimizer.zero_grad()
            return None
        by_number = dict(zip(losses, values, strict=False))
        return Ran([by_number.get(number, 0.0) for number in range(len(batches))], values[-1], self._step)

    def _passed(self, number: int, batch: Batch) -> Tensor:
        """The batch's loss on the device; its gradient is added."""
        size = Size.of(batch, self.learner.config.tokens_per_batch, self._longest)
        if size not in self._passes:
            record = self._record if len(self._passes) < SIZES else None
            self._passes[size] = _Pass(self, size, record)
        return self._passes[size](number, batch)

    def loss_of(self, batch: Batch) -> Tensor:
        """Forward and backward: the work of a pass."""
        loss, _ = self.forward.loss(batch)
        (loss / self._supervised).backward()
        return loss.detach()

    @contextmanager
    def apart(self) -> Iterator[Tensor]:
        """Inside, the gradient begins at 0 and is the pass's alone; afterwards what was there is added."""
        before = self._gradient.clone()
        self._gradient.zero_()
        yield self._gradient
        self._gradient.add_(before)

    def _clipped(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self._parameters, self.learner.config.clip)

    def _stepped(self) -> Tensor:
        self.learner.optimizer.step()
        return self._supervised

    def _split(self) -> Sequence[Tensor]:
        return self._gradient.split([p.numel() for p in self._parameters])


class _Pass:
    """The pass over batches of one size."""

    def __init__(self, captured: Captured, size: Size, record: Record | None) -> None:
        device = captured.learner.attached.parameters[0].device
        self._captured, self._places, self._record = captured, Places(size, device), record
        self._replay: Callable[[], object] | None = None
        self._loss = torch.zeros((), device=device)
        self._met = False

    def __call__(self, number: int, batch: Batch) -> Tensor:
        """The loss of the step's batch of that number, and its gradient added."""
        drawing = self._captured.learner.drawing
        filled = fill(batch, self._places.size)
        self._places.put(filled)
        blind = self._loss.is_cuda

        def work() -> Tensor:
            return self._captured.loss_of(self._places.batch(None if blind else filled.documents))

        if self._replay is None and self._record is not None and self._met:
            self._replay, self._loss = self._recorded(number, work)
        self._met = True
        with drawing(number):
            if self._replay is None:
                with _no_waiting(blind):
                    return work()
            self._replay()
            return self._loss.clone()

    def _recorded(self, number: int, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """The pass recorded, after it has shown that it does what the pass does."""
        drawing, record = self._captured.learner.drawing, self._record
        assert record is not None
        with self._captured.apart() as gradient:
            with drawing(number):
                loss, truth = work(), gradient.clone()
            gradient.zero_()
            with drawing(number):
                replay, place = record(work)
            with drawing(number):
                replay()
            off = float((gradient - truth).norm() / truth.norm().clamp_min(1e-30))
            if not (torch.equal(place, loss) and off <= CLOSE) and bool(loss.isfinite()):
                raise RuntimeError(f"a recorded pass isn't the pass: its gradient is off by {off:.1e}")
            gradient.zero_()
        return replay, place


class Recorded:
    """Work that is run as it is the first time, recorded the second, and replayed from then on."""

    def __init__(self, work: Callable[[], Tensor], record: Record | None) -> None:
        self._work, self._record, self._met = work, record, False
        self._replay: Callable[[], object] | None = None
        self._result = torch.empty(0)

    def __call__(self) -> Tensor:
        """Its result, good until the next call."""
        if self._replay is None and self._record is not None and self._met:
            self._replay, self._result = self._record(self._work)
        self._met = True
        if self._replay is None:
            return self._work()
        self._replay()
        return self._result


def captured_on(
    device: torch.device, forward: Forward, learner: Learner, longest: int, say: Callable[[str], None]
) -> Captured | None:
    """The captured steps of a run, where its device can record. A line says why it isn't captured on one that can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    why = "" if forward.packed else "its documents can't be packed"
    why = f"the output of its {forward.prefix.first} frozen layers is kept by document" if forward.prefix else why
    if why:
        say(f"steps aren't captured, so they are slower on this device: {why}")
        return None
    return Captured(forward, learner, longest, say, Recorder())


class Recorder:
    """Records CUDA graphs. They share memory: they never run at once, and only their results outlive a replay."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        gc.collect()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on (autograd's own, a progress display); this one does nothing that can't be recorded.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        self._pool = graph.pool()
        return graph.replay, result


@contextmanager
def _no_waiting(on: bool) -> Iterator[None]:
    """Inside, an operation that waits for the GPU is an error: it couldn't be recorded."""
    if not on:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
