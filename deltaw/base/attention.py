"""The attention that packs documents, under a name that transformers' registry knows.

Each model has a name of its own there (`deltaw-3`), for an attention that knows the model's `Passing` (batch.py): it is
`packed_attention` where the running pass says how its documents lie, and otherwise scaled-dot-product attention, so
that training and generation need no switch. Its mask function makes no mask for a full causal pass: a packed batch
would need one of T² entries.

So what a model states in its mask, and doesn't tell attention as an argument (Llama 4's chunks, the windows of some
mixtures of experts), would be lost. A pass whose probe is `Calls(ask=True)` gets real masks instead, and each carries
its mask function, which answers for any two places, also far beyond the pass it was made in. Whether that is no more
than causality and the window that attention is told is then a question of arithmetic, and only a model for which it is
so (`AttentionCall.honest`) is run packed (probe.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deltaw.base.passing import Passing, passing_of
from deltaw.kernels.attention import packed_attention
from deltaw.kernels.documents import Documents

NAME = "deltaw-"  # and a number, in transformers' registry
SEES = "deltaw_sees"  # the attribute by which a mask that was asked for carries its function
# Arguments that mean nothing to attention: options of the model's own forward, handed down through its layers.
# Anything else (sinks, a bias, the indices of a sparse selection) would be lost, so such a model isn't packed.
MEANINGLESS = {"position_ids", "cache_position", "use_cache", "return_dict"}

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key -> whether the query sees the key


@dataclass(frozen=True)
class AttentionCall:
    """What a module asks of attention besides its queries, keys and values. Window in tokens, itself included.

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


class Calls(dict[nn.Module, AttentionCall]):
    """A pass's probe: who called attention, and how. `ask`: under real masks that say what they let through."""

    def __init__(self, *, ask: bool = False) -> None:
        super().__init__()
        self.ask = ask

    def note(self, module: nn.Module, call: AttentionCall, more: dict[str, Any]) -> None:
        """Write down a call. Raises NotImplementedError for one that attention here can't reproduce."""
        given = {name for name, value in more.items() if value is not None and not (name == "is_causal" and value)}
        strange = sorted(name for name in given - MEANINGLESS if not name.startswith("output_"))
        if strange:
            raise NotImplementedError(f"attention with {', '.join(strange)}")
        if self.setdefault(module, call) != call:
            raise NotImplementedError("a module that calls attention in two ways")


_numbers = count(1)


def packed_attention_of(model: nn.Module) -> str:
    """The name under which transformers knows this model's packed attention. The registry lives as long as the process
    and never forgets a name, so each model gets one only when it is asked for."""
    passing = passing_of(model)
    if not passing.attention:
        passing.attention = f"{NAME}{next(_numbers)}"
        AttentionInterface.register(passing.attention, partial(_attention, passing))
        AttentionMaskInterface.register(passing.attention, partial(_mask, passing))
    return passing.attention


def is_packed(model: nn.Module) -> bool:
    """Whether the model is on its packed attention, where `plan_forward` left it if it can be."""
    return str(model.config._attn_implementation).startswith(NAME)  # type: ignore[union-attr]


def _attention(
    passing: Passing,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [B, H, L, E], key and value [B, K, L', E] -> [B, L, H, E]."""
    this = passing.current
    if s_aux is not None or position_bias is not None:
        raise NotImplementedError("attention with sinks or a position bias")
    if isinstance(this.probe, Calls):
        masked, sees = attention_mask is not None, getattr(attention_mask, SEES, None)
        this.probe.note(module, AttentionCall(query.shape[3], scaling, sliding_window, softcap, masked, sees), kwargs)
    plain = attention_mask is None and query.shape[2] == key.shape[2]
    documents = this.documents
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
    """The documents of a model that is simply called: its rows, cut where positions start over, as by transformers."""
    rows, length = query.shape[0], query.shape[2]
    starts = {row * length for row in range(rows + 1)}
    if position_ids is not None and position_ids.shape[1:] == (length,):
        cuts = (position_ids.expand(rows, length).diff() != 1).nonzero() + torch.tensor([0, 1], device=query.device)
        starts |= {row * length + place for row, place in cuts.tolist()}
    return Documents(sorted(starts), query.device)


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


def _mask(passing: Passing, *args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for a full causal pass, transformers' own for everything else (padding, a cache)."""
    if isinstance(passing.current.probe, Calls) and passing.current.probe.ask:
        return _asked_mask(*args, **kwargs)
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
