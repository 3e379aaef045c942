"""A tiny base with an adapter, and what becomes of both: for the tests of verify."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw.adapter.attach import attach, detach
from deltaw.adapter.file import Adapter
from deltaw.config import AdapterSpec
from deltaw.factors import LowRank
from deltaw.model import open_model
from tests.tiny import tiny_base

CHATS = [
    [{"role": "user", "content": f"tell me of {n} things"}, {"role": "assistant", "content": "one"}] for n in range(8)
]


def base_and_adapter(folder: Path, **spec: object) -> tuple[Path, Path]:
    """A random base whose weights are bfloat16's numbers and matter, and an adapter that changes its answers."""
    base = tiny_base(folder / "base", num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * (10 if parameter.ndim > 1 else 1)).bfloat16())
    model.save_pretrained(base)
    opened = open_model(base, dtype="float32")
    attached = attach(opened.base.model, AdapterSpec(rank=4, alpha=8, **spec))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for layer in attached.layers.values():
        with torch.no_grad():
            layer.lora_b.copy_(0.15 * torch.randn(layer.lora_b.shape, generator=generator))  # type: ignore[operator]
    detach(attached, opened.id).save(folder / "adapter")
    return base, folder / "adapter"


def merged(
    base: Path,
    adapter: Path,
    folder: Path,
    change: Callable[[str, Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """base + adapter as a folder; `change` spoils the update of a module."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for path, update in Adapter.load(adapter).factors.items():
        delta = update.dense()  # type: ignore[union-attr]
        with torch.no_grad():
            model.get_submodule(path).weight += change(path, delta) if change else delta
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def scaled(adapter: Path, folder: Path, factor: float) -> Path:
    """The same adapter with another scale: what a lost one looks like."""
    whole = Adapter.load(adapter)
    factors = {
        path: LowRank(update.a_RN, update.b_MR * factor, update.scale)  # type: ignore[union-attr]
        for path, update in whole.factors.items()
    }
    return replace(whole, factors=factors).save(folder)


def chats(path: Path) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS), encoding="utf-8")
    return path


def texts(path: Path, count: int = 12) -> Path:
    """Rows whose prompts are of different lengths."""
    rows = [{"prompt": f"say {'very ' * (n % 4)}much of {n} ", "completion": "ab"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
