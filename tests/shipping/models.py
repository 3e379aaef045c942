"""Tiny bases of many families on disk, with adapters for them that matter."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.base.source import Source
from deltaw.config import AdapterSpec
from deltaw.factors import LowRank
from deltaw.kinds import Dense, DoRA
from deltaw.shipping.trained import Trained, open_trained
from deltaw.updates import Update
from tests.architectures import COMMON, GPT2, MOE, PACKED
from tests.data.toys import toy

SHARED = {**COMMON, **MOE, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1, "num_experts": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: PACKED[name] for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")},
    "gpt2": {**GPT2, "eos_token_id": 2, "bos_token_id": 1},
    "qwen2_moe": SHARED,
}


def base_folder(folder: Path, name: str = "llama", *, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A base with a tokenizer. `more`: of the config, and `shard` (bytes of a file at most)."""
    shard = more.pop("shard", "5GB")
    tokenizer = toy("chatml")
    config = AutoConfig.for_model(name, **{**FAMILIES.get(name, {}), "vocab_size": len(tokenizer), **more})
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)  # so that every path matters
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def several_models(folder: Path) -> Path:
    """A language model beside a tower, whose files hold other names than the model has, tied."""
    tokenizer = toy("chatml")
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "vocab_size": len(tokenizer),
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A folder as transformers opens it."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval().requires_grad_(False)


def random_adapter(folder: Path, kind: str = "lora", size: float = 0.1, **spec: Any) -> Adapter:
    """An adapter of a base whose updates are `size` times its weights, by name of `kind`: lora, dora, full."""
    model = loaded(folder)
    form = {"lora": {}, "dora": {"magnitude": True}, "full": {"full": True}}[kind]
    size_of = {} if kind == "full" else {"rank": 3, "alpha": 6}
    attached = attach(model, AdapterSpec(**{**size_of, **form, **spec}))
    generator = torch.Generator().manual_seed(1)
    adapter = attached.adapter(BaseId(folder.name))
    factors = {
        path: _random(update, size * float(attached.layers[path].base.weight.dense().std()), generator)
        for path, update in adapter.factors.items()
    }
    return Adapter(adapter.spec, factors, adapter.base, adapter.fan_in_fan_out, adapter.rewritten)


def _random(update: Update, size: float, generator: torch.Generator) -> Update:
    m, n = update.shape
    if isinstance(update, Dense):
        return Dense(size * torch.randn(m, n, generator=generator))
    low = update.low if isinstance(update, DoRA) else update
    a_RN, b_MR = torch.randn(low.rank, n, generator=generator), torch.randn(m, low.rank, generator=generator)
    new = LowRank(a_RN, b_MR * size / low.rank**0.5 / low.scale, low.scale)
    if not isinstance(update, DoRA):
        return new
    return DoRA(new, update.magnitude_M * (1 + 0.1 * torch.randn(m, generator=generator)))


def trained_of(base: Path, adapter: Adapter, folder: Path) -> Trained:
    """The adapter saved into `folder` and opened with its base."""
    adapter.save(folder)
    return open_trained(folder, base=str(base))


def source_of(folder: Path) -> Source:
    return Source(str(folder), folder)
