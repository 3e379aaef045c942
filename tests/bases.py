"""Tiny random models, and the name of the one real one."""

from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

BUILTIN = "builtin:smollm2-135m"


def tiny_llama(seed: int = 0, *, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=4, n_positions=48, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "tied llama": lambda: tiny_llama(tied=True),
    "gpt2": tiny_gpt2,
}
