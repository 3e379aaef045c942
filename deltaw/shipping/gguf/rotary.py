"""From a config's rope_parameters to a GGUF's keys for rotary positions: base/gguf_rope.py in reverse.

    linear      rope.scaling.type, .factor
    YaRN        the same, and .original_context_length, .yarn_beta_fast / _slow where they are set, and .attn_factor
                where cos and sin aren't scaled by 1 + ln(F) / 10, which is what llama.cpp does by itself
    llama3      rope_freqs.weight: by how much each frequency is smaller than unscaled
    longrope    rope_factors_long.weight, rope_factors_short.weight, .original_context_length, .attn_factor

The divisors of llama3 and the factor on cos and sin come from transformers' own functions, which the model itself uses.
Gemma 3 has two sets: layers with a window are not scaled, and their base is .freq_base_swa. Refused: scalings that
llama.cpp has no form for (dynamic NTK), or not in this architecture.
"""

import math
from typing import Any

import torch

from deltaw.base.gguf_rope import FREQS, LONG, SHORT
from deltaw.shipping.gguf.fields import Fields

KNOWN = {"llama": ("linear", "yarn", "llama3"), "phi3": ("linear", "yarn", "longrope"), "gemma3": ("linear",)}
USUAL = ("linear", "yarn")
LOCAL = 10_000.0  # Gemma 3's base in layers with a window, where the file has none
NEUTRAL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

Spoken = tuple[dict[str, Any], dict[str, list[float]]]


def rotary(fields: Fields, architecture: str, head_dim: int, context: int, notes: list[str]) -> Spoken:
    """(keys, tensors). What can't be said is noted in `fields`."""
    config = fields.config
    fields.take("original_max_position_embeddings")  # also in the parameters, where it counts
    parameters = dict(fields.take("rope_parameters"))
    near = parameters.pop("sliding_attention", None)
    layer = "full_attention" if "full_attention" in parameters else None
    rope = {name: value for name, value in (parameters[layer] if layer else parameters).items() if value is not None}
    share = rope.get("partial_rotary_factor", 1.0)
    if share != 1.0 and architecture != "phi3":
        fields.refuse(f"partial_rotary_factor = {share}")
    dim = int(head_dim * share)
    keys: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": dim}
    if near is not None:
        keys |= _near(fields, architecture, near, keys["rope.freq_base"])
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return keys, {}
    if kind not in KNOWN.get(architecture, USUAL):
        fields.refuse(f"rope_parameters of the type {kind!r}")
        return keys, {}
    used, tensors = set(NEUTRAL), dict[str, list[float]]()
    frequencies, grown = _asked(config, kind, layer)
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        used |= {"factor"}
    elif kind == "yarn":
        keys |= _yarn(fields, rope, grown, context)
        used |= {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}
        used |= {"mscale", "mscale_all_dim", "truncate"}
    elif kind == "llama3":
        plain = torch.tensor([rope["rope_theta"] ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
        tensors[FREQS] = (plain / frequencies.double()).tolist()
        used |= {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    else:
        keys |= _longrope(rope, grown, notes)
        tensors |= {LONG: list(rope["long_factor"]), SHORT: list(rope["short_factor"])}
        used |= {"factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"}
        used |= {"short_mscale", "long_mscale"}
    for name in rope.keys() - used:
        fields.refuse(f"{name} = {str(rope[name])[:40]} in rope_parameters")
    return keys, tensors


def _near(fields: Fields, architecture: str, near: dict[str, Any], base: float) -> dict[str, Any]:
    """The base of layers with a window."""
    if near.get("rope_type", "default") != "default":
        fields.refuse(f"rope_parameters of the type {near['rope_type']!r} in layers with a window")
    local = float(near["rope_theta"])
    if architecture != "gemma3" and local != base:
        fields.refuse(f"rope_theta = {local} in layers with a window")
    return {"rope.freq_base_swa": local} if local != LOCAL else {}


def _asked(config: Any, kind: str, layer: str | None) -> tuple[torch.Tensor, float]:
    """Frequencies, and the factor on cos and sin, by transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, grown = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer)
    return frequencies, float(grown)


def _yarn(fields: Fields, rope: dict[str, Any], grown: float, context: int) -> dict[str, Any]:
    original = int(rope["original_max_position_embeddings"])
    factor = float(rope.get("factor") or context / original)
    keys: dict[str, Any] = {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
    keys["rope.scaling.original_context_length"] = original
    for name in ("beta_fast", "beta_slow"):
        if name in rope:
            keys[f"rope.scaling.yarn_{name}"] = float(rope[name])
    attention = grown / (1 + 0.1 * math.log(factor)) if factor > 1 else grown
    if factor <= 1:
        fields.refuse(f"factor = {factor} in rope_parameters")
    if not math.isclose(attention, 1.0, rel_tol=1e-6):
        keys["rope.scaling.attn_factor"] = attention
    if not rope.get("truncate", True):
        fields.refuse("truncate = False in rope_parameters")
    return keys


def _longrope(rope: dict[str, Any], grown: float, notes: list[str]) -> dict[str, Any]:
    original = int(rope["original_max_position_embeddings"])
    notes.append(
        f"llama.cpp rotates by the long factors whenever it is run with a context above {original:,}: "
        f"run it with -c {original} unless longer texts are meant"
    )
    return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": grown}
