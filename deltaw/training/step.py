"""One optimiser step of a run's learners, from batches to records.

A learner's loss is the sum over its documents of the step, divided once by its own supervised tokens: so gradient
accumulation is exact to the token, and other learners' documents in a batch change nothing. In float16 it is the
gradient that is divided, not the loss: below 2⁻²⁴ that type has nothing, and on the demo's rows (SmolLM2-135M) the
gradient of a mean over 3,770 tokens was off by 4.4 %, over 37,700 by 28 %, and that of the sum by 0.2 % (bfloat16's by
1.8 %, whichever is divided: it has float32's range, and so the loss is divided as ever). A step is applied only if
its loss and its gradient are finite (watch.py). It depends on the state before it and on nothing else, so
stopping anywhere and resuming gives the same bits (on a CPU).

Dropout is drawn afresh for each batch, from a seed that is the first eight bytes of SHA-256 over "seed step batch" (in
decimal, steps and batches from 0). PyTorch's dropout takes no generator of its own, so its global one is borrowed for
the length of a batch and put back as it was. Rejected: Python's hash, which is a detail of the interpreter.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from deltaw.base.batch import Batch
from deltaw.base.forward import Forward
from deltaw.data.loader import LoaderState
from deltaw.training.learner import Learner
from deltaw.training.watch import Unfit, check_loss


def step(
    forward: Forward, learners: Sequence[Learner], batches: Sequence[Batch], position: LoaderState
) -> list[dict[str, Any]]:
    """A record for each learner: its update, or why there was none. Its documents are those that take its adapter;
    where batches don't say whose they are, there is one learner.

    `position`: where the data stands afterwards. Raises TooManySkips where a learner may leave out no step more, with
    its state as it was; RunError where its updates have taught it nothing; ValueError for documents of nobody here.
    """
    _check_owners(learners, batches)
    began, device = time.monotonic(), learners[0].attached.parameters[0].device
    shares = [_Share(learner, batches) for learner in learners]

    # 1. Forward and backward, batch by batch. Each learner's loss counts by its own tokens; the gradients add up.
    with ExitStack() as dropout:
        for learner in learners:
            dropout.enter_context(learner.dropping())
        for number in range(len(batches)):
            fit = [share for share in shares if not share.unfit]
            if not fit:
                break
            with drawn_from(learners[0], number):
                losses = _losses(forward, batches[number].to(device), [share.learner for share in fit])
                means = [share.mean(loss, number) for share, loss in zip(fit, losses, strict=True)]
                if counted := [mean for mean in means if mean is not None]:
                    sum(counted[1:], counted[0]).backward()

    records = []
    for share in shares:
        learner, state = share.learner, share.learner.state
        record: dict[str, Any] = {"step": state.step + 1}
        try:
            # 2. A loss that isn't a number, or is a spike, isn't applied; nor is such a gradient.
            if share.unfit:
                raise share.unfit
            # 3. Clip.
            if share.undivided:
                learner.divide(share.supervised)
            norm = learner.clip()
            if not math.isfinite(norm):
                raise Unfit("the gradient is NaN or infinite", share.rows, not_finite=True)
            check_loss(share.loss, share.rows, state, learner.config)
            # 4. The rate of this step, and the update.
            rate = learner.update(share.loss, share.batches)
            record |= {"loss": share.loss, "lr": rate, "grad_norm": norm}
        except Unfit as unfit:
            learner.skip(unfit)
            record |= {"skipped": unfit.what, "rows": unfit.rows}
        finally:
            learner.optimizer.zero_grad()
        # 5. Count, and write down.
        state.step += 1
        state.epoch, state.step_in_epoch = position.epoch, position.step
        state.tokens += share.tokens
        state.supervised_tokens += share.supervised
        state.seconds += time.monotonic() - began
        figures = {"tokens": state.tokens, "supervised_tokens": state.supervised_tokens}
        records.append({**record, **figures, "seconds": round(state.seconds, 3)})
    return records


def _check_owners(learners: Sequence[Learner], batches: Sequence[Batch]) -> None:
    """Raise ValueError where a document has no learner here, or could have two."""
    numbers, first = {learner.attached.number for learner in learners}, learners[0].attached.carried.first
    unknown = {update for batch in batches for update in batch.updates or (first,)} - numbers
    if unknown:
        raise ValueError(f"documents take update {min(unknown)}, and the learners are of {sorted(numbers)}")
    if len(learners) > 1 and not all(batch.updates for batch in batches):
        raise ValueError(f"{len(learners)} learners, and the batch doesn't say which documents belong to which")


class _Share:
    """One learner's part of a step: its documents, its loss in nats per token, and why it can't be an update."""

    def __init__(self, learner: Learner, batches: Sequence[Batch]) -> None:
        self.learner, number = learner, learner.attached.number
        self.batches = [batch.labelled_for(number) for batch in batches]
        self.rows = [origin for batch in self.batches for origin in batch.origins]
        self.tokens = sum(batch.tokens_of(number) for batch in batches)
        self.supervised = sum(batch.supervised for batch in self.batches)
        self._sum = 0.0
        self.undivided = learner.config.dtype == "float16"  # whether the sum of the losses goes backward, not the mean
        self.unfit = None if self.supervised else Unfit("none of its tokens is trained", self.rows)

    @property
    def loss(self) -> float:
        return self._sum / self.supervised

    def mean(self, loss: Tensor, number: int) -> Tensor | None:
        """What a batch's loss adds to the step's; None where it adds nothing to learn from."""
        batch, value = self.batches[number], float(loss.detach())
        if not math.isfinite(value):
            what = f"the loss of batch {number + 1} of {len(self.batches)} is NaN or infinite"
            self.unfit = Unfit(what, batch.origins, not_finite=True)
            return None
        self._sum += value
        return (loss if self.undivided else loss / self.supervised) if batch.supervised else None


def _losses(forward: Forward, batch: Batch, learners: Sequence[Learner]) -> Sequence[Tensor]:
    """The sum over each learner's documents, from one pass."""
    if not batch.updates:
        (_,) = learners
        return [forward.loss(batch)[0]]
    loss_D = -batch.by_document(forward.logprobs(batch))
    if batch.weights:
        loss_D = loss_D * loss_D.new_tensor(batch.weights)
    update_D = torch.tensor(batch.updates, device=loss_D.device)
    return [loss_D[update_D == learner.attached.number].sum() for learner in learners]


@contextmanager
def drawn_from(learner: Learner, batch: int) -> Iterator[None]:
    """Inside, what is random depends on the run's seed, the step and the batch's number alone."""
    if not learner.attached.spec.dropout:
        yield
        return
    words = f"{learner.config.seed} {learner.state.step} {batch}".encode()
    device = learner.attached.parameters[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:8], "big"))
        yield
