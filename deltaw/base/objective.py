"""The objective that a run minimises: from the log-probabilities of a batch's labels to one number.

An objective is called with what the head says of the labels (kernels/logprobs.py) and with the batch, and answers
with a scalar to go backward from. It may be any differentiable function of the log-probabilities: the kernel's backward
takes whatever comes, and what it costs doesn't depend on the objective. The answer is a sum over what it counts, never
a mean: whoever knows all the batches of a step divides once.

    sft            −Σ_d w_d Σ_{t in d} logp_t                  w_d = 1 unless the batch has weights
    by document    batch.by_document(logprobs.logp_K)          Σ_{t in d} logp_t, what preferences and rewards speak of

One that has numbers of its own (a β, the log-probabilities of a reference) is a value with `__call__`. A reference
model is the base with the adapter off: `Forward.logprobs` inside `attached.disabled()`, without gradient.

Letters: D documents, K labels that count.
"""

from collections.abc import Callable

from torch import Tensor

from deltaw.base.batch import Batch
from deltaw.kernels.logprobs import Logprobs

Objective = Callable[[Logprobs, Batch], Tensor]


def sft(logprobs: Logprobs, batch: Batch) -> Tensor:
    """The cross-entropy in nats, summed over the tokens with a label; each example counts what the batch says."""
    if not batch.weights and batch.documents.tree is None:
        return logprobs.loss
    logp_D = batch.by_document(logprobs.logp_K)
    return -(logp_D * logp_D.new_tensor(batch.weights) if batch.weights else logp_D).sum()
