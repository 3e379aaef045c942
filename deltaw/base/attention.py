"""The attention that packs documents, under a name that transformers' registry knows.

Registered as `deltaw`, it is `packed_attention` when the call carries `documents` (an unknown keyword, which
transformers hands through to attention), and otherwise scaled-dot-product attention, so that training and generation
need no switch. Its mask function makes no mask for a full causal pass: a packed batch would need one of T² entries.

So what a model states in its mask, and doesn't tell attention as an argument (Llama 4's chunks, the windows of some
mixtures of experts), would be lost. `deltaw_asked` is the same attention under real masks that say what was asked for:
each carries its mask function, which answers for any two places, also far beyond the pass it was made in. Whether that
is no more than causality and the window that attention is told is then a question of arithmetic, and only a model for
which it is so (`AttentionCall.honest`) runs under `deltaw` (probe.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deltaw.kernels.attention import Documents, packed_attention

ATTENTION, ASKED = "deltaw", "deltaw_asked"
SEES = "deltaw_sees"  # the attribute by which a mask that was asked for carries its function
# What reaches attention without a meaning there: options of the model's own forward, handed down through its layers.
# Whatever else arrives (sinks, a bias, the indices of a sparse selection) would be lost, so that it isn't packed.
MEANINGLESS = {"position_ids", "cache_position", "use_cache", "return_dict"}

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key -> whether the query sees the key


@dataclass(frozen=True)
class AttentionCall:
    """What a module asks of attention beside its queries, keys and values. Window in tokens, itself included.

    `sees`: what its mask lets through, where the pass ran under masks that say so; None where none did.
    """

    head_size: int
    scale: float | None
    window: int | None
    softcap: float | None
    masked: bool = False
    sees: Sees | None = None

    def honest(self, query: Tensor, key: Tensor) -> bool:
        """Whether its mask is causality and `window` and nothing else, at the pairs of places (query, key)."""
        if self.sees is None:
            return not self.masked and self.window is None  # without a mask the model's own attention is causal alone
        told = (key <= query) if self.window is None else (key <= query) & (query - key < self.window)
        first = query.new_zeros(())  # row and head
        try:
            asked = self.sees(first, first, query, key)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return False  # it answers for the places of its own pass alone
        return torch.equal(asked.expand_as(told), told)


def pairs(borders: Iterable[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(query, key) on both sides of every one of `borders`, by place and by distance, ahead of it too."""
    near = {n for border in borders for n in (border - 1, border, border + 1, 2 * border, 2 * border + 1)}
    places = torch.tensor(sorted(near | set(range(70))), device=device)
    query, behind = torch.cartesian_prod(places, torch.cat([places.new_tensor([-70, -2, -1]), places])).unbind(1)
    real = query >= behind
    return query[real], (query - behind)[real]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    calls: dict[nn.Module, AttentionCall] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [B, H, L, E], key and value [B, K, L', E] -> [B, L, H, E].

    `calls`, if given, is told who called and how (`watched_pass`).
    """
    if s_aux is not None or position_bias is not None:
        raise NotImplementedError("attention with sinks or a position bias")
    if calls is not None:
        _note(
            calls, module, AttentionCall(query.shape[3], scaling, sliding_window, softcap, *_of(attention_mask)), kwargs
        )
    plain = attention_mask is None and query.shape[2] == key.shape[2]
    if documents is None and plain:
        documents = _rows(query, kwargs.get("position_ids"))
    if documents is not None and plain:
        out = packed_attention(
            query.transpose(1, 2).flatten(0, 1),
            key.transpose(1, 2).flatten(0, 1),
            value.transpose(1, 2).flatten(0, 1),
            documents,
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
        )
        return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None
    if softcap is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    return _capped_attention(query, key, value, attention_mask, scaling, softcap), None


def _rows(query: Tensor, position_ids: Tensor | None) -> Documents:
    """The documents of a model that is simply called: its rows, cut where positions begin anew, as by transformers."""
    rows, length = query.shape[0], query.shape[2]
    starts = {row * length for row in range(rows + 1)}
    if position_ids is not None and position_ids.shape[1:] == (length,):
        cuts = (position_ids.expand(rows, length).diff() != 1).nonzero() + torch.tensor([0, 1], device=query.device)
        starts |= {row * length + place for row, place in cuts.tolist()}
    return Documents(sorted(starts), query.device)


def _of(mask: Tensor | None) -> tuple[bool, Sees | None]:
    """(whether there is a mask, what it lets through)."""
    return mask is not None, getattr(mask, SEES, None)


def _note(calls: dict[nn.Module, AttentionCall], module: nn.Module, call: AttentionCall, more: dict[str, Any]) -> None:
    """Write down a call. Raises NotImplementedError for one that attention here doesn't do justice to."""
    given = {name for name, value in more.items() if value is not None and not (name == "is_causal" and value)}
    strange = sorted(name for name in given - MEANINGLESS if not name.startswith("output_"))
    if strange:
        raise NotImplementedError(f"attention with {', '.join(strange)}")
    if calls.setdefault(module, call) != call:
        raise NotImplementedError("a module that calls attention in two ways")


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Masked attention with soft-capped scores (Gemma 2), for generation: [B, L, H, E]."""
    shared = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(shared, 1).transpose(2, 3)
    scores = softcap * torch.tanh(scores * (scaling or query.shape[-1] ** -0.5) / softcap)
    if mask is not None:
        # Not −∞: a padding token that sees nothing must not become NaN, which its value rows would hand on.
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value.repeat_interleave(shared, 1)).transpose(1, 2)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for a full causal pass, transformers' own for everything else (padding, a cache)."""
    q_length, kv_length = kwargs.get("q_length"), kwargs.get("kv_length")
    if kwargs.get("attention_mask") is None and q_length == kv_length and not kwargs.get("q_offset"):
        return None
    kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _asked_mask(*args: Any, **kwargs: Any) -> Tensor:
    """The mask that was asked for, with its function."""
    kwargs["allow_is_causal_skip"] = kwargs["allow_is_bidirectional_skip"] = False
    mask: Tensor = sdpa_mask(*args, **kwargs)
    setattr(mask, SEES, kwargs.get("mask_function"))
    return mask


for name, mask_of in ((ATTENTION, _mask), (ASKED, _asked_mask)):
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, mask_of)
