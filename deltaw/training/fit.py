"""The memory that a batch takes, estimated from smaller ones.

    memory = a + b · tokens + c · supervised tokens        of one batch, forward and backward

a is weights, factors, their gradients and moments, and the process itself; b activations kept for the backward; c rows
that meet the head. The three are fitted to the measured peaks of a few small batches, by least squares, so nothing is
assumed about the model. Rejected: a formula from the config (kernels, recomputation and the allocator decide).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from deltaw.base.batch import Batch
from deltaw.base.forward import Forward
from deltaw.data.example import Example
from deltaw.data.pack import pack
from deltaw.kernels.logprobs import IGNORE
from deltaw.training.learner import Learner
from deltaw.training.memory import window


@dataclass(frozen=True)
class Point:
    """A batch that was run forward and backward: its size, its peak in bytes, its seconds."""

    tokens: int
    supervised: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """memory = fixed + token · tokens + supervised · supervised tokens, in bytes."""

    fixed: float
    token: float
    supervised: float

    def bytes_at(self, tokens: float, supervised: float) -> int:
        """The peak of a batch of that size."""
        return round(self.fixed + self.token * tokens + self.supervised * supervised)


def fit_memory(points: Sequence[Point]) -> Fit:
    """Least squares over at least two sizes; with fewer than four points, or where noise would make it negative, a
    supervised token costs nothing more."""
    columns = np.array([(1, point.tokens, point.supervised) for point in points], float)
    peaks = np.array([point.peak for point in points], float)
    for terms in (3, 2)[len(points) < 4 :]:
        coefficients, *_ = np.linalg.lstsq(columns[:, :terms], peaks, rcond=None)
        if (coefficients >= 0).all():
            break
    fixed, token, supervised = [*np.maximum(coefficients, 0.0).tolist(), 0.0][:3]
    return Fit(fixed, token, supervised)


def one_pass(forward: Forward, learner: Learner, batch: Batch, *, accumulating: bool) -> None:
    """Forward and backward of a batch as in a step, with a step's gradients and moments in memory.

    It leaves nothing behind: no gradient, no random number drawn, no weight changed. `forward` is the model's and not
    one begun above frozen layers, which knows a run's rows: these may be cut.
    """
    parameters = learner.attached.parameters
    device = parameters[0].device
    fresh = [p for p in parameters if p not in learner.optimizer.state]
    # AdamW makes them in its first update. Written to, or on a CPU they would take no memory yet.
    moments = [torch.ones(2 * p.numel(), device=device) for p in fresh]
    with torch.random.fork_rng(enabled=bool(learner.attached.spec.dropout)), learner.dropping():
        try:
            if accumulating:  # a batch before this one left its gradient
                for parameter in parameters:
                    parameter.grad = torch.ones_like(parameter)
            loss, labels = forward.loss(batch.to(device))
            if labels:
                loss.backward()
        finally:
            learner.optimizer.zero_grad()
            del moments


def measure(
    forward: Forward,
    learner: Learner,
    examples: Sequence[Example],
    sizes: Sequence[int],
    *,
    accumulating: bool,
    seconds: float = math.inf,
    whole: Callable[[], Batch] | None = None,
) -> Iterator[Point]:
    """Passes over batches of `sizes` tokens cut out of `examples`, ascending, the largest once more with half of its
    labels. `whole`: the batch of all their tokens, where these aren't simply laid end to end. At least two; after
    those, any that would take more than `seconds` is left out, if time goes with the square of the tokens as
    attention's does. Raises whatever PyTorch raises where memory runs out."""

    def measured(batch: Batch) -> Point:
        with window(learner.attached.parameters[0].device) as seen:
            one_pass(forward, learner, batch, accumulating=accumulating)
        labels = int((batch.labels_T != IGNORE).sum())
        return Point(len(batch.tokens_T), labels, seen.peak, seen.seconds)

    points, largest = list[Point](), None
    tokens = sum(len(example.tokens) for example in examples)
    for size in sorted(set(sizes)):
        batch = whole() if whole and size >= tokens else pack(cut(examples, size))
        if len(points) > 1 and points[-1].seconds * (len(batch.tokens_T) / points[-1].tokens) ** 2 > seconds:
            break
        points.append(measured(largest := batch))
        yield points[-1]
    if largest is not None:
        yield measured(_half_trained(largest))


def cut(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The first `tokens` tokens of `examples`, at least two. The last one lacks its beginning: what is trained of a row
    is mostly at its end, and without it a pass would be none."""
    taken, room = list[Example](), max(2, tokens)
    for example in examples:
        if room <= 1:
            break
        size = min(room, len(example.tokens))
        taken.append(replace(example, tokens=example.tokens[-size:], loss_mask=example.loss_mask[-size:]))
        room -= size
    return taken


def _half_trained(batch: Batch) -> Batch:
    labels_T = batch.labels_T.clone()
    labels_T[::2] = IGNORE
    return batch.relabelled(labels_T)
