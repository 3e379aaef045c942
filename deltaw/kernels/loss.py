"""Linear head + cross-entropy without holding the logits.

A batch's logits [T, V] are by far its largest tensor (2048 x 49152 in float32: 403 MB, and autograd keeps several
like it). Two facts make them unnecessary: only rows with a label matter, and since the head is frozen the gradient
with respect to the hidden rows can be formed while a chunk of logits is at hand:

    L = Σ_t  logsumexp(z_t) − z_t[label_t],     z_t = cap(scale · (W h_t + bias)),     cap(z) = c · tanh(z / c)
    ∂L/∂z_t = softmax(z_t) − onehot(label_t)        ∂L/∂h_t = scale · cap'(z) ∂L/∂z_t W

So the forward makes both, in chunks of rows, and the backward is one multiplication by the incoming scalar
(the idea of Liger's and Apple's fused losses). Sums and counts are returned, never a mean: who knows all the
batches of a step divides once, which is what makes gradient accumulation exact to the token.

Letters: T rows, D hidden size, V vocabulary, C rows of one chunk, K rows with a label.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.device import on_gpu

IGNORE = -100  # the label of a row that is not trained, PyTorch's convention
# Logits held at a time. On a CPU 8 to 128 MiB were measured, and 32 is fastest; a GPU reads the head once a chunk,
# which a few dozen rows are not worth (not measured yet).
CHUNK_BYTES, GPU_CHUNK_BYTES = 32 << 20, 512 << 20


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


def _cross_entropy_(z_CV: Tensor, labels_C1: Tensor, scale: float, softcap: float | None, wants_grad: bool) -> Tensor:
    """The sum of the losses; ∂loss/∂logits takes the place of the logits."""
    if scale != 1.0:
        z_CV.mul_(scale)
    if softcap is not None:
        z_CV.div_(softcap).tanh_().mul_(softcap)
    # cap'(z) = 1 − tanh² = 1 − (z / c)² of the capped value, taken before z is overwritten
    slope_CV = None if softcap is None or not wants_grad else 1 - (z_CV / softcap) ** 2
    label_C1, top_C1 = z_CV.gather(1, labels_C1), z_CV.amax(1, keepdim=True)
    # In place, since z is the one large tensor: logsumexp() would pass over copies of it
    e_CV = z_CV.sub_(top_C1).exp_()
    sum_C1 = e_CV.sum(1, keepdim=True)
    loss = (sum_C1.log() + top_C1 - label_C1).sum()
    if wants_grad:
        e_CV.div_(sum_C1)
        e_CV.scatter_add_(1, labels_C1, torch.full_like(sum_C1, -1.0))
        if slope_CV is not None:
            e_CV.mul_(slope_CV)
        if scale != 1.0:
            e_CV.mul_(scale)
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
        chunk = max(1, held // (4 * head_VD.shape[0]))
        for start in range(0, len(rows_K), chunk):
            rows_C = rows_K[start : start + chunk]
            labels_C1 = labels_T[rows_C].unsqueeze(1)
            z_CV = F.linear(hidden_TD[rows_C], head_VD, bias_V)
            if on_gpu(z_CV):
                from deltaw.kernels.triton import cross_entropy_

                loss += cross_entropy_(z_CV, labels_C1.squeeze(1), scale, softcap).sum()
            else:
                z_CV = z_CV.to(wide)
                loss += _cross_entropy_(z_CV, labels_C1, scale, softcap, wants_grad)
            if grad_KD is None:
                continue
            torch.mm(z_CV.to(head_VD.dtype), head_VD, out=grad_KD[start : start + chunk])
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
