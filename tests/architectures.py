"""Tiny random models of every architecture that deltaw promises to work on."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

PACKED: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": {**COMMON, "sliding_window": 4},
    "qwen2": COMMON,
    "qwen3": COMMON,
    "gemma2": {**COMMON, "sliding_window": 4},
    "gemma3_text": {**COMMON, "sliding_window": 4},
    "phi3": COMMON,
    "gpt2": GPT2,
    "gpt_neox": COMMON,
    "olmo2": COMMON,
    "qwen3_moe": {**COMMON, **MOE},
}
# ALiBi rides on the attention mask, a state space mixes neighbours, attention sinks are an argument of their own.
PADDED: dict[str, dict[str, Any]] = {"bloom": COMMON, "mamba": COMMON, "gpt_oss": COMMON}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen random model, weights wide enough that every path through it matters."""
    config = AutoConfig.for_model(name, **{**PACKED, **PADDED}[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model
