"""transformers models written as the GGUF that llama.cpp's converter makes of them, to be read back."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quantize
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.shipping.gguf.names import family

from .gguf_ids import vocabulary

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "n_inner": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "use_parallel_residual": "use_parallel_residual",
}


def model_of(model_type: str, **changes: Any) -> Any:
    """A random model whose weights are bfloat16's numbers in float32."""
    known = AutoConfig.for_model(model_type)
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)} | changes
    config = AutoConfig.for_model(model_type, vocab_size=len(vocabulary()[0]), pad_token_id=None, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape) * 0.3
            weight.copy_((noise + 1 if weight.dim() == 1 else noise).bfloat16())
    return model


# Every type whose blocks can be kept.
KEPT = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16")


def write_model(
    path: Path,
    model: Any,
    *,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    split: int = 0,
    types: Sequence[str] = (),
) -> Path:
    """`keys` (under the architecture, or whole after a dot; None takes one out) and `tensors` are added. Matrices are
    stored in `types`, in turn; gguf can't make K-quants, so these hold other numbers of about their size."""
    config = model.config
    architecture = family(config).architecture
    writer = GGUFWriter(path, architecture, split_max_tensors=split)
    said: dict[str, Any] = {key: value for name, key in KEYS.items() if (value := getattr(config, name, None))}
    for name in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"):
        if hasattr(config, name):
            said[f"attention.layer_norm_{'rms_' * ('rms' in name)}epsilon"] = getattr(config, name)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope:
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        said |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
        said["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1))
        said["rope.freq_base"] = float(rope["rope_theta"])
    for key, value in (said | (keys or {})).items():
        name = key[1:] if key.startswith(".") else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, (int, float, str, list)):
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](name, value)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 1)
    turn = itertools.cycle(types)
    for name, weight in [*_weights(model), *(tensors or {}).items()]:
        array = np.ascontiguousarray(weight, np.float32)
        kind = GGMLQuantizationType[next(turn)] if types and array.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, _stored(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(array: Any, kind: GGMLQuantizationType) -> Any:
    """The array in a type, as gguf's writer takes it."""
    if kind == GGMLQuantizationType.F32:
        return array
    if kind == GGMLQuantizationType.F16:
        return array.astype(np.float16)
    if not kind.name.endswith("_K"):
        return quantize(array, kind)
    size, length = GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(array.size)
    raw = random.integers(0, 256, (len(array), array.shape[1] // size, length), dtype=np.uint8)
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}[kind.name]
    for at in scales:
        halves = random.normal(0, 2e-4, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = halves[..., None].view(np.uint8)
    return raw.reshape(len(array), -1)


def _weights(model: Any) -> list[tuple[str, Any]]:
    names, tied = family(model.config), {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    parameters = ((name, weight) for name, weight in model.state_dict().items() if name not in tied)
    return [(stored, values.float().numpy()) for pair in parameters for stored, values in names.stored(*pair).items()]
