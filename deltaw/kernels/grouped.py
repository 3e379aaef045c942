"""Products of many experts: each row by the matrices of the expert that it was sent to, with LoRA beside them.

A mixture's router sends each token to K of E experts. `route` sorts the T·K rows by expert, once for both products of a
layer, so that an expert's rows stand together, and what is computed is one product for each expert that has rows, never
E dense ones and never one for each token:

    y_e = x_e W_eᵀ + bias_e + s (x_e A_eᵀ) B_eᵀ          for the rows x_e of expert e

With G = ∂L/∂y, H_e = x_e A_eᵀ and P_e = s · G_e B_e the gradients are those of one layer (lora.py), expert by expert:

    ∂L/∂A_e = P_eᵀ x_e        ∂L/∂B_e = s · G_eᵀ H_e        ∂L/∂x_e = G_e W_e + P_e A_e

W gets none, and no ΔW_e is formed, here or in the backward. Adding s B A to W for each pass, as PEFT does, costs E M N
numbers written and read several times over and a third product for the gradient of what was added, however few rows an
expert has.

A layer may carry several updates, and a pass may hold rows of each (segments.py): rows are sorted by expert and then by
update, so W's products stay whole and each update has its own spans in them. Sorting is stable. The rows of an update
stand in the same order whoever else is in the pass.

`spread` hands tokens to their rows and `gather` adds up what the K rows of a token give; each is the other's backward.
Additions go by position and not by atomic operations, so a run repeats itself to the bit on a CPU, and on a GPU as far
as its products do.

What an expert beyond E is sent (a router's "no expert") is 0.

W's products are torch's `grouped_mm` where it takes them, as they are in transformers' own code, so that a fresh update
gives the model's own bits: a router picks others where two experts are nearly equal and a sum was rounded otherwise.
The low-rank products are loops over the experts that have rows. Their counts are read on the host, which waits once per
layer on a GPU. Rejected for them: `grouped_mm`, which wants ranks that are multiples of 8 there, and can't add to what
is.

Letters: T tokens, K experts of each, S = T·K rows, E experts, M outputs, N inputs, R rank.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.segments import Segments

GROUPED = (torch.float32, torch.bfloat16, torch.float16)  # what torch's grouped product takes


class Stack(NamedTuple):
    """An update of each expert: scale · B_e A_e."""

    a_ERN: Tensor
    b_EMR: Tensor
    scale: float


class Grouped(NamedTuple):
    """The frozen matrices of E experts, as views in this orientation, and the updates beside them by their numbers."""

    w_EMN: Tensor
    bias_EM: Tensor | None = None
    updates: Mapping[int, Stack] = MappingProxyType({})


class Span(NamedTuple):
    """Sorted rows `start` up to `end` are `expert`'s."""

    expert: int
    start: int
    end: int


class Routes(NamedTuple):
    """Which rows go where. `order_S`: the sorted rows' places among the T·K; `back_S`: the other way round.

    `experts`: the spans of W's products; `updates`: those of each update, by its number. None: all take the only one.
    """

    order_S: Tensor
    back_S: Tensor
    expert_S: Tensor  # of each sorted row; the last, where nobody's
    ends_E: Tensor  # the row behind each expert's last
    choices: int  # K
    experts: tuple[Span, ...]
    updates: Mapping[int, tuple[Span, ...]] | None = None

    @property
    def taken(self) -> int:
        """How many rows any expert has; the rest stand behind them."""
        return self.experts[-1].end if self.experts else 0

    def spans(self, update: int) -> tuple[Span, ...]:
        """The rows of an update."""
        return self.experts if self.updates is None else self.updates.get(update, ())


def route(experts_TK: Tensor, count: int, segments: Segments | None = None) -> Routes:
    """Sort the rows of a pass by expert. `count`: E."""
    t, k = experts_TK.shape
    key_S = experts_TK.reshape(-1).clamp(max=count)
    numbers = sorted({segment.update for segment in segments or ()})
    kinds = 1 if segments is None else len(numbers) + 1
    if segments is not None:
        kind_T = torch.full((t,), len(numbers), dtype=torch.int64)
        for update, start, end in segments:
            if not 0 <= start <= end <= t:
                raise ValueError(f"a segment of the rows {start} to {end}, of {t}")
            kind_T[start:end] = numbers.index(update)
        key_S = key_S * kinds + kind_T.to(key_S.device).repeat_interleave(k)
    order_S = key_S.argsort(stable=True)
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    expert_S = experts_TK.reshape(-1)[order_S].clamp(max=count - 1)
    counts = key_S.bincount(minlength=(count + 1) * kinds)[: count * kinds].view(count, kinds)
    ends_E = counts.sum(1).cumsum(0, dtype=torch.int32)
    sorted_rows = (order_S, back_S, expert_S, ends_E, k)
    if segments is None:
        return Routes(*sorted_rows, _spans(counts.sum(1).tolist()))
    parts = _spans(counts.flatten().tolist())
    updates: dict[int, list[Span]] = {number: [] for number in numbers}
    for part in parts:
        expert, kind = divmod(part.expert, kinds)
        if kind < len(numbers):
            updates[numbers[kind]].append(Span(expert, part.start, part.end))
    experts = _spans(counts.sum(1).tolist())
    return Routes(*sorted_rows, experts, {number: tuple(spans) for number, spans in updates.items()})


def spread(x_TN: Tensor, routes: Routes) -> Tensor:
    """Each token once for each of its experts, sorted: [S, N]."""
    rows_SN: Tensor = _Spread.apply(x_TN, routes)
    return rows_SN


def gather(y_SM: Tensor, routes: Routes) -> Tensor:
    """What the rows of each token add up to, [T, M]."""
    y_TM: Tensor = _Gather.apply(y_SM, routes)
    return y_TM


def grouped_linear(x_SN: Tensor, grouped: Grouped, routes: Routes, low_SN: Tensor | None = None) -> Tensor:
    """[S, M] of sorted rows, in x's dtype. `low_SN`: what the updates see instead of x (dropout). Only x and the
    factors can get gradients."""
    factors = [factor for update in grouped.updates.values() for factor in update[:2]]
    if torch.is_grad_enabled():
        y_SM: Tensor = _GroupedLinear.apply(x_SN, low_SN, grouped, routes, *factors)
        return y_SM
    return _forward(x_SN, x_SN if low_SN is None else low_SN, grouped, routes)[0]


def grouped_linear_plain(x_SN: Tensor, grouped: Grouped, routes: Routes, low_SN: Tensor | None = None) -> Tensor:
    """The twin of `grouped_linear`: E dense products through autograd, each W_e + s B_e A_e formed."""
    y_SM = torch.zeros(len(x_SN), grouped.w_EMN.shape[1], dtype=x_SN.dtype, device=x_SN.device)
    for expert, start, end in routes.experts:
        bias_M = None if grouped.bias_EM is None else grouped.bias_EM[expert]
        y_SM = y_SM.index_copy(0, torch.arange(start, end), F.linear(x_SN[start:end], grouped.w_EMN[expert], bias_M))
    for number, (a_ERN, b_EMR, scale) in grouped.updates.items():
        for expert, start, end in routes.spans(number):
            delta_MN = (scale * (b_EMR[expert] @ a_ERN[expert])).to(x_SN.dtype)
            low = F.linear((x_SN if low_SN is None else low_SN)[start:end], delta_MN)
            y_SM = y_SM.index_add(0, torch.arange(start, end), low)
    return y_SM


def _spans(counts: Sequence[int]) -> tuple[Span, ...]:
    """Of those that have rows."""
    spans, at = [], 0
    for expert, rows in enumerate(counts):
        if rows:
            spans.append(Span(expert, at, at + rows))
        at += rows
    return tuple(spans)


def _products(x_SN: Tensor, w_ENM: Tensor, routes: Routes) -> Tensor:
    """Each row by its expert's matrix; what stands behind them is undefined."""
    if hasattr(F, "grouped_mm") and _can_group(x_SN) and all(map(_aligned, (x_SN, w_ENM))):
        return F.grouped_mm(x_SN, w_ENM, offs=routes.ends_E)
    y_SM = x_SN.new_empty(len(x_SN), w_ENM.shape[2])
    for expert, start, end in routes.experts:
        torch.mm(x_SN[start:end], w_ENM[expert], out=y_SM[start:end])
    return y_SM


def _can_group(x: Tensor) -> bool:
    """Whether torch has grouped products of this type on this device."""
    return x.dtype in GROUPED and (x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0))


def _aligned(x: Tensor) -> bool:
    """Whether torch's grouped product takes it: rows that begin at multiples of 16 bytes."""
    strides = [stride for stride in x.stride()[-2:] if stride != 1]
    return x.data_ptr() % 16 == 0 and len(strides) == 1 and strides[0] * x.itemsize % 16 == 0


def _forward(
    x_SN: Tensor, low_SN: Tensor, grouped: Grouped, routes: Routes
) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """(y, H [S, R] of each update, each update's factors in x's dtype)."""
    w_EMN, bias_EM = grouped.w_EMN, grouped.bias_EM
    y_SM = _products(x_SN, w_EMN.transpose(1, 2), routes)
    if bias_EM is not None:
        y_SM += bias_EM[routes.expert_S]
    y_SM[routes.taken :] = 0
    hs, cast = [], []
    for number, (a_ERN, b_EMR, scale) in grouped.updates.items():
        a_ERN, b_EMR = a_ERN.to(x_SN.dtype), b_EMR.to(x_SN.dtype)
        h_SR = x_SN.new_zeros(len(x_SN), a_ERN.shape[1])
        for expert, start, end in routes.spans(number):
            torch.mm(low_SN[start:end], a_ERN[expert].T, out=h_SR[start:end])
            y_SM[start:end].addmm_(h_SR[start:end], b_EMR[expert].T, alpha=scale)
        hs.append(h_SR)
        cast.append((a_ERN, b_EMR))
    return y_SM, hs, cast


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_SN: Tensor, low_SN: Tensor | None, grouped: Grouped, routes: Routes, *factors: Tensor
    ) -> Tensor:
        y_SM, hs, _ = _forward(x_SN, x_SN if low_SN is None else low_SN, grouped, routes)
        ctx.save_for_backward((x_SN if low_SN is None else low_SN) if factors else None, *hs, *factors)
        ctx.grouped, ctx.routes, ctx.apart = grouped, routes, low_SN is not None
        return y_SM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_SM: Tensor) -> tuple[Tensor | None, ...]:
        grouped, routes = ctx.grouped, ctx.routes
        low_SN, *saved = ctx.saved_tensors
        g_SM = g_SM.contiguous()
        dx_SN = dlow_SN = None
        if ctx.needs_input_grad[0]:
            dx_SN = _products(g_SM, grouped.w_EMN, routes)
            dx_SN[routes.taken :] = 0
        if ctx.apart and ctx.needs_input_grad[1]:
            dlow_SN = torch.zeros_like(low_SN)
        gradients = []
        for (number, update), h_SR in zip(grouped.updates.items(), saved, strict=False):
            onto = dlow_SN if ctx.apart else dx_SN
            gradients += _back_to_factors(low_SN, h_SR, g_SM, update, routes.spans(number), onto)
        return dx_SN, dlow_SN, None, None, *gradients


def _back_to_factors(
    low_SN: Tensor, h_SR: Tensor, g_SM: Tensor, update: Stack, spans: Sequence[Span], onto_SN: Tensor | None
) -> list[Tensor]:
    """∂L/∂A and ∂L/∂B of an update; P A is added to the rows of `onto_SN`."""
    a_ERN, b_EMR = update.a_ERN.to(g_SM.dtype), update.b_EMR.to(g_SM.dtype)
    da_ERN, db_EMR = torch.zeros_like(update.a_ERN), torch.zeros_like(update.b_EMR)
    for expert, start, end in spans:
        p_TR = (g_SM[start:end] @ b_EMR[expert]).mul_(update.scale)
        if onto_SN is not None:
            onto_SN[start:end].addmm_(p_TR, a_ERN[expert])
        da_ERN[expert] = p_TR.T @ low_SN[start:end]
        # R x M, then transposed: the long side of G is read in the order it lies in memory.
        db_EMR[expert] = (h_SR[start:end].T @ g_SM[start:end]).T.mul_(update.scale)
    return [da_ERN, db_EMR]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TN: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return x_TN[routes.order_S // routes.choices]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_SN: Tensor) -> tuple[Tensor, None]:
        return _added(g_SN, ctx.routes), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SM: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return _added(y_SM, routes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TM: Tensor) -> tuple[Tensor, None]:
        return g_TM[ctx.routes.order_S // ctx.routes.choices], None


def _added(y_SM: Tensor, routes: Routes) -> Tensor:
    return y_SM[routes.back_S].view(-1, routes.choices, y_SM.shape[1]).sum(1)
