"""How far a head's predictions are from the base's, row by row, without holding the logits.

    z_r = cap(scale · (W h_r + bias)),   b_r the same of the row that the base has in its place
    KL_r = Σ_v p_v(b_r) · (ln p_v(b_r) − ln p_v(z_r))                     KL(base ‖ tuned), over the whole vocabulary
    ∂KL_r/∂h_r = n_r = scale · Wᵀ (cap'(z_r) ∘ (p(z_r) − p(b_r)))         the base's row gets none: it is what it is

This direction, because it is what a report measures (evaluation/forgetting.py), and because it weighs a word by what
the base thinks of it: what the base says with some probability must stay sayable. It is a cross-entropy with the base's
whole distribution in place of a label, so its gradient has the same shape and the same bounds as that of training. The
other direction, KL(tuned ‖ base), asks a tuned model only not to say what the base wouldn't, and lets it forget.

As with labels (logprobs.py) n_r [D] is all that a backward needs. It is made in chunks of rows while both chunks of
logits are at hand, and the backward multiplies it by the number that comes in.

What is kept of the base is its hidden row, D numbers, and not its logits: the head is frozen, so the product makes them
again, exactly. Rejected: the base's k largest logits, which are smaller only for k < D / 2 (a value and an index each),
and not exact: what lies outside of them is most of what a model forgets without being seen to.

Letters: R rows, D hidden size, V vocabulary, C rows of one chunk, B rows of one block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.logprobs import BLOCK_BYTES, CHUNK_BYTES, capped
from deltaw.kernels.weight import Weight

GPU_CHUNK_BYTES = 128 << 20  # of one side's logits; some six of them are at hand, in float32


def linear_divergence(
    hidden_RD: Tensor,
    base_RD: Tensor,
    head: Weight,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """KL(base ‖ tuned) of each row [R], in float32 or wider. Only `hidden_RD` gets a gradient."""
    divergence_R: Tensor = _LinearDivergence.apply(hidden_RD, base_RD.detach(), head, bias_V, scale, softcap)
    return divergence_R


def linear_divergence_plain(
    hidden_RD: Tensor,
    base_RD: Tensor,
    head: Weight,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The twin: all logits at once, PyTorch's own functions."""
    z_RV, b_RV = (
        capped(scale * F.linear(rows, head.dense(), bias_V).to(_wide(rows)), softcap) for rows in (hidden_RD, base_RD)
    )
    return divergence_of(z_RV, b_RV)


def divergence_of(logits_RV: Tensor, base_RV: Tensor) -> Tensor:
    """The same of logits that are formed anyway."""
    logp_RV = logits_RV.to(_wide(logits_RV)).log_softmax(1)
    base_RV = base_RV.detach().to(logp_RV.dtype).log_softmax(1)
    return (base_RV.exp() * (base_RV - logp_RV)).sum(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _divergence_(z_CV: Tensor, b_CV: Tensor, scale: float, softcap: float | None) -> Tensor:
    """[C] of logits before scale and cap; ∂KL/∂logits takes the place of `z_CV`. A few rows at a time, in float32 or
    wider."""
    wide = _wide(z_CV)
    rows = len(z_CV) if z_CV.is_cuda else max(1, BLOCK_BYTES // (wide.itemsize * z_CV.shape[1]))
    parts = []
    for z_BV, b_BV in zip(z_CV.split(rows), b_CV.split(rows), strict=True):
        (tuned_BV, logp_BV), (_, base_BV) = _logp(z_BV, scale, softcap), _logp(b_BV, scale, softcap)
        p_BV = base_BV.exp()
        parts.append(base_BV.sub_(logp_BV).mul_(p_BV).sum(1))
        gradient_BV = logp_BV.exp_().sub_(p_BV)
        if softcap is not None:
            gradient_BV.mul_(1 - (tuned_BV / softcap).square_())  # cap'(z) = 1 − tanh², of the capped value
        z_BV.copy_(gradient_BV.mul_(scale) if scale != 1.0 else gradient_BV)
    return torch.cat(parts)


def _logp(z_BV: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(the logits, scaled and capped; their log-probabilities)."""
    wide_BV = z_BV.to(_wide(z_BV))
    wide_BV = capped(wide_BV * scale if scale != 1.0 else wide_BV, softcap)
    return wide_BV, wide_BV.log_softmax(1)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        base_RD: Tensor,
        head: Weight,
        bias_V: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        n_RD = torch.empty_like(hidden_RD) if ctx.needs_input_grad[0] else None
        divergence_R = hidden_RD.new_empty(len(hidden_RD), dtype=_wide(hidden_RD))
        chunk = max(1, (GPU_CHUNK_BYTES if hidden_RD.is_cuda else CHUNK_BYTES) // (head.dtype.itemsize * head.shape[0]))
        for start in range(0, len(hidden_RD), chunk):
            rows = slice(start, start + chunk)
            z_CV, b_CV = (head.matmul(some_RD[rows], bias_V) for some_RD in (hidden_RD, base_RD))
            divergence_R[rows] = _divergence_(z_CV, b_CV, scale, softcap)
            del b_CV
            if n_RD is not None:
                n_RD[rows] = head.matmul_t(z_CV)
            del z_CV  # before the next chunk's are made
        if n_RD is not None:
            ctx.save_for_backward(n_RD)
        return divergence_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        (n_RD,) = ctx.saved_tensors
        return n_RD * grad_R.to(n_RD.dtype).unsqueeze(1), None, None, None, None, None
