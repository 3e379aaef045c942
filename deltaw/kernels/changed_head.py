"""Log-probabilities of labels under a head that trains, without holding the logits or a gradient of the head's size.

What a head differs by from its frozen weight W [V, D] is a `HeadChange`:

    rows         z[index] = x rowsᵀ          in the place of W's rows, or behind its last one
    factors      z = W x + s (x Aᵀ) Bᵀ
    whole        z = x W'ᵀ                   W isn't read

The forward is that of a frozen head (logprobs.py): dz = ∂L/∂z of a chunk of rows, then n = −∂logp/∂x from it. What the
change's own tensors get is a sum over all rows, each times the number g that comes in only with the backward:

    ∂L/∂rows = dz[:, index]ᵀ (g ∘ x)      of dz a few columns are enough, and they are kept
    ∂L/∂B = s (g ∘ dz)ᵀ (x Aᵀ)            all columns: dz is made again in the backward, a chunk at a time
    ∂L/∂A = s ((g ∘ dz) B)ᵀ x
    ∂L/∂W' = (g ∘ dz)ᵀ x

So trained tokens cost K columns more than a frozen head and no second look at it; the others read the head once more.
The gradients are added up in float32.

Letters: T rows, D hidden size, V words, C rows of a chunk, K rows with a label, I trained rows of the head, R rank.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.logprobs import Chunks, Logprobs, losses_, wide_of
from deltaw.kernels.lora import Factors
from deltaw.kernels.weight import Weight


class HeadChange(abc.ABC):
    """What a head's logits are, beside those of its frozen weight."""

    keeps: ClassVar[bool] = False  # whether a few columns of dz are all that its gradients need

    @property
    @abc.abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What trains, float32."""

    @abc.abstractmethod
    def logits(self, x_CD: Tensor, head: Weight, bias_V: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        """[C, V], which may be written to, of these `tensors`. Differentiable in them, and not in x."""

    @abc.abstractmethod
    def back(self, dz_CV: Tensor, head: Weight, tensors: tuple[Tensor, ...]) -> Tensor:
        """∂/∂x of Σ dz ∘ logits, [C, D]. dz may be written to."""

    @abc.abstractmethod
    def gradients(self, part_CV: Tensor, x_CD: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """∂/∂tensors of the same, float32, from dz or from the columns that are kept."""

    def part(self, dz_CV: Tensor) -> Tensor:
        """The columns that are kept."""
        return dz_CV

    def apply(self, x_TD: Tensor, head: Weight, bias_V: Tensor | None) -> Tensor:
        """The head itself, [..., V], differentiable in x, too: for a few rows."""
        rows_TD = x_TD.reshape(-1, x_TD.shape[-1])
        z_TV: Tensor = _Logits.apply(rows_TD, head, bias_V, self, *self.tensors)
        return z_TV.view(*x_TD.shape[:-1], -1)


@dataclass(frozen=True)
class RowsChange(HeadChange):
    """Other rows. `more`: how many of them lie behind the weight's last one."""

    keeps: ClassVar[bool] = True
    index_I: Tensor
    rows_ID: Tensor
    more: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.rows_ID,)

    def logits(self, x_CD: Tensor, head: Weight, bias_V: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        z_CV = head.matmul(x_CD, bias_V)
        if self.more:
            z_CV = torch.cat([z_CV, z_CV.new_full((len(z_CV), self.more), -math.inf)], 1)
        own_CI = x_CD @ tensors[0].to(x_CD.dtype).T
        if bias_V is not None:
            own_CI = own_CI + torch.cat([bias_V, bias_V.new_zeros(self.more)])[self.index_I]
        return z_CV.index_copy_(1, self.index_I, own_CI)

    def back(self, dz_CV: Tensor, head: Weight, tensors: tuple[Tensor, ...]) -> Tensor:
        own_CI = dz_CV[:, self.index_I]
        dz_CV.index_fill_(1, self.index_I, 0)
        base_CV = dz_CV[:, : dz_CV.shape[1] - self.more]
        return head.matmul_t(base_CV).add_(own_CI @ tensors[0].to(dz_CV.dtype))

    def part(self, dz_CV: Tensor) -> Tensor:
        return dz_CV[:, self.index_I]

    def gradients(self, part_CV: Tensor, x_CD: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((part_CV.T @ x_CD).to(tensors[0].dtype),)


@dataclass(frozen=True)
class FactorsChange(HeadChange):
    """A LoRA."""

    factors: Factors

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.factors.a_RN, self.factors.b_MR

    def logits(self, x_CD: Tensor, head: Weight, bias_V: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        a_RD, b_VR = (tensor.to(x_CD.dtype) for tensor in tensors)
        return head.matmul(x_CD, bias_V) + self.factors.scale * ((x_CD @ a_RD.T) @ b_VR.T)

    def back(self, dz_CV: Tensor, head: Weight, tensors: tuple[Tensor, ...]) -> Tensor:
        a_RD, b_VR = (tensor.to(dz_CV.dtype) for tensor in tensors)
        return head.matmul_t(dz_CV).add_((dz_CV @ b_VR) @ a_RD, alpha=self.factors.scale)

    def gradients(self, part_CV: Tensor, x_CD: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a_RD, b_VR = (tensor.to(x_CD.dtype) for tensor in tensors)
        grad_a = (part_CV @ b_VR).T @ x_CD
        grad_b = part_CV.T @ (x_CD @ a_RD.T)
        return tuple(self.factors.scale * grad.to(tensors[0].dtype) for grad in (grad_a, grad_b))


@dataclass(frozen=True)
class WholeChange(HeadChange):
    """Another matrix."""

    weight_VD: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight_VD,)

    def logits(self, x_CD: Tensor, head: Weight, bias_V: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.nn.functional.linear(x_CD, tensors[0].to(x_CD.dtype), bias_V)

    def back(self, dz_CV: Tensor, head: Weight, tensors: tuple[Tensor, ...]) -> Tensor:
        return dz_CV @ tensors[0].to(dz_CV.dtype)

    def gradients(self, part_CV: Tensor, x_CD: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((part_CV.T @ x_CD).to(tensors[0].dtype),)


def changed_logprobs(
    hidden_TD: Tensor,
    head: Weight,
    labels_T: Tensor,
    change: HeadChange,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    rows_K: Tensor | None = None,
) -> Logprobs:
    """As `linear_logprobs`, of a head that differs by `change`, whose tensors get gradients."""
    options = (bias_V, labels_T, scale, softcap, rows_K, change)
    return Logprobs(*_ChangedLogprobs.apply(hidden_TD, head, *options, *change.tensors))


class _ChangedLogprobs(torch.autograd.Function):
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
        change: HeadChange,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        chunks = Chunks(hidden_TD, labels_T, rows_K, head)
        logp_K = hidden_TD.new_empty(len(chunks.rows_K), dtype=wide_of(hidden_TD))
        loss = logp_K.new_zeros(())
        wanted = any(ctx.needs_input_grad)
        n_KD = hidden_TD.new_empty(len(logp_K), hidden_TD.shape[1]) if wanted else None
        kept: list[Tensor] = []

        def gradient(x_CD: Tensor, labels_C: Tensor, without_C: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            """The losses, their sum, and dz in the place of the logits."""
            z_CV = change.logits(x_CD, head, bias_V, tensors)
            losses_C, total = losses_(z_CV, labels_C, without_C, scale, softcap, gradient=wanted)
            if without_C is not None:
                z_CV.masked_fill_(without_C[:, None], 0)
            return losses_C, total, z_CV

        for where, x_CD, labels_C, without_C in chunks:
            losses_C, total, dz_CV = gradient(x_CD, labels_C, without_C)
            logp_K[where] = -losses_C
            loss += total
            if n_KD is not None:
                kept += [change.part(dz_CV)] if change.keeps else []
                n_KD[where] = change.back(dz_CV, head, tensors)
            del dz_CV
        if n_KD is not None:
            columns = torch.cat(kept) if kept else n_KD.new_empty(0)
            ctx.save_for_backward(n_KD, chunks.rows_K, columns, *tensors)
            ctx.chunks, ctx.change, ctx.gradient = chunks, change, gradient
        return logp_K, loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        n_KD, rows_K, columns, *saved = ctx.saved_tensors
        tensors, chunks, change = tuple(saved), ctx.chunks, ctx.change
        g_K = (grad - grad_K).to(n_KD.dtype).unsqueeze(1)  # loss is −Σ logp
        grad_TD = n_KD.new_zeros(len(chunks.hidden_TD), n_KD.shape[1])
        grad_TD[rows_K] = n_KD * g_K
        sums = _summed(chunks, change, tensors, g_K, columns if change.keeps else None, ctx.gradient)
        return grad_TD, None, None, None, None, None, None, None, *sums


def _summed(
    chunks: Chunks,
    change: HeadChange,
    tensors: tuple[Tensor, ...],
    g_K: Tensor,
    columns_KI: Tensor | None,
    gradient: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """∂L/∂tensors, over all rows."""
    sums = tuple(torch.zeros_like(tensor) for tensor in tensors)
    for where, x_CD, labels_C, without_C in chunks:
        if columns_KI is not None:
            part_C = columns_KI[where] * g_K[where]
        else:
            part_C = gradient(x_CD, labels_C, without_C)[2].mul_(g_K[where])
        for total, more in zip(sums, change.gradients(part_C, x_CD, tensors), strict=True):
            total += more
    return sums


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, head: Weight, bias_V: Tensor | None, change: HeadChange, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TD, *tensors)
        ctx.head, ctx.change = head, change
        return change.logits(x_TD, head, bias_V, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_TV: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, *saved = ctx.saved_tensors
        tensors, change = tuple(saved), ctx.change
        sums = change.gradients(change.part(dz_TV), x_TD, tensors)
        return change.back(dz_TV.clone(), ctx.head, tensors), None, None, None, *sums
