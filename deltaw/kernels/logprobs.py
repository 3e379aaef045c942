"""Log-probabilities of labels under a frozen linear head, without holding the logits.

A batch's logits [T, V] are by far its largest tensor (2048 x 49152 in float32: 403 MB, and autograd keeps several
like it). Three facts make them unnecessary. Only rows with a label matter. A row's log-probability depends on that
row alone, so for *any* loss L

    z_k = cap(scale · (W h_k + bias)),   cap(z) = c · tanh(z / c),        logp_k = z_k[label_k] − logsumexp(z_k)
    ∂L/∂h_k = −∂L/∂logp_k · n_k,         n_k = scale · Wᵀ (cap'(z_k) ∘ (softmax(z_k) − onehot(label_k))) = −∂logp_k/∂h_k

And the head is frozen, so n_k [D] is all that a backward ever needs of the logits. The forward makes it in chunks of
rows, while a chunk of logits is at hand; the backward multiplies each row by the number that comes in, whether that
was known beforehand (cross-entropy: −1 for every token) or is the outcome of a whole objective (DPO, a policy
gradient). For cross-entropy it is the idea of Liger's and Apple's fused losses.

Rejected. Keeping logsumexp(z_k) and making the logits again in the backward, where ∂L/∂logp is known: it keeps h_k in
place of n_k, which is of the same size, and reads the head a third time. Two kernels, one for cross-entropy and one for
everything else: the same products in the same order. Rounding n_k · ∂L/∂logp_k once, from float32: a wide copy of
[K, D], against a number that is off by half a unit of the rows' own dtype.

The labelled rows are found by asking the labels, which on a GPU means waiting for it, and how many there are decides
the shapes of all that follows. A captured pass (base/recorded.py) can do neither: it brings a fixed number of
rows, `rows_K`, the labelled ones among them; the others have no log-probability (0) and get no gradient.

Sums and counts are returned, never a mean: whoever knows all the batches of a step divides once, which is what makes
gradient accumulation exact to the token.

Letters: T rows, D hidden size, V vocabulary, C rows of one chunk, B rows of one block, K rows with a label.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.device import on_gpu
from deltaw.kernels.weight import DenseWeight, Weight

IGNORE = -100  # the label of a row that is not trained, PyTorch's convention
# Logits in memory at a time: the head is read once per chunk, so a chunk of few rows is slow (measured on a CPU: half
# the rate at 64 rows of bfloat16, all of it from 512 on), and a long one is memory. A GPU's was not measured yet.
CHUNK_BYTES, GPU_CHUNK_BYTES = 32 << 20, 512 << 20
BLOCK_BYTES = 4 << 20  # logits widened at a time: as many as stay in a CPU's cache from one operation to the next


class Logprobs(NamedTuple):
    """What a head says of the labels of a batch, differentiable, in float32 or wider.

    logp_K: the log-probability of each label, in the order of their rows
    loss:   minus the sum of them, the cross-entropy in nats: added up as they are made
    """

    logp_K: Tensor
    loss: Tensor


def linear_logprobs(
    hidden_TD: Tensor,
    head: Weight,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    rows_K: Tensor | None = None,
) -> Logprobs:
    """The log-probabilities of the labels that aren't IGNORE. The head, a weight of [V, D], gets no gradient.

    `rows_K`: the rows to look at, each once, where they are known: the labelled ones and any others.
    """
    return Logprobs(*_LinearLogprobs.apply(hidden_TD, head, bias_V, labels_T, scale, softcap, rows_K))


def linear_cross_entropy(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, int]:
    """(sum of the losses in nats as a float32 scalar, count of rows with a label). The head gets no gradient."""
    head = DenseWeight(head_VD)
    logp_K, loss = linear_logprobs(hidden_TD, head, labels_T, bias_V=bias_V, scale=scale, softcap=softcap)
    return loss, len(logp_K)


def linear_logprobs_plain(
    hidden_TD: Tensor,
    head: Weight,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Logprobs:
    """The twin: all logits at once, PyTorch's own functions."""
    logits_TV = F.linear(hidden_TD, head.dense(), bias_V)
    return logprobs_of(capped(scale * logits_TV.to(wide_of(logits_TV)), softcap), labels_T)


def logprobs_of(logits_TV: Tensor, labels_T: Tensor, rows_K: Tensor | None = None) -> Logprobs:
    """The same of logits that are formed anyway."""
    if rows_K is not None:
        labels_K = labels_T[rows_K]
        logp_KV = logits_TV[rows_K].to(wide_of(logits_TV)).log_softmax(1)
        logp_K = logp_KV.gather(1, labels_K.clamp_min(0)[:, None]).squeeze(1).masked_fill(labels_K == IGNORE, 0.0)
        return Logprobs(logp_K, -logp_K.sum())
    rows_T = labels_T != IGNORE
    labels_K, logp_KV = labels_T[rows_T], logits_TV[rows_T].to(wide_of(logits_TV)).log_softmax(1)
    return Logprobs(logp_KV.gather(1, labels_K[:, None]).squeeze(1), F.nll_loss(logp_KV, labels_K, reduction="sum"))


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap · tanh(logits / softcap), or the logits themselves."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def wide_of(x: Tensor) -> torch.dtype:
    """What x is computed in: float64 stays float64, so that gradcheck sees the real derivative."""
    return torch.promote_types(x.dtype, torch.float32)


def cross_entropy_(
    z_CV: Tensor, labels_C: Tensor, scale: float, softcap: float | None, *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """(the losses [C], their sum). With `gradient` ∂loss/∂logits takes the place of the logits. In float32 or wider, a
    few rows at a time."""
    wide = wide_of(z_CV)
    losses: list[Tensor] = []
    total = torch.zeros((), dtype=wide, device=z_CV.device)
    rows = max(1, BLOCK_BYTES // (wide.itemsize * z_CV.shape[1]))
    for z_BV, labels_B in zip(z_CV.split(rows), labels_C.split(rows), strict=True):
        wide_BV, labels_B1 = z_BV.to(wide), labels_B.unsqueeze(1)
        wide_BV = capped(wide_BV * scale if scale != 1.0 else wide_BV, softcap)
        p_BV = torch.softmax(wide_BV, 1)
        # −ln p of the label, from the largest p: a small one may underflow
        top = wide_BV.amax(1, keepdim=True) - p_BV.amax(1, keepdim=True).log_()
        losses.append((top - wide_BV.gather(1, labels_B1)).squeeze(1))
        total += losses[-1].sum()
        if not gradient:
            continue
        p_BV.scatter_add_(1, labels_B1, p_BV.new_full(labels_B1.shape, -1.0))
        if softcap is not None:
            p_BV.mul_(1 - (wide_BV / softcap).square_())  # cap'(z) = 1 − tanh², of the capped value
        z_BV.copy_(p_BV.mul_(scale) if scale != 1.0 else p_BV)
    return torch.cat(losses), total


class Chunks:
    """The rows with a label, or those that are named, some at a time: where they are among them, their hidden rows,
    their labels, and which have none (None: all have one)."""

    def __init__(self, hidden_TD: Tensor, labels_T: Tensor, rows_K: Tensor | None, head: Weight) -> None:
        self.hidden_TD, self.labels_T = hidden_TD, labels_T
        self.all_labelled = rows_K is None
        self.rows_K = (labels_T != IGNORE).nonzero().squeeze(1) if rows_K is None else rows_K
        size = GPU_CHUNK_BYTES if hidden_TD.is_cuda else CHUNK_BYTES
        self.size = max(1, size // (head.dtype.itemsize * head.shape[0]))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        for start in range(0, len(self.rows_K), self.size):
            rows_C = self.rows_K[start : start + self.size]
            labels_C = self.labels_T[rows_C]
            without_C = None if self.all_labelled else labels_C == IGNORE
            if without_C is not None:
                labels_C = labels_C.masked_fill(without_C, 0)  # any that the vocabulary has
            yield slice(start, start + len(rows_C)), self.hidden_TD[rows_C], labels_C, without_C


def losses_(
    z_CV: Tensor, labels_C: Tensor, without_C: Tensor | None, scale: float, softcap: float | None, *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """(the losses of a chunk, their sum), by the kernel of its device; 0 of a row without a label. With `gradient`
    ∂loss/∂logits takes the place of the logits, where a row without a label has any numbers."""
    if on_gpu(z_CV):
        from deltaw.kernels.triton import cross_entropy_ as on_triton

        losses_C = on_triton(z_CV, labels_C, scale, softcap)
        total = losses_C.sum()
    else:
        losses_C, total = cross_entropy_(z_CV, labels_C, scale, softcap, gradient=gradient)
    if without_C is not None:
        total = losses_C.masked_fill_(without_C, 0).sum()
    return losses_C, total


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head: Weight,
        bias_V: Tensor | None,
        labels_T: Tensor,
        scale: float,
        softcap: float | None,
        rows_K: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        chunks = Chunks(hidden_TD, labels_T, rows_K, head)
        logp_K = hidden_TD.new_empty(len(chunks.rows_K), dtype=wide_of(hidden_TD))
        loss = logp_K.new_zeros(())
        n_KD = hidden_TD.new_empty(len(logp_K), hidden_TD.shape[1]) if ctx.needs_input_grad[0] else None
        for where, x_CD, labels_C, without_C in chunks:
            z_CV = head.matmul(x_CD)
            if bias_V is not None:
                z_CV.add_(bias_V)
            losses_C, total = losses_(z_CV, labels_C, without_C, scale, softcap, gradient=n_KD is not None)
            logp_K[where] = -losses_C
            loss += total
            if n_KD is not None:
                n_CD = n_KD[where]
                n_CD.copy_(head.matmul_t(z_CV))
                if without_C is not None:
                    n_CD.masked_fill_(without_C[:, None], 0)
            del z_CV  # before the next chunk's is made
        if n_KD is not None:
            ctx.save_for_backward(n_KD, chunks.rows_K)
            ctx.rows = len(hidden_TD)
        return logp_K, loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        n_KD, rows_K = ctx.saved_tensors
        grad_TD = n_KD.new_zeros(ctx.rows, n_KD.shape[1])
        grad_TD[rows_K] = n_KD * (grad - grad_K).to(n_KD.dtype).unsqueeze(1)  # loss is −Σ logp
        return grad_TD, None, None, None, None, None, None
