"""Passes and updates that are recorded once on a GPU and replayed: one launch, where the host made 150 per layer.

    batch  ->  filled up to a size (base/filled.py)  ->  copied into that size's places on the device
    a size's pass (forward, loss / tokens of the step, backward)   run as it is the first time, recorded the second
    clip, update                                                   likewise
    one wait per step: the losses of its batches and the gradient's norm, which decide whether it is applied

The gradients lie at addresses that stay, and a pass adds to them, so several batches of a step and several sizes need
nothing else. They stay where the optimiser looks for them from step to step: putting some hundred of them there, taking
them away and setting each to 0 was half of what the host does between its wait and the next pass. What the host decides
(a loss that isn't a number, a spike, the watchdog) it decides where it always did, between the gradient and the update,
from the same numbers: a captured run skips, stops and resumes as any.
Rejected: reading them a step later, with the update guarded on the device. It would save the wait, and every promise of
watch.py would need a second version of itself; while the device works on a step the host has nothing better to do.

Nothing is taken on trust. A recorded pass must give the loss of the pass itself to the bit, and its gradient to the
rounding of sums whose order a GPU leaves open. Where anything fails (work that waits for the device can't be recorded)
the run goes on uncaptured, and a line says why: a step has changed nothing until its update. No graph of an earlier
pass may be alive while one is recorded (its gradients would be added on another stream): nothing here keeps one.

Without a GPU all of this runs as it is, except for recording: `Captured(..., record=None)`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, nn

from deltaw.base.batch import Batch
from deltaw.base.filled import Places, Size, fill
from deltaw.base.forward import Forward
from deltaw.base.objective import sft
from deltaw.base.recorded import OfSize, Recorded, Recording, Work, recorder_on
from deltaw.errors import first_line
from deltaw.kernels.graphs import Record, TooLarge, can_record
from deltaw.training.faster import UNLIKE, Faster, difference
from deltaw.training.learner import Learner
from deltaw.training.memory import release
from deltaw.training.stop import Lost
from deltaw.training.world import ALONE, World

CLOSE = 1e-2  # of the gradient, by which two runs of one backward may differ: attention adds in any order
SIZES = 32  # recorded at most; batches of others run as they are
SPREAD, FAR = 3, 0.1  # times what two runs of the pass itself differ by, where that is more; and at most


@dataclass(frozen=True)
class Ran:
    """What a step's passes gave: each batch's loss in nats, the gradient's norm before it was clipped; and the update
    that it is for."""

    losses: dict[int, float]  # by the number of the batch
    norm: float
    update: Callable[[], object]


class Captured:
    """The passes and updates of one learner. `longest`: tokens of its longest document; `say`: where a line goes;
    `following`: the batches of the next step; `folding`: whether passes take the form that a GPU takes sooner
    (faster.py); None: on a GPU."""

    def __init__(
        self,
        forward: Forward,
        learner: Learner,
        longest: int,
        say: Callable[[str], None],
        record: Record | None,
        following: Callable[[], Sequence[Batch]] = list,
        folding: bool | None = None,
    ) -> None:
        self._following = following
        self.forward, self.learner, self._longest, self._say, self._record = forward, learner, longest, say, record
        self._parameters = learner.attached.parameters
        device = self._parameters[0].device
        folding = device.type == "cuda" if folding is None else folding
        self.faster = Faster(learner.attached) if folding else None
        sums = {} if self.faster is None else self.faster.sums
        self.gradients = [sums[one] if one in sums else torch.zeros_like(one) for one in self._parameters]
        self._supervised = torch.ones((), device=device)
        self._passes: dict[Size, _Pass] = {}
        self._filled: list[tuple[Batch, Size, Batch]] = []  # of the step to come: (a batch, its size, filled up to it)
        works = self._zeroed, self._clipped, self._stepped
        self._zero, self._clip, self._step = (Recorded(work, record, say) for work in works)
        self._one: Size | None = None  # that all batches are filled up to
        self.why_not = ""

    def run(
        self, batches: Sequence[Batch], supervised: int, mine: Sequence[int] | None = None, world: World = ALONE
    ) -> Ran | None:
        """Forward and backward of a step with so many supervised tokens, of the batches of the numbers `mine` (all);
        the gradients of all processes are summed. The gradient, clipped, is where the optimiser looks for it. None
        where that can't be captured, and then nothing has happened."""
        if self.why_not:
            return None
        try:
            return self._ran(batches, supervised, mine, world)
        except Lost:
            raise
        except Exception as error:
            short = isinstance(error, torch.OutOfMemoryError)
            if not short or self._one is not None or len(self._passes) < 2 or world is not ALONE:
                self._give_up(error)
                return None
        # Only here is the error gone, and with it what its pass held.
        self._keep_one()
        return self.run(batches, supervised, mine)

    def _ran(self, batches: Sequence[Batch], supervised: int, mine: Sequence[int] | None, world: World) -> Ran:
        self._zero()
        if self._parameters[0].grad is not self.gradients[0]:  # at first, and where a step between wasn't captured
            for parameter, gradient in zip(self._parameters, self.gradients, strict=True):
                parameter.grad = gradient
        self._supervised.fill_(supervised)
        with self.learner.dropping():
            numbers_of_mine = range(len(batches)) if mine is None else mine
            numbered = [(n, batches[n]) for n in numbers_of_mine if batches[n].supervised]
            losses = {number: self._passed(number, batch) for number, batch in numbered}
        world.add(self.gradients, f"the gradients of step {self.learner.state.step + 1}")
        numbers = torch.stack([*losses.values(), self._clip()])
        self.prepare(self._following())
        values = numbers.tolist()  # the one wait
        return Ran(dict(zip(losses, values, strict=False)), values[-1], self._step)

    def _give_up(self, error: Exception) -> None:
        """Capture nothing from now on, and say why."""
        short = isinstance(error, torch.OutOfMemoryError)
        self.why_not = "there isn't memory enough to record a pass" if short else first_line(error)
        if short or isinstance(error, TooLarge):
            self.why_not += "; lower tokens_per_batch"
        self._say(f"steps aren't captured, so they are slower on this device: {self.why_not:.200}")
        self.release()

    @property
    def sizes(self) -> tuple[int, int]:
        """How many sizes of batches were met, and how many of their passes are recorded. A step that changes this is
        slower than those that come."""
        return len(self._passes), sum(one.is_recorded for one in self._passes.values())

    def _passed(self, number: int, batch: Batch) -> Tensor:
        """The batch's loss on the device; its gradient is added."""
        size = self._size_of(batch)
        if size not in self._passes:
            if not self._passes and self.faster is not None:
                self._show_faster(number, batch, size)
            if self._one is not None:
                self._forget()
            record = self._record if len(self._passes) < SIZES else None
            self._passes[size] = _Pass(self, size, record)
        return self._passes[size](number, batch)

    def _show_faster(self, number: int, batch: Batch, size: Size) -> None:
        """Go back to the plain form of passes where the faster one isn't the pass itself on this batch."""
        faster, filled, places = self.faster, self.filled(batch), Places(size, self._parameters[0].device)
        assert faster is not None
        places.put(filled)

        def work(form: Faster | None) -> None:
            with self.learner.drawing(number):
                self._loss_in(form, places.batch(filled.documents))

        with self.apart(), faster.noisy():
            mine, plain = (self.gradient_of(partial(work, form)) for form in (faster, None))
        if (off := faster.off(mine, plain)) <= UNLIKE:
            return
        faster.undo()
        self.faster = None
        self._say(f"passes keep their plain form, which is slower: another's gradient is off by {off:.1e} here")

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Fill up the batches of the step to come: what the host does while the device works."""
        sized = ((batch, self._size_of(batch)) for batch in batches if batch.supervised)
        self._filled = [(batch, size, fill(batch, size)) for batch, size in sized]

    def filled(self, batch: Batch) -> Batch:
        """A batch of the step, filled up."""
        now = self._size_of(batch)
        ready = (filled for raw, size, filled in self._filled if raw is batch and size == now)
        return next(ready, None) or fill(batch, now)

    def _size_of(self, batch: Batch) -> Size:
        size = Size.of(batch, self.learner.config.batch_tokens, self._longest)
        if self._one is None:
            return size.among(self._passes)
        self._one = self._one.with_(size)
        return self._one

    def _keep_one(self) -> None:
        """From now on one size for all batches. A size that is met runs as it is, beside what the recorded ones keep:
        where memory is short, that is room for two passes, and no more is ever wanted of one size."""
        self._one = reduce(Size.with_, self._passes)
        self._filled.clear()
        self._forget()
        self._say("all batches are filled up to one size: there isn't memory for passes of several")

    def _forget(self) -> None:
        """Give up what was recorded of passes, and its memory."""
        device = self._parameters[0].device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # it may be running
        self._passes.clear()
        release(device)

    def loss_of(self, batch: Batch) -> Tensor:
        """Forward and backward: the work of a pass."""
        return self._loss_in(self.faster, batch)

    def _loss_in(self, form: Faster | None, batch: Batch) -> Tensor:
        """The same in that form; None: the plain one."""
        with nullcontext() if form is None else form.on():
            loss, _ = self.forward.loss(batch)
            (loss if self.learner.undivided else loss / self._supervised).backward()
        return loss.detach()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, the gradients are for trying; afterwards they are what they were."""
        before = [gradient.clone() for gradient in self.gradients]
        yield
        torch._foreach_copy_(self.gradients, before)

    def gradient_of(self, work: Callable[[], object]) -> list[Tensor]:
        """What `work` adds to gradients of 0, which stay where they are."""
        torch._foreach_zero_(self.gradients)
        work()
        return [gradient.clone() for gradient in self.gradients]

    def release(self) -> None:
        """Give up what was recorded, and its memory."""
        self._forget()
        works = self._zeroed, self._clipped, self._stepped
        self._zero, self._clip, self._step = (Recorded(work, None, self._say) for work in works)
        self.learner.optimizer.zero_grad()
        if self.faster is not None:
            self.faster.undo()
            release(self._parameters[0].device)

    def _zeroed(self) -> Tensor:
        torch._foreach_zero_(self.gradients)
        return self._supervised

    def _clipped(self) -> Tensor:
        if self.learner.undivided:
            torch._foreach_div_(self.gradients, self._supervised)
        return nn.utils.clip_grad_norm_(self._parameters, self.learner.config.clip)

    def _stepped(self) -> Tensor:
        self.learner.optimizer.step()
        return self._supervised


class _Pass:
    """The pass over batches of one size."""

    def __init__(self, captured: Captured, size: Size, record: Record | None) -> None:
        device = captured.learner.attached.parameters[0].device
        self._captured, self._record = captured, record
        self._pass = OfSize(size, device, captured.loss_of, record)

    @property
    def is_recorded(self) -> bool:
        return self._pass.is_recorded

    def __call__(self, number: int, batch: Batch) -> Tensor:
        """The loss of the step's batch of that number, and its gradient added."""
        drawing = partial(self._captured.learner.drawing, number)
        return self._pass(self._captured.filled(batch), partial(self._recorded, number), drawing)

    def _recorded(self, number: int, work: Work) -> Recording:
        """The pass recorded, after it has shown that it does what the pass does."""
        drawing, record = self._captured.learner.drawing, self._record
        assert record is not None
        losses: list[Tensor] = []
        with self._captured.apart():
            with drawing(number):
                truth = self._captured.gradient_of(lambda: losses.append(work()))
            with drawing(number):
                # Deep models hand on what two runs of one pass differ by.
                may = min(FAR, max(CLOSE, SPREAD * difference(self._captured.gradient_of(work), truth)))
            with drawing(number):
                replay, place = record(work)
            with drawing(number):
                replayed = self._captured.gradient_of(replay)
            off = difference(replayed, truth)
            if bool(losses[0].isfinite()) and not (torch.equal(place, losses[0]) and off <= may):
                raise RuntimeError(f"a recorded pass isn't the pass itself: its gradient is off by {off:.1e}")
        return replay, place


def captured_on(
    device: torch.device,
    forward: Forward,
    learner: Learner,
    longest: int,
    say: Callable[[str], None],
    following: Callable[[], Sequence[Batch]],
) -> Captured | None:
    """The captured steps of a run, where its device can record; `following` packs the batches of the next step. A line
    says why a run isn't captured on a device that can."""
    if not can_record(device):
        return None
    why = "" if forward.packed else "its documents can't be packed"
    if learner.objective is not sft:
        why = "its objective sums by answer, of which every batch has other ones"
    why = f"the output of its {forward.prefix.first} frozen layers is kept by document" if forward.prefix else why
    why = "train.retain asks the base on the way" if learner.config.retain is not None else why
    if any(layer.home(path) != path for path, layer in learner.attached.layers.items()):
        why = "which experts its rows go to is read on the way"
    if forward.recompute is not None and forward.recompute.offload:
        why = "its layers' inputs are moved to the machine's memory and back"
    elif forward.recompute is not None and forward.recompute.draws:
        why = "layers that are recomputed must draw the same dropout again"
    if why:
        say(f"steps aren't captured, so they are slower on this device: {why}")
        return None
    return Captured(forward, learner, longest, say, recorder_on(device), following)
