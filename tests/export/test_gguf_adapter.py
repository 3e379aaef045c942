"""The adapter as GGUF: in real llama.cpp it does what it does in deltaw, and what llama.cpp would drop is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.inject import attach, detach
from deltaw.base.source import find_base
from deltaw.config import AdapterSpec
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.export.destination import Options
from deltaw.export.gguf_adapter import ADAPTER, GgufAdapter
from deltaw.export.trained import Trained
from deltaw.factors import LowRank
from deltaw.progress import Display
from tests.base.gguf_models import model_of, write_model
from tests.data.toys import toy

from .llama_cpp import by_transformers, next_token

QUIET = Display(quiet=True)
PROMPTS = ([3, 4, 5, 6, 7], list(range(40, 70)), [7] * 20 + [9, 200, 31])
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48}
# Each of another kind of rows, names or storage.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {"sliding_window": None}),
    "gpt2": ("gpt2", GPT2),
    "starcoder2": ("starcoder2", {}),
    "nemotron": ("nemotron", {}),
    "qwen2 with experts": ("qwen2_moe", {"shared_expert_intermediate_size": 24}),
}
KEYS = {
    "nemotron": {"attention.layer_norm_epsilon": 1e-5},
    "qwen2_moe": {"feed_forward_length": 48, "expert_shared_feed_forward_length": 24},
}
# Ranks and scales of their own, and a rule that isn't alpha / r.
SPEC = AdapterSpec(
    rank=4,
    alpha=6.0,
    scaling="rslora",
    rank_overrides={"o_proj": 2, "down_proj": 1},
    alpha_overrides={"v_proj": 1.5, "down_proj": 20.0},
)


def trained_on(folder: Path, model_type: str, changes: dict[str, Any], spec: AdapterSpec = SPEC) -> tuple[Any, Trained]:
    """A random model that carries a random adapter of large effect, and both as files."""
    model = model_of(model_type, **changes)
    gguf = write_model(folder / "tiny.gguf", model, keys=KEYS.get(model_type))
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    own = {field: {k: v for k, v in getattr(spec, field).items() if k in names} for field in OVERRIDES}
    adapter = drawn(model, spec.model_copy(update=own))
    return model, Trained("lora", adapter, find_base(str(gguf)), Renderer(toy("chatml")))


OVERRIDES = ("rank_overrides", "alpha_overrides")


def drawn(model: Any, spec: AdapterSpec) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    attached = attach(model, spec, generator=generator)
    for layer in attached.layers.values():
        low = layer.factors()
        b_MR = torch.randn(low.b_MR.shape, generator=generator) * 0.2
        layer.set_factors(replace(low, b_MR=b_MR))
    return detach(attached, BaseId("org/tiny"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))


def written(folder: Path, export: GgufAdapter) -> Path:
    folder.mkdir(exist_ok=True)
    export.write(folder, QUIET)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= export.size()
    return folder / ADAPTER


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_says_what_deltaw_says(tmp_path: Path, name: str) -> None:
    """Both round: by how much on this very model, its base alone shows."""
    model, trained = trained_on(tmp_path, *FAMILIES[name])
    gguf = trained.base.gguf
    assert gguf is not None
    rounding = apart(next_token(gguf, [], PROMPTS), by_transformers(model, PROMPTS))
    base = by_transformers(model, PROMPTS)
    attach(model, trained.adapter)
    wanted = by_transformers(model, PROMPTS)
    given = next_token(gguf, [written(tmp_path / "out", GgufAdapter(trained, Options()))], PROMPTS)
    assert rounding < 0.1 and apart(wanted, base) > 2
    assert apart(given, wanted) < 5 * rounding


Damage = Callable[[dict[str, LowRank]], dict[str, LowRank]]


def unpermuted(tensors: dict[str, LowRank]) -> dict[str, LowRank]:
    def back(rows: Tensor, heads: int) -> Tensor:
        return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    heads = {"attn_q.weight": 4, "attn_k.weight": 2}
    wrong = {name: heads[end] for name in tensors for end in heads if name.endswith(end)}
    assert wrong
    return {
        name: replace(low, b_MR=back(low.b_MR, wrong[name])) if name in wrong else low for name, low in tensors.items()
    }


def one_scale(tensors: dict[str, LowRank]) -> dict[str, LowRank]:
    """As if all modules had the adapter's alpha / r."""
    own = {"attn_v.weight": 4.0, "ffn_down.weight": 0.3}
    return {
        name: replace(low, b_MR=low.b_MR * next((v for end, v in own.items() if name.endswith(end)), 1.0))
        for name, low in tensors.items()
    }


def one_gone(tensors: dict[str, LowRank]) -> dict[str, LowRank]:
    return {name: low for name, low in tensors.items() if name != "blk.1.attn_k.weight"}


@pytest.mark.parametrize("damage", [unpermuted, one_scale, one_gone])
def test_the_comparison_sees_what_is_wrong(tmp_path: Path, damage: Damage) -> None:
    model, trained = trained_on(tmp_path, "llama", {})
    gguf = trained.base.gguf
    assert gguf is not None
    rounding = apart(next_token(gguf, [], PROMPTS), by_transformers(model, PROMPTS))
    attach(model, trained.adapter)
    export = GgufAdapter(trained, Options())
    export.tensors = damage(export.tensors)
    given = next_token(gguf, [written(tmp_path / "out", export)], PROMPTS)
    assert apart(given, by_transformers(model, PROMPTS)) > 50 * rounding
