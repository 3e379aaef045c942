"""Causal attention over documents laid end to end: no token sees another document, and none is padded to the longest.

A batch is T tokens, the documents one after the other. Documents of like length are gathered into groups of D
documents by L positions (a shorter one is filled up with copies of some row; causality keeps every real token from
seeing the filler behind it, and filler gets no gradient). Each group is then plain batched products over chunks of C
queries, a chunk reading only the keys up to its own end, so about half of the L² scores are ever computed:

    P = softmax(scale · Q Kᵀ + mask)     O = P V
    dV = Pᵀ dO     dP = dO Vᵀ     dS = P ∘ (dP − rowsum(dP ∘ P))     dQ = scale · dS K     dK = scale · dSᵀ Q

Only Q, K and V are kept, and P where documents are so short that it is no larger than they. Otherwise P is computed
again in the backward, from the same numbers and so to the same bits (the recomputation is FlashAttention's, Dao et al.
2022 §3.1).

K and V are taken about their mean over a document. A vector that all keys have in common adds one number to a whole row
of scores, which softmax doesn't see, and one that all values have in common passes through it; so neither O nor a
gradient changes, but the numbers that half precision rounds (scores, P V, dP) are smaller, the more so in a trained
model, whose keys and values share much.

On a GPU PyTorch's own attention over packed documents does most calls (varlen.py).

Why not `scaled_dot_product_attention`: its CPU kernel is made for long sequences. Measured on 2 cores, bf16, 9 heads
of 64, forward + backward (benchmarks/attention.py): 80 documents of 25 tokens 34 ms against 9 ms, 4 of 512 63 ms
against 41 ms. FlexAttention has no backward on a CPU, and a dense block mask computes all T² scores.

Letters: T tokens, H query heads, K key/value heads, G = H / K heads that share one, E head size, D documents of a
group, L its length, C queries of a chunk, S documents of the batch + 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels import varlen

CHUNK = 64  # queries at a time
FILL = 1.25  # a document joins a group whose length is at most this times its own


@dataclass(frozen=True)
class Group:
    """D documents of up to L tokens; its rows start at `offset` in the gathered order."""

    docs: int
    length: int
    offset: int
    filled: bool

    def view(self, x: Tensor, heads: int, kv_heads: int) -> Tensor:
        """This group's part of a gathered [places · heads, E] tensor, as [D · K, heads / K, L, E]."""
        part = x[self.offset * heads : (self.offset + self.docs * self.length) * heads]
        return part.view(self.docs * kv_heads, heads // kv_heads, self.length, x.shape[-1])


class Documents:
    """Where each document lies and how they are grouped: built once a batch, used by every layer.

    `starts` are the documents' offsets with the total length as the last entry.
    """

    def __init__(self, starts: list[int], device: torch.device | str = "cpu") -> None:
        lengths = [end - start for start, end in pairwise(starts)]
        if not lengths or min(lengths) < 1:
            raise ValueError("documents must have at least one token each")
        self.total, self.longest, self.device = starts[-1], max(lengths), device
        self.starts_S = torch.tensor(starts, dtype=torch.int32, device=device)
        self.groups: list[Group] = []
        rows: list[Tensor] = []  # the token in each gathered place, group after group
        real: list[Tensor] = []
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        offset = 0
        while order:
            longest = lengths[order[0]]
            members = [i for i in order if lengths[i] * FILL >= longest]
            order = order[len(members) :]
            first_D = torch.tensor([starts[i] for i in members])
            length_D = torch.tensor([lengths[i] for i in members])
            step_L = torch.arange(longest)
            real_DL = step_L < length_D[:, None]
            rows.append(torch.where(real_DL, first_D[:, None] + step_L, first_D[:, None]).flatten())
            real.append(real_DL.flatten())
            self.groups.append(Group(len(members), longest, offset, not bool(real_DL.all())))
            offset += len(members) * longest
        self.token_P, self.real_P = torch.cat(rows).to(device), torch.cat(real).to(device)
        self._layouts: dict[int, tuple[Tensor, Tensor]] = {}

    def layout(self, heads: int) -> tuple[Tensor, Tensor]:
        """(gather, scatter): row indices from [T, heads] to the groups' [D, heads, L], end to end, and back."""
        if heads not in self._layouts:
            head = torch.arange(heads, device=self.device)
            gather, scatter_TH = [], torch.empty(self.total, heads, dtype=torch.long, device=self.device)
            for group in self.groups:
                token_DL = self.part(self.token_P, group)
                gather.append((token_DL[:, None, :] * heads + head[:, None]).flatten())
                place_DHL = torch.arange(gather[-1].numel(), device=self.device) + group.offset * heads
                place_DLH = place_DHL.view(group.docs, heads, group.length).transpose(1, 2)
                real_DL = self.part(self.real_P, group)
                scatter_TH[token_DL[real_DL]] = place_DLH[real_DL]
            self._layouts[heads] = torch.cat(gather), scatter_TH.flatten()
        return self._layouts[heads]

    def part(self, x_P: Tensor, group: Group) -> Tensor:
        """A group's [D, L] part of a tensor over all gathered places."""
        return x_P[group.offset : group.offset + group.docs * group.length].view(group.docs, group.length)


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
    window = None if window is None or window >= documents.longest else window
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    if varlen.applies(q_THE, k_TKE, len(documents.starts_S) - 1, documents.longest, **options):
        return varlen.varlen_attention(q_THE, k_TKE, v_TKE, documents.starts_S, documents.longest, **options)
    out: Tensor = _PackedAttention.apply(q_THE, k_TKE, v_TKE, documents, _Scores(scale, window, softcap))
    return out


def packed_attention_plain(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    starts: list[int],
    *,
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
    document = torch.bucketize(at, torch.tensor(starts, device=at.device), right=True)
    behind = at[:, None] - at[None, :]
    seen = (behind >= 0) & (document[:, None] == document[None, :])
    if window is not None:
        seen &= behind < window
    p_HTT = s_HTT.masked_fill(~seen, -math.inf).softmax(-1)
    return (p_HTT @ v_HTE).transpose(0, 1)


@dataclass(frozen=True)
class _Scores:
    """How probabilities are made: shared by forward and backward, so that both see the same bits."""

    scale: float
    window: int | None
    softcap: float | None

    def chunks(self, length: int) -> Iterator[tuple[slice, slice]]:
        """(queries, keys) of each chunk: the keys end where the queries do."""
        for first in range(0, length, CHUNK):
            end = min(first + CHUNK, length)
            yield slice(first, end), slice(0 if self.window is None else max(0, first - self.window + 1), end)

    def keeps(self, length: int, heads: int, kv_heads: int, size: int) -> bool:
        """Whether a group's P is kept: where it is no larger than Q, K and V, which are kept anyway."""
        return length * heads <= (heads + 2 * kv_heads) * size and self.softcap is None

    def probabilities(self, q_BCE: Tensor, k_BJE: Tensor, shared: int) -> tuple[Tensor, Tensor | None]:
        """(P [B, shared · C, J], the soft cap's slope at each score or None)."""
        rows, keys = q_BCE.shape[1] // shared, k_BJE.shape[1]
        s = q_BCE.new_empty(len(q_BCE), q_BCE.shape[1], keys)
        # The scale rides on the product; with beta = 0 what stood in s before is not read.
        torch.baddbmm(s, q_BCE, k_BJE.transpose(1, 2), beta=0, alpha=self.scale, out=s)
        slope = None
        if self.softcap is not None:
            s.div_(self.softcap).tanh_()
            slope = 1 - s * s
            s.mul_(self.softcap)
        # Without a window only the last `rows` keys can lie ahead of a query.
        width = rows if self.window is None else keys
        query = torch.arange(keys - rows, keys, device=s.device)
        behind = query[:, None] - torch.arange(keys - width, keys, device=s.device)
        hidden = behind < 0 if self.window is None else (behind < 0) | (behind >= self.window)
        # Added, not filled in: five times as fast on a CPU.
        mask = s.new_zeros(rows, width).masked_fill_(hidden, -math.inf)
        s.view(-1, shared, rows, keys)[..., keys - width :].add_(mask)
        return torch.softmax(s, -1), slope


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scores: _Scores) -> Tensor:
        (T, H, E), K = q.shape, k.shape[1]
        gather_q, scatter_q = documents.layout(H)
        gather_k, _ = documents.layout(K)
        q = q.reshape(T * H, E).index_select(0, gather_q)
        k = k.reshape(T * K, E).index_select(0, gather_k)
        v = v.reshape(T * K, E).index_select(0, gather_k)
        o = torch.empty_like(q)
        kept: list[Tensor] = []
        for group in documents.groups:
            q4, o4 = (group.view(x, H, K) for x in (q, o))
            k3, v3 = (group.view(x, K, K).squeeze(1) for x in (k, v))
            if scores.softcap is None:
                k3.sub_(k3.mean(1, keepdim=True))
            mean_B1E = v3.mean(1, keepdim=True)
            v3.sub_(mean_B1E)
            for rows, keys in scores.chunks(group.length):
                p, _ = scores.probabilities(q4[:, :, rows].flatten(1, 2), k3[:, keys], H // K)
                o4[:, :, rows] = torch.bmm(p, v3[:, keys]).view_as(o4[:, :, rows])
                if scores.keeps(group.length, H, K, E):
                    kept.append(p)
            o4.add_(mean_B1E.unsqueeze(1))
        ctx.save_for_backward(q, k, v, *kept)
        ctx.documents, ctx.scores, ctx.heads = documents, scores, (H, K)
        return o.index_select(0, scatter_q).view(T, H, E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        documents, scores, (H, K) = ctx.documents, ctx.scores, ctx.heads
        T, E = documents.total, q.shape[1]
        gather_q, scatter_q = documents.layout(H)
        _, scatter_k = documents.layout(K)
        do = grad_THE.reshape(T * H, E).index_select(0, gather_q)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for group in documents.groups:
            q4, do4, dq4 = (group.view(x, H, K) for x in (q, do, dq))
            k3, v3, dk3, dv3 = (group.view(x, K, K).squeeze(1) for x in (k, v, dk, dv))
            if group.filled:
                filler_DL = ~documents.part(documents.real_P, group)
                do4.view(group.docs, H, group.length, E).masked_fill_(filler_DL[:, None, :, None], 0)
            for rows, keys in scores.chunks(group.length):
                q_rows, do_rows = q4[:, :, rows].flatten(1, 2), do4[:, :, rows].flatten(1, 2)
                if scores.keeps(group.length, H, K, E):
                    p, slope = kept.pop(0), None
                else:
                    p, slope = scores.probabilities(q_rows, k3[:, keys], H // K)
                dv3[:, keys] += torch.bmm(p.transpose(1, 2), do_rows)
                dp = torch.bmm(do_rows, v3[:, keys].transpose(1, 2))
                # P ∘ (dP − rowsum(dP ∘ P)) in one pass, sums in float32
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                if slope is not None:
                    ds.mul_(slope)
                dq4[:, :, rows] = torch.bmm(ds, k3[:, keys]).view_as(dq4[:, :, rows])
                dk3[:, keys] += torch.bmm(ds.transpose(1, 2), q_rows)
        dq.mul_(scores.scale)
        dk.mul_(scores.scale)
        return (
            dq.index_select(0, scatter_q).view(T, H, E),
            dk.index_select(0, scatter_k).view(T, K, E),
            dv.index_select(0, scatter_k).view(T, K, E),
            None,
            None,
        )
