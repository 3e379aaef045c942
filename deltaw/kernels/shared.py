"""Attention of documents that continue others (tree.py): a prefix's keys and values are read once, by all that follow.

A row's softmax runs over several parts: its own document up to itself, and all rows of each ancestor. Every part is
computed as if it were alone, and the parts are joined by what their scores sum up to:

    P_a = softmax(S_a)     O_a = P_a V_a     l_a = log Σ exp S_a                       of each part a
    L = log Σ_a exp l_a    w_a = exp(l_a − L)                                          how much of the row is a's
    O = Σ_a w_a O_a
    dO_a = w_a dO     δ = rowsum(dO ∘ O)     dS_a = P_a ∘ (dO_a V_aᵀ − w_a δ)          and on as in attention.py

So no part needs another's scores. The own part is the groups of attention.py. For an ancestor, the rows that see it lie
in one slice behind it, so its part is one product per key/value head: all their queries, of all heads that share the
keys, against its keys; dK and dV of the prefix come as one product too, already summed over all that follow.

l is read off the softmax, which torch computes in one pass: the largest score less the log of the largest probability.

Keys and values are taken about their mean over the batch, for the reason in attention.py; about one mean, since the
parts of a row must be shifted alike.

A window hides the rows of an ancestor that lie too far back, and a row may see nothing of one: hidden scores are then
the smallest number of their type, not −∞, so that such a part has a weight of 0 and no NaN.

On a GPU each document's keys are gathered, its ancestors' before its own, and PyTorch's varlen attention aligns the
last query with the last key; gathering's backward adds up what comes back. Rejected there: two calls joined as above
(its backward takes no gradient for l). Rejected on a CPU: gathered keys (a prefix's keys and values would be copied for
each example, and its product fall into as many small ones), and the scores of both parts side by side in one buffer
(the own part goes by groups of like length, the prefix's by prefix: one of the two would have to be laid out anew).

Letters: T tokens, H query heads, K key/value heads, G = H / K, E head size, n rows that see an ancestor, C of them at a
time, J its keys, P gathered places (documents.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels import varlen
from deltaw.kernels.documents import Documents, Layout
from deltaw.kernels.scores import Scores

BLOCK = 2**20  # scores of an ancestor's part at a time


def shared_attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    documents: Documents,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`packed_attention` of documents some of which continue others."""
    tree = documents.tree
    assert tree is not None
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    if varlen.applies(q_THE, k_TKE, len(documents.starts_S) - 1, tree.reach, **options, continued=True):
        row_J, keys_S = documents.seen
        seen = keys_S, tree.reach
        k_JKE, v_JKE = k_TKE.index_select(0, row_J), v_TKE.index_select(0, row_J)
        longest = documents.longest
        return varlen.varlen_attention(q_THE, k_JKE, v_JKE, documents.starts_S, longest, **options, seen=seen)
    out: Tensor = _SharedAttention.apply(q_THE, k_TKE, v_TKE, documents, Scores(scale, window, softcap))
    return out.view(q_THE.shape)


class _Block(NamedTuple):
    """Rows that see `keys`, all of one ancestor; `hidden` [C, J]: which of these each doesn't, None for none."""

    rows: slice
    keys: slice
    hidden: Tensor | None


@dataclass(frozen=True)
class _Ancestors:
    """The parts of all ancestors, cut into blocks."""

    documents: Documents
    scores: Scores

    def blocks(self, heads: int) -> Iterator[_Block]:
        """In the order of the ancestors, so that a row meets its first one first."""
        tree, starts, window = self.documents.tree, self.documents.starts, self.scores.window
        assert tree is not None
        position_T = None if window is None else tree.positions(self.documents.device)
        for number in tree.prefixes:
            begin, end, last = starts[number], starts[number + 1], tree.ends[number]
            begin = begin if window is None else max(begin, end - window + 1)  # what the row right behind it sees
            if begin == end:
                continue
            step = max(1, BLOCK // (heads * (end - begin)))
            for first in range(end, last, step):
                rows, keys, hidden = slice(first, min(first + step, last)), slice(begin, end), None
                if position_T is not None and window is not None:
                    hidden = position_T[rows, None] - position_T[None, keys] >= window
                yield _Block(rows, keys, hidden)

    def softmax(self, block: _Block, q_KNE: Tensor, k_KJE: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(scores, their softmax [K, C · G, J], the soft cap's slope or None)."""
        s, slope = self.scores.scores(q_KNE, k_KJE)
        if block.hidden is not None:
            C, J = block.hidden.shape
            s.view(len(s), C, -1, J).masked_fill_(block.hidden[:, None], torch.finfo(s.dtype).min)
        return s, torch.softmax(s, -1), slope

    def keeps(self, block: _Block, heads: int, kv_heads: int, size: int) -> bool:
        """Whether P is kept for the backward: where it is at most twice as large as its rows' Q, K and V."""
        keys = block.keys.stop - block.keys.start
        return keys * heads <= 2 * (heads + 2 * kv_heads) * size and self.scores.softcap is None


def _log_sum(s: Tensor, p: Tensor) -> Tensor:
    """log Σ exp of scores, in float32 or better [.., 1], with the help of their softmax."""
    most, share = s.amax(-1, keepdim=True), p.amax(-1, keepdim=True)
    wide = torch.promote_types(s.dtype, torch.float32)
    return most.to(wide) - share.to(wide).log()


def _by_key_head(x_THE: Tensor, K: int) -> Tensor:
    """[K, T, G, E], a copy: the query heads of each key/value head lie together."""
    T, H, E = x_THE.shape
    return x_THE.reshape(T, K, H // K, E).transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _by_row(x_KTGE: Tensor) -> Tensor:
    """Back to [T, H, E], contiguous: models view it in other shapes."""
    K, T, G, E = x_KTGE.shape
    return x_KTGE.transpose(0, 1).reshape(T, K * G, E).contiguous()


def _rows(x_KTGE: Tensor, rows: slice) -> Tensor:
    """[K, C · G, E] of some rows; a view."""
    return x_KTGE[:, rows].flatten(1, 2)


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scores: Scores) -> Tensor:
        (_, H, E), K = q.shape, k.shape[1]
        if scores.softcap is None:
            k = k - k.mean(0)
        mean_KE = v.mean(0)
        v, q_KTGE = v - mean_KE, _by_key_head(q, K)
        own, ancestors = _Own(documents, scores), _Ancestors(documents, scores)
        o_KTGE, own_lse, saved = own.forward(q_KTGE, k, v)
        lse_KTG1, lses = own_lse.clone(), list[Tensor]()
        k_KTE, v_KTE = k.transpose(0, 1), v.transpose(0, 1)
        for block in ancestors.blocks(H):
            s, p, _ = ancestors.softmax(block, _rows(q_KTGE, block.rows), k_KTE[:, block.keys])
            o, so_far, lse = _rows(o_KTGE, block.rows), _rows(lse_KTG1, block.rows), _log_sum(s, p)
            after = torch.logaddexp(so_far, lse)
            o.lerp_(torch.bmm(p, v_KTE[:, block.keys]), (lse - after).exp_().to(o.dtype))
            so_far.copy_(after)
            lses.append(lse)
            if ancestors.keeps(block, H, K, E):
                saved.append(p)
        ctx.save_for_backward(q_KTGE, k, v, o_KTGE, lse_KTG1, own_lse, *lses, *saved)
        ctx.own, ctx.ancestors, ctx.blocks = own, ancestors, len(lses)
        return _by_row(o_KTGE + mean_KE[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_KTGE, k, v, o_KTGE, lse_KTG1, own_lse, *rest = ctx.saved_tensors
        lses, kept = rest[: ctx.blocks], rest[ctx.blocks :]
        ancestors, scale, (_, K, E) = ctx.ancestors, ctx.ancestors.scores.scale, k.shape
        H = K * q_KTGE.shape[2]
        do_KTGE = _by_key_head(grad, K)
        delta_KTG1 = (do_KTGE * o_KTGE).sum(-1, keepdim=True, dtype=lse_KTG1.dtype)
        weight = (own_lse - lse_KTG1).exp_()
        of_own = do_KTGE * weight.to(grad.dtype), (delta_KTG1 * weight).to(grad.dtype)
        dq_KTGE, dk, dv = ctx.own.backward(q_KTGE, k, v, *of_own, kept)
        k_KTE, v_KTE, dk_KTE, dv_KTE = (x.transpose(0, 1) for x in (k, v, dk, dv))
        for block, lse in zip(ancestors.blocks(H), lses, strict=True):
            rows, keys = block.rows, block.keys
            q_KNE, k_KJE = _rows(q_KTGE, rows), k_KTE[:, keys]
            if ancestors.keeps(block, H, K, E):
                p, slope = kept.pop(0), None
            else:
                _, p, slope = ancestors.softmax(block, q_KNE, k_KJE)
            weight = (lse - _rows(lse_KTG1, rows)).exp_()
            do_KNE = _rows(do_KTGE, rows) * weight.to(grad.dtype)
            dv_KTE[:, keys] += torch.bmm(p.transpose(1, 2), do_KNE)
            delta = (_rows(delta_KTG1, rows) * weight).to(grad.dtype)
            ds = _score_gradients(p, slope, do_KNE, v_KTE[:, keys], delta)
            _rows(dq_KTGE, rows).baddbmm_(ds, k_KJE, alpha=scale)
            dk_KTE[:, keys] += torch.bmm(ds.transpose(1, 2), q_KNE).mul_(scale)
        return _by_row(dq_KTGE), dk, dv, None, None


def _score_gradients(p: Tensor, slope: Tensor | None, do: Tensor, v: Tensor, delta: Tensor) -> Tensor:
    """P ∘ (dO Vᵀ − δ), and what the soft cap makes of it."""
    ds = torch.baddbmm(-delta, do, v.transpose(1, 2)).mul_(p)
    return ds if slope is None else ds.mul_(slope)


class _Own:
    """The part of each row that is its own document, as in attention.py. A window that no document is long enough to
    notice is none."""

    def __init__(self, documents: Documents, scores: Scores) -> None:
        self.documents = documents
        noticed = scores.window is not None and scores.window < documents.longest
        self.scores = scores if noticed else replace(scores, window=None)

    def forward(self, q_KTGE: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(O [K, T, G, E], l [K, T, G, 1], each P that is kept)."""
        queries, (q, k, v), H, K, E = self._gathered(q_KTGE, k, v)
        o = torch.empty_like(q)
        lse = q.new_empty(len(q), 1, dtype=torch.promote_types(q.dtype, torch.float32))
        kept: list[Tensor] = []
        for group in self.documents.groups:
            k_BLE, v_BLE = group.whole(k, K), group.whole(v, K)
            for rows, keys in self.scores.chunks(group.length):
                s, _ = self.scores.scores(group.rows(q, H, K, rows), k_BLE[:, keys])
                self.scores.hide(s, H // K)
                p = torch.softmax(s, -1)
                group.rows(lse, H, K, rows).copy_(_log_sum(s, p))
                torch.bmm(p, v_BLE[:, keys], out=group.rows(o, H, K, rows))
                if self.scores.keeps(group.length, H, K, E):
                    kept.append(p)
        o, lse = o.index_select(0, queries.scatter), lse.index_select(0, queries.scatter)
        return o.view_as(q_KTGE), lse.view(*q_KTGE.shape[:3], 1), kept

    def backward(
        self, q_KTGE: Tensor, k: Tensor, v: Tensor, do_KTGE: Tensor, delta_KTG1: Tensor, kept: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dQ [K, T, G, E], dK, dV [T, K, E]); the first of `kept` are taken. `do_KTGE`, `delta_KTG1`: dO and δ, both
        times the part's weight in each row."""
        keys_and_values, shape = self.documents.layout(k.shape[1]), k.shape
        queries, (q, k, v), H, K, E = self._gathered(q_KTGE, k, v)
        do, delta = (
            x.view(-1, x.shape[-1]).index_select(0, queries.gather).index_fill_(0, queries.filler, 0)
            for x in (do_KTGE, delta_KTG1)
        )
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for group in self.documents.groups:
            k_BLE, v_BLE, dk_BLE, dv_BLE = (group.whole(x, K) for x in (k, v, dk, dv))
            for rows, keys in self.scores.chunks(group.length):
                q_BCE, do_BCE, dq_BCE, delta_BC1 = (group.rows(x, H, K, rows) for x in (q, do, dq, delta))
                if self.scores.keeps(group.length, H, K, E):
                    p, slope = kept.pop(0), None
                else:
                    p, slope = self.scores.probabilities(q_BCE, k_BLE[:, keys], H // K)
                dv_BLE[:, keys].baddbmm_(p.transpose(1, 2), do_BCE)
                ds = _score_gradients(p, slope, do_BCE, v_BLE[:, keys], delta_BC1)
                torch.baddbmm(dq_BCE, ds, k_BLE[:, keys], beta=0, alpha=self.scores.scale, out=dq_BCE)
                dk_BLE[:, keys].baddbmm_(ds.transpose(1, 2), q_BCE, alpha=self.scores.scale)
        dk, dv = (x.index_select(0, keys_and_values.scatter).view(shape) for x in (dk, dv))
        return dq.index_select(0, queries.scatter).view_as(q_KTGE), dk, dv

    def _gathered(
        self, q_KTGE: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Layout, tuple[Tensor, Tensor, Tensor], int, int, int]:
        """(where the rows of Q go, Q, K and V gathered, H, K, E)."""
        (K, _, G, E), layout = q_KTGE.shape, self.documents.layout
        queries, keys_and_values = layout(K * G, in_chunks=True, kv_heads=K), layout(K)
        k, v = (x.reshape(-1, E).index_select(0, keys_and_values.gather) for x in (k, v))
        return queries, (q_KTGE.view(-1, E).index_select(0, queries.gather), k, v), K * G, K, E
