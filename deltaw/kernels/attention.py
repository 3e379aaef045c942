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

On a GPU PyTorch's own attention over packed documents does most calls (varlen.py).

Why not `scaled_dot_product_attention`: its CPU kernel is made for long sequences. Measured on 2 cores, bf16, 9 heads
of 64, forward + backward (benchmarks/attention.py): 80 documents of 25 tokens 27 ms against 7 ms, 4 of 512 55 ms
against 31 ms. FlexAttention has no backward on a CPU, and a dense block mask computes all T² scores.

Letters: T tokens, H query heads, K key/value heads, G = H / K heads that share one, E head size, D documents of a
group, L its length, C queries of a chunk, S documents of the batch + 1.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

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

    def rows(self, x: Tensor, heads: int, kv_heads: int, part: slice) -> Tensor:
        """[D · K, heads / K · C, E]: C positions of all documents, which lie together in a gathered tensor. A view."""
        first = (self.offset + self.docs * part.start) * heads
        count = self.docs * heads * (part.stop - part.start)
        return x[first : first + count].view(self.docs * kv_heads, -1, x.shape[-1])

    def whole(self, x: Tensor, heads: int) -> Tensor:
        """[D · heads, L, E] of a tensor gathered in one piece."""
        return self.rows(x, heads, heads, slice(0, self.length))

    def part(self, x_P: Tensor) -> Tensor:
        """Its [D, L] part of a tensor over all gathered places."""
        return x_P[self.offset : self.offset + self.docs * self.length].view(self.docs, self.length)


class _Grouping(NamedTuple):
    """Groups of documents, and by gathered place: the token there, and whether it is real."""

    groups: list[Group]
    token_P: Tensor
    real_P: Tensor

    @staticmethod
    def of(starts: list[int]) -> "_Grouping":
        lengths = [end - start for start, end in pairwise(starts)]
        groups: list[Group] = []
        rows: list[Tensor] = []
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
            groups.append(Group(len(members), longest, offset))
            offset += len(members) * longest
        return _Grouping(groups, torch.cat(rows), torch.cat(real))


@dataclass(frozen=True)
class Layout:
    """Row indices from [T · heads] to the gathered order and back, and the gathered rows that are filler."""

    gather: Tensor
    scatter: Tensor
    filler: Tensor


class Documents:
    """Where each document lies and how they are grouped: built once per batch, used by every layer.

    `starts` are the documents' offsets with the total length as the last entry. Raises ValueError for an empty one.
    How they are grouped is worked out when it is first asked for: a GPU's attention doesn't ask.
    """

    def __init__(self, starts: list[int], device: torch.device | str = "cpu") -> None:
        lengths = [end - start for start, end in pairwise(starts)]
        if not lengths or min(lengths) < 1:
            raise ValueError("documents must have at least one token each")
        self.starts, self.total, self.longest, self.device = starts, starts[-1], max(lengths), device
        self.starts_S = torch.tensor(starts, dtype=torch.int32, device=device)
        self._grouping: _Grouping | None = None
        self._layouts: dict[tuple[int, bool], Layout] = {}

    def among(self, starts_S: Tensor, longest: int) -> "Documents":
        """These documents, for a pass in which attention reads the offsets from `starts_S` (empty ones may follow) and
        is told of `longest` tokens at most."""
        there = copy.copy(self)
        there.starts_S, there.longest, there.device = starts_S, longest, starts_S.device
        there._layouts = {}
        return there

    def to(self, device: torch.device | str) -> "Documents":
        """The same on `device`: itself where it is there."""
        if torch.device(device) == torch.device(self.device):
            return self
        moved = copy.copy(self)
        moved.device, moved._layouts = device, {}
        moved.starts_S = self.starts_S.to(device, non_blocking=True)
        return moved

    @property
    def groups(self) -> list[Group]:
        """Documents of like length, the longest first."""
        return self._grouped().groups

    def _grouped(self) -> "_Grouping":
        if self._grouping is None:
            self._grouping = _Grouping.of(self.starts)
        return self._grouping

    def layout(self, heads: int, *, in_chunks: bool = False) -> Layout:
        """Where the rows of [T, heads] go. `in_chunks`: the documents of a group advance together, chunk by chunk."""
        key = heads, in_chunks
        if key not in self._layouts:
            head = torch.arange(heads, device=self.device)
            gather, filler = [], []
            token_P, real_P = (x.to(self.device, non_blocking=True) for x in self._grouped()[1:])
            for group in self.groups:
                token_DL, real_DL = group.part(token_P), group.part(real_P)
                step = CHUNK if in_chunks else group.length
                for token_DC, real_DC in zip(token_DL.split(step, 1), real_DL.split(step, 1), strict=True):
                    gather.append((token_DC[:, None] * heads + head[:, None]).flatten())
                    filler.append(~real_DC[:, None].expand(-1, heads, -1).flatten())
            places, is_filler = torch.cat(gather), torch.cat(filler)
            scatter = torch.empty(self.total * heads, dtype=torch.long, device=self.device)
            scatter[places[~is_filler]] = (~is_filler).nonzero().squeeze(1)
            self._layouts[key] = Layout(places, scatter, is_filler.nonzero().squeeze(1))
        return self._layouts[key]


class OffsetsAlone(Documents):
    """Documents of which only a tensor knows where they lie: those of a captured pass, which will be run on others.

    Attention that reads the offsets from `starts_S` can do with them; whatever asks for more is refused, since it would
    be captured with one batch's answer.
    """

    def __init__(self, starts_S: Tensor, total: int, longest: int) -> None:
        self.starts_S, self.total, self.longest, self.device = starts_S, total, longest, starts_S.device
        self._layouts = {}

    @property
    def starts(self) -> list[int]:  # type: ignore[override]
        """Nobody on the host knows them."""
        raise NotImplementedError("where a batch's documents lie is asked within a pass")

    def _grouped(self) -> "_Grouping":
        raise NotImplementedError("its attention arranges the documents of each batch in another way")


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
    out: Tensor = _PackedAttention.apply(q_THE, k_TKE, v_TKE, documents, Scores(scale, window, softcap))
    return out.view(q_THE.shape)  # outside: a view made in a Function may not be written to


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
class Scores:
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
        s.view(-1, shared, rows, keys)[..., keys - width :].add_(
            causal_mask(rows, width, self.window, s.dtype, s.device)
        )
        return torch.softmax(s, -1), slope


@lru_cache(maxsize=32)
def causal_mask(rows: int, width: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, width]: −∞ at the keys that a query must not see; the last query is the last key's token.

    Added, not filled in: five times as fast on a CPU.
    """
    query, key = torch.arange(width - rows, width, device=device), torch.arange(width, device=device)
    behind = query[:, None] - key
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    return torch.zeros(rows, width, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)


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
