"""What a run makes small: from the log-probabilities of a batch's labels to one number.

An `Objective` is called with what the head says of the labels (kernels/logprobs.py) and with the batch, and answers with
a scalar to go backward from. It may be any differentiable function of the log-probabilities: the kernel's backward
takes whatever comes, and what it costs doesn't depend on the objective. It returns a sum over what it counts, never a
mean: who knows all the batches of a step divides once.

    SFT            −Σ_d w_d Σ_{t in d} logp_t              w_d = 1 unless the batch has weights
    by document    Σ_{t in d} logp_t = batch.by_document(logprobs.logp_K)       what preferences and rewards are about

A reference model is the base with the adapter off, its log-probabilities a `Forward.logprobs` without gradient, which
the objective that needs them is made with.

Letters: K labels that count.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from deltaw.base.batch import Batch
from deltaw.kernels.logprobs import Logprobs


class Objective(Protocol):
    """A number to make small."""

    def __call__(self, logprobs: Logprobs, batch: Batch) -> Tensor:
        """The scalar for a batch, differentiable: a sum over what it counts."""


@dataclass(frozen=True)
class SFT:
    """The cross-entropy in nats, summed over the tokens with a label, each document weighed as the batch says."""

    def __call__(self, logprobs: Logprobs, batch: Batch) -> Tensor:
        if not batch.weights:
            return logprobs.loss
        weights_D = logprobs.logp_K.new_tensor(batch.weights)
        return -(batch.by_document(logprobs.logp_K) * weights_D).sum()
