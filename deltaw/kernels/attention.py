"""Causal attention over documents laid end to end: no token sees another document, and none is padded to the longest.

A batch is T tokens, the documents one after the other. Documents of like length are gathered into groups of D
documents by L positions (a shorter one is filled up with copies of some row; causality keeps every real token from
seeing the filler behind it, and filler gets no gradient). Each group is then plain batched products over chunks of C
queries, a chunk reading only the keys up to its own end, so about half of the L² scores are ever computed (rows are
gathered in that order, so that a chunk's queries lie together and no product copies them):

    P = softmax(scale · Q Kᵀ + mask)     O = P V
    dV = Pᵀ dO     dP = dO Vᵀ     dS = P ∘ (dP − rowsum(dP ∘ P))     dQ = scale · dS K     dK = scale · dSᵀ Q

Only Q, K and V are kept, and P where documents are so short that it is no larger than they. Otherwise P is computed
again in the backward, from the same numbers and so to the same bits (the recomputation is FlashAttention's, Dao et al.
2022 §3.1).

K and V are taken about their mean over a document. A vector that all keys have in common adds one number to a whole row
of scores, which softmax doesn't see, and one that all values have in common passes through it; so neither O nor a
gradient changes, but the numbers that half precision rounds (scores, P V, dP) are smaller, the more so in a trained
model, whose keys and values share much.

On a GPU PyTorch's own attention over packed documents does most calls (varlen.py). Where documents continue others
(tree.py), shared.py does it.

Why not `scaled_dot_product_attention`: its CPU kernel is made for long sequences. Measured on 2 cores, bf16, 9 heads
of 64, forward + backward (benchmarks/attention.py): 80 documents of 25 tokens 27 ms against 7 ms, 4 of 512 55 ms
against 31 ms. FlexAttention has no backward on a CPU, and a dense block mask computes all T² scores.

Letters: T tokens, H query heads, K key/value heads, G = H / K heads that share one, E head size, D documents of a
group, L its length, C queries of a chunk, S documents of the batch + 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels import varlen
from deltaw.kernels.documents import Documents
from deltaw.kernels.scores import Scores
from deltaw.kernels.shared import shared_attention
from deltaw.kernels.tree import Tree


def packed_attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    documents: Documents,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[T, H, E] in q's dtype. `window` w: a token sees itself and the w − 1 before it; `softcap` c: c · tanh(s / c)."""
    scale = 1 / math.sqrt(q_THE.shape[-1]) if scale is None else scale
    reach = documents.tree.reach if documents.tree else documents.longest
    window = None if window is None or window >= reach else window
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    if documents.tree:
        return shared_attention(q_THE, k_TKE, v_TKE, documents, **options)
    if varlen.applies(q_THE, k_TKE, len(documents.starts_S) - 1, documents.longest, **options):
        return varlen.varlen_attention(q_THE, k_TKE, v_TKE, documents.starts_S, documents.longest, **options)
    out: Tensor = _PackedAttention.apply(q_THE, k_TKE, v_TKE, documents, Scores(scale, window, softcap))
    return out.view(q_THE.shape)  # outside: a view made in a Function may not be written to


def packed_attention_plain(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    starts: list[int],
    *,
    parents: Sequence[int] = (),
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The twin: all T² scores, masked where document or order forbids."""
    scale = 1 / math.sqrt(q_THE.shape[-1]) if scale is None else scale
    T, H, _ = q_THE.shape
    k_HTE = k_TKE.repeat_interleave(H // k_TKE.shape[1], 1).transpose(0, 1)
    v_HTE = v_TKE.repeat_interleave(H // v_TKE.shape[1], 1).transpose(0, 1)
    s_HTT = scale * (q_THE.transpose(0, 1) @ k_HTE.transpose(1, 2))
    if softcap is not None:
        s_HTT = softcap * torch.tanh(s_HTT / softcap)
    at = torch.arange(T, device=q_THE.device)
    document = torch.bucketize(at, torch.tensor(starts, device=at.device), right=True) - 1
    behind = at[:, None] - at[None, :]
    seen = (behind >= 0) & (document[:, None] == document[None, :])
    if tree := Tree.of(starts, parents):
        for prefix in tree.prefixes:
            seen[starts[prefix + 1] : tree.ends[prefix], starts[prefix] : starts[prefix + 1]] = True
        position = at - torch.tensor(starts)[document] + torch.tensor(tree.offsets)[document]
        behind = position[:, None] - position[None, :]
    if window is not None:
        seen &= behind < window
    p_HTT = s_HTT.masked_fill(~seen, -math.inf).softmax(-1)
    return (p_HTT @ v_HTE).transpose(0, 1)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scores: Scores) -> Tensor:
        (T, H, E), K = q.shape, k.shape[1]
        queries, keys_and_values = documents.layout(H, in_chunks=True), documents.layout(K)
        q = q.reshape(T * H, E).index_select(0, queries.gather)
        k = k.reshape(T * K, E).index_select(0, keys_and_values.gather)
        v = v.reshape(T * K, E).index_select(0, keys_and_values.gather)
        o = torch.empty_like(q)
        saved: list[Tensor] = []
        for group in documents.groups:
            k_BLE, v_BLE = group.whole(k, K), group.whole(v, K)
            if scores.softcap is None:
                k_BLE.sub_(k_BLE.mean(1, keepdim=True))
            mean_B1E = v_BLE.mean(1, keepdim=True)
            v_BLE.sub_(mean_B1E)
            for rows, keys in scores.chunks(group.length):
                p, _ = scores.probabilities(group.rows(q, H, K, rows), k_BLE[:, keys], H // K)
                torch.baddbmm(mean_B1E, p, v_BLE[:, keys], out=group.rows(o, H, K, rows))
                if scores.keeps(group.length, H, K, E):
                    saved.append(p)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.documents, ctx.scores, ctx.heads = documents, scores, (H, K)
        return o.index_select(0, queries.scatter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PE: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        documents, scores, (H, K) = ctx.documents, ctx.scores, ctx.heads
        T, E = documents.total, q.shape[1]
        queries, keys_and_values = documents.layout(H, in_chunks=True), documents.layout(K)
        do = grad_PE.index_select(0, queries.gather).index_fill_(0, queries.filler, 0)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for group in documents.groups:
            k_BLE, v_BLE, dk_BLE, dv_BLE = (group.whole(x, K) for x in (k, v, dk, dv))
            for rows, keys in scores.chunks(group.length):
                q_BCE, do_BCE, dq_BCE = (group.rows(x, H, K, rows) for x in (q, do, dq))
                if scores.keeps(group.length, H, K, E):
                    p, slope = kept.pop(0), None
                else:
                    p, slope = scores.probabilities(q_BCE, k_BLE[:, keys], H // K)
                dv_BLE[:, keys].baddbmm_(p.transpose(1, 2), do_BCE)
                dp = torch.bmm(do_BCE, v_BLE[:, keys].transpose(1, 2))
                # P ∘ (dP − rowsum(dP ∘ P)) in one pass, sums in float32
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                if slope is not None:
                    ds.mul_(slope)
                # The scale rides on the products; with beta = 0 what stood in dq before is not read.
                torch.baddbmm(dq_BCE, ds, k_BLE[:, keys], beta=0, alpha=scores.scale, out=dq_BCE)
                dk_BLE[:, keys].baddbmm_(ds.transpose(1, 2), q_BCE, alpha=scores.scale)
        return (
            dq.index_select(0, queries.scatter).view(T, H, E),
            dk.index_select(0, keys_and_values.scatter).view(T, K, E),
            dv.index_select(0, keys_and_values.scatter).view(T, K, E),
            None,
            None,
        )
