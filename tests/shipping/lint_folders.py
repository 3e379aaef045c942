"""Adapters in PEFT's layout, right and wrong ones, and what PEFT and transformers make of them."""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deltaw.shipping.lint.finding import LOADS, REFUSED, WRONG, Effect

PREFIX = "base_model.model."
NAMES = ("q_proj", "v_proj", "down_proj")
LAYER = PREFIX + "model.layers.0.self_attn.q_proj"
IDS = (torch.arange(24).view(2, 12) * 7) % 96
Tensors = dict[str, Tensor]
Config = dict[str, Any]
GONE = object()  # of a config's field: not there


def good(base: nn.Module, rank: int = 4, alpha: Any = 8, names: tuple[str, ...] = NAMES) -> tuple[Tensors, Config]:
    """A right adapter of random factors."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for path, module in base.named_modules():
        if path.rpartition(".")[2] in names:
            outputs, inputs = module.weight.shape
            tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.3
            tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.3
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "r": rank,
        "lora_alpha": alpha, "target_modules": list(names), "bias": "none", "lora_dropout": 0.0,
    }  # fmt: skip
    return tensors, config


def changed(config: Config, **fields: Any) -> Config:
    """The config with other fields; GONE takes one out."""
    return {name: value for name, value in {**config, **fields}.items() if value is not GONE}


def write(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Clones: safetensors refuses shared memory.
    save_file(
        {k: v.clone().contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )
    (folder / "adapter_model.safetensors").chmod(0o644)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def opened(base: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def by_peft(base: Path, folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(opened(base), folder))


def by_transformers(base: Path, folder: Path) -> Tensor:
    model = opened(base)
    model.load_adapter(str(folder))
    return logits(model)


def effect(reader: Callable[[Path, Path], Tensor], base: Path, folder: Path, meant: Tensor) -> Effect:
    """What came of it: refused, right, or loaded with other logits than were meant."""
    try:
        got = reader(base, folder)
    except Exception:  # whatever a client dies of
        return REFUSED
    return LOADS if torch.allclose(got, meant, atol=1e-4) else WRONG
