"""A small copy of a model, whose config says the same at lengths that are cheap to cross.

A window of 4,096 tokens would take a pass of 4,096 tokens to see, too expensive on the model itself. Its copy has the
same class, the same switches, a layer of each kind at least, few heads and narrow MLPs, and every number that could be
a length (all that isn't a count, a head's size, a rank or a token's id) is `BORDER`. Weights are random: what is tried
on it is how documents are kept apart, not what they say.

A copy that can't be built or run like this proves nothing and gives None.
"""

import copy
from typing import Any

import torch
from torch import nn

from deltaw.base.probe import CONTEXTS

BORDER, CONTEXT, VOCABULARY, HEADS, LAYERS = 16, 64, 61, 4, 4
KINDS = 8  # different entries of a list by layer that may be kinds; more are numbers of layers
KEPT = ("dim", "rank", "head", "layer", "expert", "_id")  # in the names of sizes that aren't lengths
COUNTS = ("num_", "n_")  # before them


def small_copy(model: nn.Module) -> nn.Module | None:
    """`model` in small, with random weights in float32, on the CPU; or None."""
    try:
        config = _small(copy.deepcopy(model.config))
        with torch.random.fork_rng(devices=[]):  # a model draws its first weights from the global generator
            small = type(model)(config).float().eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for parameter in small.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15, generator=generator)
        out = small(input_ids=torch.arange(CONTEXT - 5)[None] % VOCABULARY, use_cache=False).logits
    except Exception:  # whatever a stranger's class says to a config of another size
        return None
    return small if bool(torch.isfinite(out).all()) else None


def _small(config: Any) -> Any:
    """The config with few layers, few heads and every length at `BORDER`, in place."""
    text = config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None)
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    by_layer = [value for value in text.to_dict().values() if isinstance(value, list) and len(value) == layers]
    fewer = min(layers, max([LAYERS, *(_prefix(entries) for entries in by_layer)]))
    _shorten(text.__dict__, layers, fewer)
    text.num_hidden_layers, text.num_attention_heads = fewer, min(heads, HEADS)
    text.hidden_size, text.vocab_size = text.num_attention_heads * size, VOCABULARY
    if groups is not None:
        text.num_key_value_heads = text.num_attention_heads if groups == heads else min(groups, HEADS // 2)
    for name in CONTEXTS:
        if getattr(text, name, None):
            setattr(text, name, CONTEXT)
    return config


def _prefix(entries: list[Any]) -> int:
    """How many of the first entries show every kind."""
    kinds = [str(entry) for entry in entries]
    return max(kinds.index(kind) for kind in kinds) + 1 if len(set(kinds)) <= KINDS else 0


def _shorten(settings: dict[str, Any], layers: int, fewer: int) -> None:
    """Lists by layer to `fewer` entries, lengths to `BORDER`, token ids into the vocabulary; at any depth."""
    for name, value in settings.items():
        if isinstance(value, dict):
            _shorten(value, layers, fewer)
        elif isinstance(value, list) and len(value) == layers:
            settings[name] = value[:fewer]
        elif type(value) is int and value > BORDER and "_id" in name:
            settings[name] = 0
        elif type(value) is int and value > BORDER and not name.startswith(COUNTS):
            settings[name] = value if any(part in name for part in KEPT) else BORDER
