"""Cross-entropy of rows of logits, and its gradient in their place.

    cross_entropy_   loss = logsumexp(z) − z[label] and, in the place of the logits, ∂loss/∂logits

One program per row, in two passes over blocks of the vocabulary: running maximum and sum (Milakov & Gimelshein 2018),
then the gradient in place; at 262144 bf16 logits per row is 512 KiB, which the second pass should find in the L2 cache.

Letters: C rows of logits, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaw.kernels.triton.tanh import tanh
from deltaw.kernels.triton.views import power_of_two

VOCABULARY = 8192  # logits at a time


def cross_entropy_(z_CV: Tensor, labels_C: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """The losses in nats, [C] in float32; z, the head's raw product, becomes ∂(their sum)/∂z in its own dtype.

    The loss is taken of cap(scale · z). A label outside the vocabulary gives NaN.
    """
    if z_CV.stride(1) != 1:
        raise ValueError("the rows of z must be contiguous: it is overwritten")
    (C, V), labels = z_CV.shape, labels_C.contiguous()
    loss_C = torch.empty(C, dtype=torch.float32, device=z_CV.device)
    block = min(power_of_two(V), VOCABULARY)
    cap, warps = 1.0 if softcap is None else softcap, 16 if block == VOCABULARY else 4
    options = {"CAPPED": softcap is not None, "BLOCK": block, "num_warps": warps}
    with torch.cuda.device_of(z_CV):
        _cross_entropy[(C,)](z_CV, labels, loss_C, z_CV.stride(0), V, scale, cap, **options)
    return loss_C


@triton.jit
def _cross_entropy(
    z_at: tl.tensor,
    labels_at: tl.tensor,
    loss_at: tl.tensor,
    stride: tl.tensor,
    V: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    z_row = z_at + row * stride
    label = tl.load(labels_at + row)
    known = (label >= 0) & (label < V)
    at_label = scale * tl.load(z_row + label, mask=known, other=0.0).to(tl.float32)
    if CAPPED:
        at_label = cap * tanh(tl.div_rn(at_label, cap))[0]
    # Finite, so that a block of −∞ does not make ∞ − ∞.
    top = tl.full((), -3.0e38, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = scale * tl.load(z_row + col, mask=col < V, other=0.0).to(tl.float32)
        if CAPPED:
            z = cap * tanh(tl.div_rn(z, cap))[0]
        z = tl.where(col < V, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    loss = tl.log(total) + (top - at_label)  # large ones cancel before anything is rounded to their size
    tl.store(loss_at + row, tl.where(known, loss, float("nan")))
    share = tl.div_rn(1.0, total)
    # Every warp must have read the label's logit before any overwrites it.
    tl.debug_barrier()
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = scale * tl.load(z_row + col, mask=col < V, other=0.0).to(tl.float32)
        slope = scale
        if CAPPED:
            t, bend = tanh(tl.div_rn(z, cap))
            z = cap * t
            slope = scale * bend
        d = slope * (tl.exp(z - top) * share - tl.where(col == label, 1.0, 0.0))
        tl.store(z_row + col, d, mask=col < V)
