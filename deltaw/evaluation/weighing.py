"""Held-out answers, weighed: the objective's loss, and what it reports, over all of them.

Both answers of a pair are in one batch. Sums are added up over batches and divided once, so nothing depends on how rows
are batched (but for rounding). KTO's anchor is that of all the rows.

What the reference alone decides says nothing of the model that is the reference: of that, margin, accuracy, change and
divergence are left out, and how often the chosen answer is the likelier one by token is what there is to improve upon.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from deltaw.base.forward import Forward
from deltaw.base.objective import Objective
from deltaw.data.example import Example
from deltaw.data.loader import Units, fill
from deltaw.data.pack import pack
from deltaw.data.weighed import Weighed, mismatched
from deltaw.evaluation.held_out import TOKENS_AT_ONCE
from deltaw.generate.cache import evaluating
from deltaw.show.progress import Progress, unseen

TRIVIAL = ("margin", "accuracy", "chosen_change", "kl", "anchor")  # of the reference itself


@dataclass
class Sums:
    """What is added up over batches: the loss, what it counts, and the objective's figures."""

    loss: float = 0.0
    count: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> list[float]:
        return [self.loss, float(self.count), *self.figures.values()]


def weighed_sums(
    forward: Forward,
    weighed: Weighed,
    objective: Objective,
    units: Sequence[int] | None = None,
    *,
    progress: Progress = unseen,
) -> Sums:
    """Of all units of `weighed`, or of these."""
    device, every = next(forward.model.parameters()).device, Units(weighed.examples)
    total, done = Sums(figures=dict.fromkeys(objective.sums, 0.0)), 0
    numbers = range(len(every)) if units is None else units
    with evaluating(forward.model):
        for group in batches_of(every.lengths, numbers):
            batch = weighed.packed(every.examples_of(group)).to(device)
            logprobs = forward.scores(batch)
            total.loss += float(objective(logprobs, batch))
            total.count += objective.count(batch)
            for name, value in objective.figures(logprobs, batch).items():
                total.figures[name] += value
            done += len(group)
            progress(done)
    return total


def anchor_of(forward: Forward, weighed: Weighed) -> float:
    """The mean over all mismatched answers of how much likelier they are than under the reference."""
    assert weighed.beside is not None
    examples = [mismatched(weighed.examples, number) for number in range(len(weighed.examples))]
    return float((summed_logprobs(forward, examples) - weighed.beside).mean())


def summed_logprobs(forward: Forward, examples: Sequence[Example], *, progress: Progress = unseen) -> np.ndarray:
    """float64: the summed log-probability of each example's labels."""
    device, sums, done = next(forward.model.parameters()).device, np.zeros(len(examples)), 0
    lengths = np.array([len(example.tokens) for example in examples], np.int64)
    with evaluating(forward.model):
        for group in batches_of(lengths, range(len(examples))):
            batch = pack([examples[number] for number in group]).to(device)
            sums[group] = batch.by_document(forward.logprobs(batch)).to("cpu", torch.float64).numpy()
            done += len(group)
            progress(done)
    return sums


def batches_of(lengths: np.ndarray, numbers: Sequence[int]) -> Iterator[list[int]]:
    """Those of like length together, at most TOKENS_AT_ONCE tokens per batch."""
    order = np.asarray(numbers, np.int64)[np.argsort(lengths[list(numbers)], kind="stable")]
    yield from fill(order, lengths, TOKENS_AT_ONCE)


def figures_of(sums: Sums, objective: Objective, *, is_reference: bool = False) -> dict[str, float]:
    """What a record says of them. `is_reference`: the model is the one that the objective compares with."""
    means = objective.means(sums.figures)
    return {name: value for name, value in means.items() if not (is_reference and name in TRIVIAL)}
