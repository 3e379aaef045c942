"""The meaning of a GGUF's keys and tensors, by architecture: each is mapped, known to carry no mathematics, or refused.

transformers' reader looks up the keys it knows and passes over the rest, so a file may say "scale the rotary
frequencies by 8" or "cap the logits at 30", and the resulting model does neither. Here it is the other way round:
every key of the architecture is handed out once (gguf_keys.py) to whatever turns it into a field of the config, and
what is left over is refused by name. So a key that is invented tomorrow is refused tomorrow.

    config       a key sets a field, and so does what llama.cpp assumes where a key is absent (θ = 10,000, as many
                 key-value heads as heads): the defaults of transformers' classes are those of one checkpoint
    neutral      a key that may stand there as long as it says what would happen anyway (`logit_scale` 1)
    no numbers   `general.*`, sizes of quantisation, ids of tokens for other uses, and namespaces of other tools
    tensors      the factors of rotary scaling become fields; all others must become weights, number by number (gguf.py)

An architecture without a table here is refused, even where transformers has a reader for it: nobody has checked its
keys against the mathematics. `llama` with a sliding window is Mistral's model: the same weights, and a config that has
the window.
"""

from pathlib import Path
from typing import Any, NamedTuple

from deltaw.base.gguf_keys import Keys
from deltaw.base.gguf_rope import FREQS, LONG, SHORT, rope_parameters
from deltaw.errors import InputError, listed
from deltaw.files.gguf_header import Header, read_floats

FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
}
LAYER_NORM = "attention.layer_norm_epsilon"
# What an architecture names otherwise, or has beside the common fields.
OWN: dict[str, dict[str, str]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": {
        "attention.sliding_window": "sliding_window",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "phi3": {"attention.sliding_window": "sliding_window"},
    "starcoder2": {LAYER_NORM: "norm_epsilon", "attention.sliding_window": "sliding_window"},
    "stablelm": {LAYER_NORM: "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
    "gpt2": {LAYER_NORM: "layer_norm_epsilon", "feed_forward_length": "n_inner"},
    "nemotron": {LAYER_NORM: "norm_eps"},
    "qwen2moe": {**EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    "qwen3moe": EXPERTS,
}
PARTIAL = {"stablelm", "phi3", "nemotron"}  # rotate a share of each head
GEMMA = {"gemma2": 46, "gemma3": 62}  # and the number of layers of the one size whose queries are scaled otherwise
UNROTATED = {"gpt2"}
# Keys that change nothing while they say this.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (1,),  # softmax
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
    "use_parallel_residual": (False,),
}
SPACES = ("rope", "attention", "adapter", "clip")  # of keys that a reader would look at
TOKENIZER = {  # read by transformers or by gguf_tokens.py, or ids for uses that training doesn't have
    "tokenizer.chat_template",
    "tokenizer.chat_templates",
    "tokenizer.huggingface.json",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_sep_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.token_type_count",
    "tokenizer.ggml.tokens",
}


class Meaning(NamedTuple):
    """`model_type`: the config's, if it isn't the one that transformers' reader takes. `config`: its fields, as they
    must be. `tensors`: those that became fields."""

    model_type: str | None
    config: dict[str, Any]
    tensors: frozenset[str]


def read_meaning(path: Path, header: Header) -> Meaning:
    """The config that the file describes. Raises InputError naming whatever it says beside that."""
    keys = Keys(path, header.metadata)
    architecture = keys.architecture
    if architecture not in OWN:
        raise InputError(
            f"{path}: deltaw doesn't read GGUF files of the architecture {architecture[:40]!r}",
            fix=f"use a safetensors version of the model; as GGUF: {', '.join(OWN)}",
        )
    _check_others(path, header.metadata, architecture)
    fields = {**FIELDS, **OWN[architecture]}
    config = {field: keys.number(suffix) for suffix, field in fields.items() if suffix in keys}
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if not heads or not width:
        raise InputError(f"{path}: doesn't say {architecture}.attention.head_count or .embedding_length")
    head_dim = keys.number("attention.key_length", width // heads)
    keys.expect("attention.value_length", head_dim)
    if head_dim * heads != width or architecture in {"llama", "qwen3", *GEMMA}:
        config["head_dim"] = head_dim
    if architecture == "llama" and "num_key_value_heads" not in config:  # its rows are permuted by that number
        raise InputError(f"{path}: doesn't say llama.attention.head_count_kv", fix="get a newer version of the file")
    if architecture not in UNROTATED:
        config.setdefault("num_key_value_heads", heads)
        config |= _positions(keys, architecture, config, head_dim, _factors(path, header))
    config |= _attention(keys, architecture, config, head_dim)
    model_type = _window(keys, architecture, config)
    rows = header.shapes.get("token_embd.weight", (0, 0))[-1]
    keys.expect("vocab_size", rows)
    config["vocab_size"] = rows
    for suffix, neutral in NEUTRAL.items():
        keys.expect(suffix, *neutral)
    keys.finish()
    return Meaning(model_type, config, frozenset({FREQS, LONG, SHORT} & header.shapes.keys()))


def _check_others(path: Path, metadata: dict[str, Any], architecture: str) -> None:
    """Refuse keys outside the architecture's namespace that somebody might mean something by."""
    meaningful = {*FIELDS, *NEUTRAL, *(key for own in OWN.values() for key in own)}
    problems = []
    for key, value in metadata.items():
        space, _, rest = key.partition(".")
        if space == "tokenizer":
            if (
                key not in TOKENIZER
                and not key.endswith("_token_id")
                and not key.startswith("tokenizer.chat_template.")
            ):
                problems.append(f"{key} = {str(value)[:60]}")
        elif space not in ("general", "split", architecture) and (
            space in SPACES or meaningful & {key, rest} or rest.startswith(SPACES)
        ):
            problems.append(f"{key} = {str(value)[:60]}")
    if problems:
        raise InputError(
            f"{path}: {len(problems)} keys that a {architecture} doesn't have:\n{listed(problems)}",
            fix="use the safetensors version of the model",
        )


def _factors(path: Path, header: Header) -> dict[str, tuple[float, ...]]:
    return {name: read_floats(path, header, name) for name in (FREQS, LONG, SHORT) if name in header.shapes}


def _positions(
    keys: Keys, architecture: str, config: dict[str, Any], head_dim: int, factors: dict[str, tuple[float, ...]]
) -> dict[str, Any]:
    """The config's rope_parameters."""
    theta = float(keys.number("rope.freq_base", 10_000.0))
    turned = keys.number("rope.dimension_count", head_dim)
    if turned != head_dim and architecture not in PARTIAL:
        keys.refuse_key("rope.dimension_count", turned)
    context = int(config.get("max_position_embeddings", 0))
    rope = rope_parameters(keys, theta, turned, context, factors)
    if architecture in PARTIAL:
        rope["partial_rotary_factor"] = turned / head_dim
    if rope["rope_type"] == "longrope":
        return {"rope_parameters": rope, "original_max_position_embeddings": rope["original_max_position_embeddings"]}
    local = float(keys.number("rope.freq_base_swa", 10_000.0 if architecture == "gemma3" else theta))
    if architecture == "gemma3":  # the layers with a window are not scaled
        near = {"rope_type": "default", "rope_theta": local}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": near}}
    if local != theta:
        keys.refuse_key("rope.freq_base_swa", local)
    return {"rope_parameters": rope}


def _attention(keys: Keys, architecture: str, config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The scale of queries, where the config has one, and Gemma's layers."""
    if architecture not in GEMMA:
        scale = keys.number("attention.scale", 0.0)
        if scale and abs(scale * head_dim**0.5 - 1) > 1e-6:
            keys.refuse_key("attention.scale", scale)
        return {}
    layers, heads = config.get("num_hidden_layers", 0), config["num_attention_heads"]
    # As llama.cpp: the largest of each family divides by the width per head, which there isn't the size of a head.
    scalar = config["hidden_size"] // heads if layers == GEMMA[architecture] else head_dim
    scale = keys.number("attention.scale", 0.0)
    if scale and (scale < 0 or abs(round(scale**-2) * scale**2 - 1) > 1e-5):
        keys.refuse_key("attention.scale", scale)
    fields: dict[str, Any] = {"query_pre_attn_scalar": round(scale**-2) if scale > 0 else scalar}
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        fields[cap] = config.get(cap) or None
    if architecture == "gemma2":  # llama.cpp's values where the file has none
        fields["attn_logit_softcapping"] = config.get("attn_logit_softcapping", 50.0) or None
        fields["final_logit_softcapping"] = config.get("final_logit_softcapping", 30.0) or None
    if not config.setdefault("sliding_window", 4096 if architecture == "gemma2" else 0):
        keys.refuse_key("attention.sliding_window", 0)
    pattern = keys.take("attention.sliding_window_pattern", 2 if architecture == "gemma2" else 6)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and 0 < pattern <= max(layers, 6):
        pattern = tuple((n + 1) % pattern != 0 for n in range(layers))
    if not isinstance(pattern, tuple) or len(pattern) != layers:
        keys.refuse_key("attention.sliding_window_pattern", pattern)
    else:
        fields["layer_types"] = ["sliding_attention" if near else "full_attention" for near in pattern]
    return fields


def _window(keys: Keys, architecture: str, config: dict[str, Any]) -> str | None:
    """ "mistral" for a llama with a window; refuses a window where the architecture has none."""
    if "sliding_window" in config:
        config["sliding_window"] = config["sliding_window"] or None
        return None
    window = keys.number("attention.sliding_window", 0)
    if not window:
        return None
    if architecture == "llama":
        config["sliding_window"] = window
        return "mistral"
    if window < config.get("max_position_embeddings", 0):  # a wider one is never felt
        keys.refuse_key("attention.sliding_window", window)
    return None
