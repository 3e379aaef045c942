"""Linear head + cross-entropy without holding the logits.

A batch's logits [T, V] are by far its largest tensor (2048 x 49152 in float32: 403 MB, and autograd keeps several
like it). Two facts make them unnecessary: only rows with a label matter, and since the head is frozen the gradient
with respect to the hidden rows can be formed while a chunk of logits is at hand:

    L = Σ_t  logsumexp(z_t) − z_t[label_t],     z_t = cap(scale · (W h_t + bias)),     cap(z) = c · tanh(z / c)
    ∂L/∂z_t = softmax(z_t) − onehot(label_t)        ∂L/∂h_t = scale · cap'(z) ∂L/∂z_t W

So the forward makes both, in chunks of rows, and the backward is one multiplication by the incoming scalar
(the idea of Liger's and Apple's fused losses). Sums and counts are returned, never a mean: who knows all the
batches of a step divides once, which is what makes gradient accumulation exact to the token.

Letters: T rows, D hidden size, V vocabulary, C rows of one chunk, B rows of one block, K rows with a label.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.device import on_gpu

IGNORE = -100  # the label of a row that is not trained, PyTorch's convention
# Logits held at a time: the head is read once a chunk, so a chunk of few rows is slow (measured on a CPU: half the rate
# at 64 rows of bfloat16, all of it from 512 on), and a long one is memory. A GPU's was not measured yet.
CHUNK_BYTES, GPU_CHUNK_BYTES = 32 << 20, 512 << 20
BLOCK_BYTES = 4 << 20  # logits made wide at a time: what stays in a CPU's cache between one operation and the next


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
    rows_K = (labels_T != IGNORE).nonzero().squeeze(1)
    loss: Tensor = _LinearCrossEntropy.apply(hidden_TD, head_VD, bias_V, labels_T, rows_K, scale, softcap)
    return loss, len(rows_K)


def linear_cross_entropy_plain(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, int]:
    """The twin: all logits at once, PyTorch's own cross-entropy."""
    logits_TV = _cap(scale * F.linear(hidden_TD, head_VD, bias_V).float(), softcap)
    loss = F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE, reduction="sum")
    return loss, int((labels_T != IGNORE).sum())


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _cross_entropy_(z_CV: Tensor, labels_C: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The sum of the losses; ∂loss/∂logits takes the place of the logits. In float32 or wider, a few rows at a time."""
    wide = torch.promote_types(z_CV.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=z_CV.device)
    rows = max(1, BLOCK_BYTES // (wide.itemsize * z_CV.shape[1]))
    for z_BV, labels_B in zip(z_CV.split(rows), labels_C.split(rows), strict=True):
        wide_BV, labels_B1 = z_BV.to(wide), labels_B.unsqueeze(1)
        wide_BV = _cap(wide_BV * scale if scale != 1.0 else wide_BV, softcap)
        p_BV = torch.softmax(wide_BV, 1)
        # −ln p of the label, from the largest p: a small one may underflow
        top = wide_BV.amax(1, keepdim=True) - p_BV.amax(1, keepdim=True).log_()
        loss += (top - wide_BV.gather(1, labels_B1)).sum()
        p_BV.scatter_add_(1, labels_B1, p_BV.new_full(labels_B1.shape, -1.0))
        if softcap is not None:
            p_BV.mul_(1 - (wide_BV / softcap).square_())  # cap'(z) = 1 − tanh², of the capped value
        z_BV.copy_(p_BV.mul_(scale) if scale != 1.0 else p_BV)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        rows_K: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        wants_grad = ctx.needs_input_grad[0]
        # float64 inputs stay float64, so that gradcheck sees the real derivative.
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_TD.device)
        grad_KD = hidden_TD.new_empty(len(rows_K), hidden_TD.shape[1]) if wants_grad else None
        held = GPU_CHUNK_BYTES if hidden_TD.is_cuda else CHUNK_BYTES
        chunk = min(len(rows_K), max(1, held // (head_VD.itemsize * head_VD.shape[0])))
        held_CV = hidden_TD.new_empty(chunk, head_VD.shape[0])  # one block for all chunks
        for start in range(0, len(rows_K), chunk or 1):
            rows_C = rows_K[start : start + chunk]
            z_CV = torch.mm(hidden_TD[rows_C], head_VD.T, out=held_CV[: len(rows_C)])
            if bias_V is not None:
                z_CV.add_(bias_V)
            if on_gpu(z_CV):
                from deltaw.kernels.triton import cross_entropy_

                loss += cross_entropy_(z_CV, labels_T[rows_C], scale, softcap).sum()
            else:
                loss += _cross_entropy_(z_CV, labels_T[rows_C], scale, softcap)
            if grad_KD is not None:
                torch.mm(z_CV, head_VD, out=grad_KD[start : start + chunk])
        if grad_KD is not None:
            ctx.save_for_backward(grad_KD, rows_K)
            ctx.rows = len(hidden_TD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_KD, rows_K = ctx.saved_tensors
        grad_TD = grad_KD.new_zeros(ctx.rows, grad_KD.shape[1])
        grad_TD[rows_K] = grad_KD * grad.to(grad_KD.dtype)
        return grad_TD, None, None, None, None, None, None
