"""A config.json that older readers understand, too.

transformers 5 writes rotary positions as `rope_parameters`. Before it, and in whatever was written for it (MLX's
models, older servers), they were `rope_theta`, `rope_scaling` and `partial_rotary_factor` at the top; a reader that
finds none of these takes a default of its own, 10,000 as a rule, and silently answers wrongly. So both are
written, where the older form can say the same. transformers 5 reads the two together as it reads the new one alone
(folder.py holds the folder to that).
"""

from typing import Any

NEW, THETA, SCALING, PARTIAL = "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"
LAYERS = {"full_attention", "sliding_attention"}  # Gemma 3's two kinds
LOCAL = "rope_local_base_freq"
PLAIN = {None, "default"}


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """The config, and its text model's, with rotary positions in both forms; as it is where there is no older one."""
    inner = config.get("text_config")
    return {**config, **({"text_config": with_older_names(inner)} if isinstance(inner, dict) else {}), **_older(config)}


def _older(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get(NEW)
    if not isinstance(rope, dict) or THETA in config or SCALING in config:
        return {}
    local: dict[str, Any] = {}
    if set(rope) == LAYERS and config.get("model_type", "").startswith("gemma3"):
        near, rope = rope["sliding_attention"], rope["full_attention"]
        if near.get("rope_type") not in PLAIN:
            return {}
        local = {LOCAL: near.get(THETA)}
    if any(isinstance(value, dict) for value in rope.values()) or THETA not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key not in (THETA, PARTIAL)}
    older = {THETA: rope[THETA], SCALING: None if scaling.get("rope_type") in PLAIN else scaling, **local}
    return older | ({PARTIAL: rope[PARTIAL]} if PARTIAL in rope else {})
