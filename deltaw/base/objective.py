"""The objective that a run minimises: from the log-probabilities of a batch's labels to one number.

An objective is called with what the head says of the labels (kernels/logprobs.py) and with the batch, and answers
with a scalar to go backward from. It may be any differentiable function of the log-probabilities: the kernel's backward
takes whatever comes, and what it costs doesn't depend on the objective. The answer is a sum over what it counts, never
a mean: whoever knows all the batches of a step divides once, by the sum of their `count`s.

    sft            −Σ_d w_d Σ_{t in d} logp_t                  w_d = 1 unless the batch has weights; counts labels
    by document    batch.by_document(logprobs.logp_K)          Σ_{t in d} logp_t, what preferences speak of
                                                               (preferences.py); they count pairs, or answers
    by token       batch.rewarded                              of answers that were sampled (rewarded.py)

An objective is a value: what it needs beside the batch is in its fields (a β). A reference model is the base with the
adapter off: what it says of each answer is computed once for the whole run and travels with the batch.

Letters: D documents, K labels that count.
"""

import abc
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from deltaw.base.batch import Batch
from deltaw.kernels.logprobs import Logprobs


class Objective(abc.ABC):
    """What a learner minimises. `counts`: what the loss is a mean over, in a word; `references`: whether it wants the
    reference's log-probability of each answer; `sums`: the names of its `figures`, and `largest` of those that don't
    add up, but of which the largest counts; `anchored`: whether it wants the answers `beside` a step's batches, too,
    before the passes of the step (`with_anchor`); `has_loss`: whether its value says how well a model does."""

    counts: ClassVar[str] = "token"
    references: ClassVar[bool] = False
    sums: ClassVar[tuple[str, ...]] = ()
    largest: ClassVar[tuple[str, ...]] = ()
    anchored: ClassVar[bool] = False
    has_loss: ClassVar[bool] = True

    @abc.abstractmethod
    def __call__(self, logprobs: Logprobs, batch: Batch) -> Tensor:
        """The sum over what it counts, to go backward from."""

    @abc.abstractmethod
    def count(self, batch: Batch) -> int:
        """What that sum is divided by, once per step, added up over the step's batches."""

    def figures(self, logprobs: Logprobs, batch: Batch) -> dict[str, float]:
        """What a step reports beside its loss; it adds up over batches. Nothing goes backward from it."""
        return {}

    def right(self, logprobs: Logprobs, batch: Batch) -> list[bool]:
        """Of each pair or answer that it counts, whether the model is on the right side; nothing where it weighs
        none."""
        return []

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What a record says of the sums of `figures` over its batches."""
        return {}

    def with_anchor(self, anchor: float) -> "Objective":
        """The same for one step, whose mismatched answers gave `anchor`."""
        return self


class Sft(Objective):
    """Supervised: the cross-entropy in nats, summed over the tokens with a label; each example counts what the batch
    says."""

    def __call__(self, logprobs: Logprobs, batch: Batch) -> Tensor:
        if not batch.weights and batch.documents.tree is None:
            return logprobs.loss
        logp_D = batch.by_document(logprobs.logp_K)
        return -(logp_D * logp_D.new_tensor(batch.weights) if batch.weights else logp_D).sum()

    def count(self, batch: Batch) -> int:
        return batch.supervised


sft = Sft()
