"""Attention of a run of N new tokens over all L that their sequence has stored, the run's own the last of them.

    P = softmax(scale · Q Kᵀ + mask)      O = P V        query n of N sees the keys up to place L − N + n

This is what a long prompt's later pieces need, and a prompt whose beginning is stored already. Keys and values are read
where they lie, run by run: nothing is padded or gathered. As in packed attention (attention.py), whose scores these
are, C queries at a time read the keys up to their own end, and the G queries that share a key stand side by side. Half
precision goes to `scaled_dot_product_attention`, which sums in float32, and so do all of a GPU's formats (decode.py).

Forward alone: nothing is trained through a cache.

Letters: N tokens of the run, L places, H query heads, K key/value heads, G = H / K, E head size, C queries, J keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.kernels.device import HALF
from deltaw.kernels.documents import CHUNK
from deltaw.kernels.scores import Scores, causal_mask


def continued_attention(
    q_NHE: Tensor,
    k_KLE: Tensor,
    v_KLE: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[N, H, E]. `window` w: a token sees itself and the w − 1 before it; `softcap` c: c · tanh(s / c)."""
    (N, H, E), (K, L) = q_NHE.shape, k_KLE.shape[:2]
    window = None if window is None or window >= L else window
    scores, builtin = Scores(scale, window, softcap), softcap is None and (q_NHE.is_cuda or q_NHE.dtype in HALF)
    out_NHE = torch.empty_like(q_NHE)
    for start in range(0, N, CHUNK):
        end = min(start + CHUNK, N)
        last = L - N + end
        keys = slice(0 if window is None else max(0, L - N + start - window + 1), last)
        k_KJE, v_KJE = k_KLE[:, keys], v_KLE[:, keys]
        q_KQE = q_NHE[start:end].view(end - start, K, -1, E).permute(1, 2, 0, 3).reshape(K, -1, E)
        if builtin:
            bias_CJ = causal_mask(end - start, k_KJE.shape[1], window, q_NHE.dtype, q_NHE.device)
            bias_QJ = bias_CJ.repeat(H // K, 1)
            o_KQE = F.scaled_dot_product_attention(q_KQE[None], k_KJE[None], v_KJE[None], bias_QJ, scale=scale)[0]
        else:
            p_KQJ, _ = scores.probabilities(q_KQE, k_KJE, H // K)
            o_KQE = torch.bmm(p_KQJ, v_KJE)
        out_NHE[start:end].view(end - start, K, -1, E).copy_(o_KQE.view(K, -1, end - start, E).permute(2, 0, 1, 3))
    return out_NHE


def continued_attention_plain(
    q_NHE: Tensor,
    k_KLE: Tensor,
    v_KLE: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The twin: shared heads repeated, all scores, masked where a query doesn't see."""
    (N, H, _), (K, L) = q_NHE.shape, k_KLE.shape[:2]
    k_HLE, v_HLE = k_KLE.repeat_interleave(H // K, 0), v_KLE.repeat_interleave(H // K, 0)
    s_HNL = scale * (q_NHE.transpose(0, 1) @ k_HLE.transpose(1, 2))
    if softcap is not None:
        s_HNL = softcap * torch.tanh(s_HNL / softcap)
    behind = torch.arange(L - N, L, device=q_NHE.device)[:, None] - torch.arange(L, device=q_NHE.device)
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    return (s_HNL.masked_fill(hidden, -torch.inf).softmax(-1) @ v_HLE).transpose(0, 1)
