"""Projections of one input as one matrix, with room at its sides for their factors: the low-rank products ride on the
frozen ones.

`Joined` holds the weights W₁ … Wₙ of projections that read one x (query, key and value; gate and up; or one alone) on
top of each other, and their updates sᵢ Bᵢ Aᵢ around them, in one storage

    J = [ W   S ]      W = [W₁; W₂; …] [M, N]         S = the sᵢ Bᵢ, each beside its own Wᵢ, zeros elsewhere [M, K]
        [ A   · ]      A = [A₁; A₂; …] [K, N]

so that with H = x Aᵀ written behind x, and P = G S behind G = ∂L/∂y, a pass is three products of each kind and nothing
is added afterwards:

    y = [x H] [W S]ᵀ        ∂L/∂x = [G P] [W; A]        ∂L/∂A = Pᵀ x        ∂L/∂Bᵢ = sᵢ Gᵢᵀ Hᵢ

These are lora.py's formulas. There each update is added to y, and P A to ∂L/∂x, in passes that read and write a whole
[T, M] or [T, N] for the sake of R columns: on an H100 143 µs where the product itself takes 370 (8,192 x 8,192 outputs
of 2,048 inputs), here about 10. K is a few dozen, so the products grow by 1 or 2 %. What it costs is a copy of x (and
of G, where that isn't made here) to where there is room behind it. On a CPU, where the additions are far cheaper than
the products, lora.py's way stays.

The factors stay the float32 masters that they are. `Joined.places` says where in J each is to be written, rounded to
the weights' dtype, before a pass (adapter/folding.py does it, all in one launch). Their gradients are summed in the
products' own accumulators and added in the factors' dtype: to `sinks`, where there are some, else they are returned.

K is filled up to a multiple of 16 with zeros, and rows begin at multiples of 128 bytes (room.py): a GPU's matrix units
are fed in such pieces.

Letters: T rows, N inputs, M outputs of all together, R rank of one, K the ranks' sum, filled up; I inner size.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.lora import Factors, gated, gated_back
from deltaw.kernels.room import roomy
from deltaw.kernels.rotary import turn_, turn_back
from deltaw.kernels.thin import Sum, add_sums, product_behind, with_product

FILL = 16  # columns that factors are filled up to


class Sinks(NamedTuple):
    """Where gradients are added up: of A [K, N] and of each B [M, R], in the factors' dtype."""

    a_KN: Tensor
    bs: tuple[Tensor | None, ...]


class Joined:
    """The frozen weights [M, N] of projections of one x, each with its bias and its update or None, as one matrix.

    `weights` are then to be views of it (`views`): nothing of them is kept here twice.
    """

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], updates: Sequence[Factors | None]
    ) -> None:
        self.updates, first = tuple(updates), weights[0]
        self.rows = _spans([len(weight) for weight in weights])
        self.ranks = _spans([0 if update is None else len(update.a_RN) for update in updates])
        self.outputs, self.inputs = self.rows[-1].stop, first.shape[1]
        self.room = -(-self.ranks[-1].stop // FILL) * FILL
        self.whole = roomy(self.outputs + self.room, self.inputs, self.room, first).zero_()
        self.w_MN, self.s_MK = self.whole[: self.outputs].split([self.inputs, self.room], 1)
        self.a_KN = self.whole[self.outputs :, : self.inputs]
        for weight, view in zip(weights, self.views, strict=True):
            view.copy_(weight)
        present = [bias for bias in biases if bias is not None]
        if present and len(present) < len(biases):
            raise ValueError("some projections with a bias and some without one")
        self.bias_M = torch.cat(present) if present else None
        self.sinks: Sinks | None = None

    @property
    def views(self) -> list[Tensor]:
        """The weights [M, N] where they lie."""
        return [self.w_MN[rows] for rows in self.rows]

    @property
    def places(self) -> list[tuple[Tensor, Tensor, float]]:
        """(a factor, the view that it is written to, what it is multiplied by) of all."""
        found = []
        for rows, ranks, update in zip(self.rows, self.ranks, self.updates, strict=True):
            if update is not None:
                found.append((update.a_RN, self.a_KN[ranks], 1.0))
                found.append((update.b_MR, self.s_MK[rows, ranks], update.scale))
        return found

    @property
    def factors(self) -> list[Tensor]:
        """A and B of each update in turn."""
        return [factor for update in self.updates if update is not None for factor in update[:2]]

    def collect(self) -> dict[Tensor, Tensor]:
        """Sinks, made: by factor, where its gradient is added up."""
        self.sinks = self._sums()
        found: dict[Tensor, Tensor] = {}
        for ranks, update, b_MR in zip(self.ranks, self.updates, self.sinks.bs, strict=True):
            if update is not None and b_MR is not None:
                found |= {update.a_RN: self.sinks.a_KN[ranks], update.b_MR: b_MR}
        return found

    def forward(self, x_TN: Tensor, x_TX: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(y [T, M], what the backward wants of x: x and H). H is made in x's own place where `x_TX` is x and at least
        as much room behind it. Else it is made behind a copy of x, and kept in one of its own: somebody else keeps x
        (attention its output), and the copy is as large."""
        a_NK = self.a_KN.T
        if x_TX is None:
            x_TX = with_product(x_TN, a_NK)
            return self.product(x_TX), (x_TN, x_TX[:, self.inputs :].clone())
        x_TX = product_behind(x_TX, a_NK)
        return self.product(x_TX), (x_TX[:, : self.inputs], x_TX[:, self.inputs :])

    def product(self, x_TX: Tensor) -> Tensor:
        """y [T, M] of [x H]."""
        whole_MX = self.whole[: self.outputs, : self.inputs + self.room]
        return x_TX @ whole_MX.T if self.bias_M is None else torch.addmm(self.bias_M, x_TX, whole_MX.T)

    def ranked_back(self, g_TM: Tensor) -> Tensor:
        """[G P], in a copy of G."""
        return with_product(g_TM, self.s_MK)

    def ranked_back_in_place(self, g_TX: Tensor) -> Tensor:
        """[G P] of a G with room behind it."""
        return product_behind(g_TX, self.s_MK)

    def to_input(self, g_TX: Tensor) -> Tensor:
        """∂L/∂x [T, N] of [G P]."""
        return g_TX @ self.whole[:, : self.inputs]

    def to_factors(self, x_TN: Tensor, h_TK: Tensor, g_TX: Tensor) -> list[Tensor | None]:
        """∂L/∂A and ∂L/∂B of each update in turn, of [G P]; None where they were added to the sinks."""
        g_TM, p_TK = g_TX.split([self.outputs, self.room], 1)
        sinks = self.sinks or self._sums()
        sums = [Sum(x_TN, p_TK, sinks.a_KN.T, 1.0)]
        for rows, ranks, update, b_MR in zip(self.rows, self.ranks, self.updates, sinks.bs, strict=True):
            if update is not None and b_MR is not None:
                sums.append(Sum(g_TM[:, rows], h_TK[:, ranks], b_MR, update.scale))
        add_sums(sums)
        if self.sinks is not None:
            return [None] * len(self.factors)
        pairs = zip(self.ranks, sinks.bs, strict=True)
        return [part for ranks, b_MR in pairs if b_MR is not None for part in (sinks.a_KN[ranks], b_MR)]

    def _sums(self) -> Sinks:
        """Zeros, to which gradients are added."""
        first = self.factors[0]
        bs = tuple(None if update is None else torch.zeros_like(update.b_MR) for update in self.updates)
        return Sinks(first.new_zeros(self.room, self.inputs), bs)


def joined_linears(x_TN: Tensor, joined: Joined, x_TX: Tensor | None = None) -> tuple[Tensor, ...]:
    """Each projection of x [T, N]: [T, ·] in x's dtype, columns of one matrix. Only x and the factors can get
    gradients. `x_TX`: x where it lies, with at least `joined.room` columns behind it that may be written to."""
    ys: tuple[Tensor, ...] = _JoinedLinears.apply(x_TN, x_TX, joined, None, *joined.factors)
    return ys


def joined_heads(
    x_TN: Tensor, joined: Joined, cos_TR: Tensor, sin_TR: Tensor, head: int, x_TX: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Queries, keys and values [T, ·, head] of x, queries and keys turned by the angles of each token (rotary.py)."""
    ys = _JoinedLinears.apply(x_TN, x_TX, joined, _Turn(cos_TR, sin_TR, head), *joined.factors)
    return tuple(y_TM.unflatten(1, (-1, head)) for y_TM in ys)


class _Turn(NamedTuple):
    """The angles by which the first two projections' heads turn."""

    cos_TR: Tensor
    sin_TR: Tensor
    head: int

    def turn(self, y_TM: Tensor, rows: Sequence[slice]) -> None:
        """Turn queries and keys where they lie in y."""
        turn_(y_TM[:, : rows[1].stop].unflatten(1, (-1, self.head)), self.cos_TR, self.sin_TR)

    def back(self, grads: Sequence[Tensor], g_TX: Tensor) -> None:
        """Write the gradients side by side, those of queries and keys turned back."""
        dq, dk, dv = (grad.unflatten(1, (-1, self.head)) for grad in grads)
        turn_back(dq, dk, dv, self.cos_TR, self.sin_TR, g_TX)


def joined_gated_mlp(x_TN: Tensor, pair: Joined, down: Joined, activation: str, x_TX: Tensor | None = None) -> Tensor:
    """down(act(gate(x)) ∘ up(x)) [T, N] of `pair` = gate and up; `activation` is a key of lora.py's ACTIVATIONS."""
    y_TN: Tensor = _JoinedMLP.apply(x_TN, x_TX, pair, down, activation, *pair.factors, *down.factors)
    return y_TN


class _JoinedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TN: Tensor, x_TX: Tensor | None, joined: Joined, turn: _Turn | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        y_TM, kept = joined.forward(x_TN, x_TX)
        ctx.save_for_backward(*kept, *factors)
        ctx.joined, ctx.turn = joined, turn
        ys = tuple(y_TM[:, rows] for rows in joined.rows) if len(joined.rows) > 1 else (y_TM,)
        if turn is not None:
            turn.turn(y_TM, joined.rows)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        joined, (x_TN, h_TK, *_) = ctx.joined, ctx.saved_tensors
        if len(grads) == 1:
            g_TX = joined.ranked_back(grads[0])
        else:
            g_TX = roomy(len(x_TN), joined.outputs, joined.room, x_TN)
            if ctx.turn is not None:
                ctx.turn.back(grads, g_TX)
            else:
                torch._foreach_copy_([g_TX[:, rows] for rows in joined.rows], list(grads))
            joined.ranked_back_in_place(g_TX)
        dx_TN = joined.to_input(g_TX) if ctx.needs_input_grad[0] else None
        return dx_TN, None, None, None, *joined.to_factors(x_TN, h_TK, g_TX)


class _JoinedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TN: Tensor, x_TX: Tensor | None, pair: Joined, down: Joined, activation: str, *factors: Tensor
    ) -> Tensor:
        size, (gu_TI, kept) = down.inputs, pair.forward(x_TN, x_TX)
        inner_TX = roomy(len(x_TN), size, down.room, x_TN)
        gated(gu_TI[:, :size], gu_TI[:, size:], activation, out=inner_TX[:, :size])
        product_behind(inner_TX, down.a_KN.T)
        # H in a copy of its own: kept in its place it would keep all that it lies behind.
        ctx.save_for_backward(*kept, gu_TI, inner_TX[:, size:].clone(), *factors)
        ctx.pair, ctx.down, ctx.activation = pair, down, activation
        return down.product(inner_TX)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        pair, down, (x_TN, h_TK, gu_TI, inner_h_TK, *_) = ctx.pair, ctx.down, ctx.saved_tensors
        size, grad_TX = down.inputs, down.ranked_back(grad_TN)
        d_TI, g_TX = down.to_input(grad_TX), roomy(len(x_TN), pair.outputs, pair.room, x_TN)
        inner_TI = torch.empty_like(d_TI)
        out = inner_TI, g_TX[:, :size], g_TX[:, size : 2 * size]
        gated_back(d_TI, gu_TI[:, :size], gu_TI[:, size:], ctx.activation, out=out)
        del d_TI
        of_down = down.to_factors(inner_TI, inner_h_TK, grad_TX)
        pair.ranked_back_in_place(g_TX)
        dx_TN = pair.to_input(g_TX) if ctx.needs_input_grad[0] else None
        of_pair = pair.to_factors(x_TN, h_TK, g_TX)
        return dx_TN, None, None, None, None, *of_pair, *of_down


def _spans(sizes: Sequence[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(accumulate(sizes, initial=0))]
