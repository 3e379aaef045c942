"""MLX's folder, loaded by real mlx_lm on the CPU and held to deltaw's own logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from deltaw.adapter.algebra import resize_global
from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter
from deltaw.adapter.targets import linear_paths
from deltaw.commands.export import export_named
from deltaw.shipping.mlx import KNOWN, mlx_name
from tests.architectures import COMMON, GPT2
from tests.shipping.models import base_folder, loaded, random_adapter

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
mlx_lm = pytest.importorskip("mlx_lm.utils", reason="mlx_lm is not installed")

IDS = [5, 17, 3, 88, 42, 9, 61, 2]
TWO = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "head_dim": 8}
MORE: dict[str, dict[str, Any]] = {
    "gemma3_text": {**TWO, "query_pre_attn_scalar": 8},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 8},
    "cohere2": TWO,
    "olmo3": {key: value for key, value in TWO.items() if key != "head_dim"},
    "mistral": {"sliding_window": None},  # which its class there doesn't know
}
BY_LOGITS = sorted(set(KNOWN) - {"gemma3"})
# mlx_lm's own arithmetic of the base is off by so much: an approximated gelu, an embedding scale in bfloat16.
ROUGH = {"starcoder2": 1e-3, "gemma": 2e-4, "gemma3_text": 3e-4}


def base(folder: Path, name: str) -> Path:
    """A base as mlx_lm reads one: its classes want settings in the config that transformers 5 moved or leaves out."""
    known = type(AutoConfig.for_model(name))().to_dict()
    common = {key: value for key, value in (COMMON | GPT2).items() if key in known and key != "vocab_size"}
    base_folder(folder, name, **{**common, **MORE.get(name, {})})
    file = folder / "config.json"
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or {}
    config |= {
        "rope_scaling": None,
        **{key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope},
    }
    if "full_attention" in rope:
        config |= {"rope_theta": rope["full_attention"]["rope_theta"], "sliding_window_pattern": 2}
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if name == "gpt2":  # on the hub it is stored bare, and mlx_lm knows it only so
        config["n_ctx"] = config["n_positions"]
        tensors = load_file(folder / "model.safetensors")
        bare = {key.removeprefix("transformer."): value.contiguous() for key, value in tensors.items()}
        save_file(bare, folder / "model.safetensors", {"format": "pt"})
    for key, value in AutoConfig.from_pretrained(folder).to_dict().items():
        config.setdefault(key, value)
    if name == "cohere2":
        config["sliding_window_pattern"] = 2
    file.write_text(json.dumps(config))
    return folder


@torch.no_grad()
def ours(folder: Path, adapter: Adapter | None) -> Tensor:
    model = loaded(folder)
    if adapter:
        attach(model, adapter, fuse=())
    return model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


def theirs(folder: Path, adapter: Path | None) -> Tensor:
    from mlx_lm.tuner.utils import load_adapters

    model, _ = mlx_lm.load_model(folder)
    if adapter:
        model = load_adapters(model, str(adapter))
        model.eval()
    return torch.from_numpy(np.array(model(mx.array([IDS])).astype(mx.float32)))[0]


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def shipped(folder: Path, at: Path, adapter: Adapter) -> Path:
    adapter.save(folder / "adapter")
    export_named(str(folder / "adapter"), "mlx", str(folder / "out"), base=str(at))
    return folder / "out"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return base(tmp_path_factory.mktemp("mlx") / "llama", "llama")


@pytest.mark.parametrize("name", BY_LOGITS)
def test_mlx_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    """With an adapter on every layer; a type is in KNOWN because this holds for it."""
    folder = base(tmp_path / "base", name)
    adapter = random_adapter(folder)
    assert set(adapter.factors) == set(linear_paths(loaded(folder)))
    out = shipped(tmp_path, folder, adapter)
    wanted, bound = ours(folder, adapter), ROUGH.get(name, 2e-5)
    assert off(theirs(folder, None), ours(folder, None)) <= bound
    assert off(theirs(folder, out), wanted) <= bound
    assert off(theirs(folder, None), wanted) > 50 * bound  # the adapter matters


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi3"])
def test_dora_means_the_same_there(name: str, tmp_path: Path) -> None:
    folder = base(tmp_path / "base", name)
    adapter = random_adapter(folder, "dora", alpha=5.0)
    out = shipped(tmp_path, folder, adapter)
    assert off(theirs(folder, out), ours(folder, adapter)) <= 2e-5


def test_ranks_scales_and_some_layers_only(llama: Path, tmp_path: Path) -> None:
    adapter, _ = resize_global(random_adapter(llama, alpha=5.0, scaling="rslora"), 0.6)
    assert len({update.rank for update in adapter.factors.values()}) > 1
    out = shipped(tmp_path / "mixed", llama, adapter)
    assert off(theirs(llama, out), ours(llama, adapter)) <= 2e-5
    for number, targets in enumerate((("model.layers.1.mlp.up_proj",), ("model.layers.0.self_attn.v_proj", "k_proj"))):
        adapter = random_adapter(llama, targets=targets)
        out = shipped(tmp_path / str(number), llama, adapter)
        assert off(theirs(llama, out), ours(llama, adapter)) <= 2e-5
        assert json.loads((out / "adapter_config.json").read_text())["num_layers"] == 1 + number


@pytest.mark.parametrize("fault", ["transposed", "scale", "name"])
def test_a_fault_would_be_seen(llama: Path, fault: str, tmp_path: Path) -> None:
    adapter = random_adapter(llama, targets=("q_proj",))  # square: a transposition has the same shape
    out = shipped(tmp_path, llama, adapter)
    tensors = load_file(out / "adapters.safetensors")
    if fault == "transposed":
        rank = 3
        tensors = {k: t.reshape(-1, rank).T.contiguous().reshape(t.shape) for k, t in tensors.items()}
    elif fault == "scale":
        tensors = {key: tensor / 2 if key.endswith("lora_b") else tensor for key, tensor in tensors.items()}
    else:
        tensors = {key: tensor for key, tensor in tensors.items() if ".0." not in key}
    save_file(tensors, out / "adapters.safetensors")
    assert off(theirs(llama, out), ours(llama, adapter)) > 1e-3


def test_the_language_model_of_gemma_3_has_its_names_there() -> None:
    """By names and shapes alone: its class in small needs a tower for pictures, too."""
    from mlx_lm.models import gemma3

    text = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 97}
    text |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = gemma3.Model(gemma3.ModelArgs(model_type="gemma3", text_config=text, vocab_size=97))
    names = {name for name, _ in model.named_modules()}
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        assert mlx_name(f"model.language_model.layers.1.{part}", "gemma3") in names
