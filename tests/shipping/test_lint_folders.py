"""mlx-lm's folders, held to what real mlx_lm does with them, and merged models' folders, held to transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaw.commands.export import export_named
from deltaw.shipping.lint.finding import LOADS, MLX, PEFT, REFUSED, TRANSFORMERS, UNSURE, VLLM, WRONG, Effect
from deltaw.shipping.lint.lint import lint
from tests.data.toys import CHATML
from tests.shipping.models import base_folder, random_adapter
from tests.tiny import tiny_base

Tensors = dict[str, Tensor]
IDS = [5, 17, 3, 88, 42, 9, 61, 2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As mlx_lm reads one: rope_theta stands in the config itself there."""
    folder = base_folder(tmp_path_factory.mktemp("lint") / "llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def right(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx")
    random_adapter(base).save(folder / "adapter")
    export_named(str(folder / "adapter"), "mlx", str(folder / "out"), base=str(base))
    return folder / "out"


def remade(folder: Path, right: Path, change: Callable[[Tensors], Tensors], fields: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(change(load_file(right / "adapters.safetensors")), folder / "adapters.safetensors")
    config = json.loads((right / "adapter_config.json").read_text())
    parameters = {k: v for k, v in {**config["lora_parameters"], **fields}.items() if v is not None}
    top = {k: v for k, v in fields.items() if k in ("num_layers", "fine_tune_type")}
    config = {k: v for k, v in {**config, "lora_parameters": parameters, **top}.items() if v is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def same(tensors: Tensors) -> Tensors:
    return tensors


def without(*ends: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(ends)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


MLX_CASES: list[tuple[str, str, Effect, Callable[[Tensors], Tensors], dict[str, Any]]] = [
    ("right", "", LOADS, same, {}),
    ("no scale", "DW802", REFUSED, same, {"scale": None}),
    ("no rank", "DW802", REFUSED, same, {"rank": None}),
    ("no number of layers", "DW802", REFUSED, same, {"num_layers": None}),
    ("another rank", "DW803", REFUSED, same, {"rank": 5}),
    ("PEFT's names", "DW803", REFUSED, renamed("lora_a", "lora_A.weight"), {}),
    ("a key left out", "DW803", REFUSED, same, {"keys": ["self_attn.q_proj"]}),
    ("a layer left out", "DW803", REFUSED, same, {"num_layers": 1}),
    ("no lora_b", "DW804", WRONG, without("0.self_attn.q_proj.lora_b"), {}),
    ("scale 0", "DW805", WRONG, same, {"scale": 0.0}),
]


@pytest.mark.parametrize(("name", "code", "effect", "change", "fields"), MLX_CASES, ids=[case[0] for case in MLX_CASES])
def test_the_verdict_is_what_mlx_lm_does(
    name: str,
    code: str,
    effect: Effect,
    change: Callable[[Tensors], Tensors],
    fields: dict[str, Any],
    base: Path,
    right: Path,
    tmp_path: Path,
) -> None:
    folder = remade(tmp_path / "made", right, change, fields)
    verdict = lint(folder, base=str(base))
    beside = {"DW804"} if code == "DW803" else set()  # names that are none leave halves, too
    assert {found.code for found in verdict.findings} - beside == {"DW108", code} - {""}
    assert verdict.at(MLX) is effect and verdict.at(PEFT) is REFUSED and verdict.exit_code == (effect > UNSURE)
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx_lm is not installed")

    def logits(adapter: Path) -> Any:
        model, _ = utils.load_model(base)
        model = utils.load_adapters(model, str(adapter))
        model.eval()
        return model(mx.array([IDS])).astype(mx.float32)

    if effect is REFUSED:
        with pytest.raises((ValueError, KeyError, AttributeError, TypeError)):
            logits(folder)
    else:
        assert bool(mx.allclose(logits(folder), logits(right), atol=1e-4)) is (effect is LOADS)


def test_mlx_files_that_are_broken(right: Path, tmp_path: Path) -> None:
    folder = remade(tmp_path / "made", right, same, {})
    (folder / "adapter_config.json").write_text("{")
    verdict = lint(folder)
    assert "DW801" in {found.code for found in verdict.findings} and verdict.exit_code == 1


def model_folder(folder: Path, change: Callable[[Tensors], Tensors] = same, **fields: Any) -> Path:
    """A tiny model's folder with other tensors or fields of the config (a tied one has no head of its own)."""
    tiny_base(folder, tie_word_embeddings=fields.pop("tied", False))
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def stray(tensors: Tensors) -> Tensors:
    return {**tensors, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}


def larger(tensors: Tensors) -> Tensors:
    return {**tensors, "model.layers.0.mlp.up_proj.weight": torch.ones(52, 32)}


def loading(folder: Path) -> Any:
    """(the model, transformers' account of what it found)."""
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


def test_a_whole_model_is_right(tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "qwen2_moe", "gemma2"):
        verdict = lint(base_folder(tmp_path / name, name))
        assert verdict.findings == () and verdict.exit_code == 0, name
    assert lint(tiny_base(tmp_path / "tied", tie_word_embeddings=True)).findings == ()


def test_a_dropped_head(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "a", without("lm_head.weight"))
    verdict = lint(folder)
    (found,) = verdict.findings
    assert found.code == "DW813" and "lm_head.weight" in found.what and verdict.exit_code == 1
    assert verdict.at(TRANSFORMERS) is WRONG and verdict.at(VLLM) is REFUSED
    assert "lm_head.weight" in loading(folder)[1]["missing_keys"]  # and it is there, with random numbers


def test_a_tensor_without_a_place(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "a", stray)
    verdict = lint(folder)
    assert {found.code for found in verdict.findings} == {"DW814"} and verdict.at(TRANSFORMERS) is WRONG
    assert loading(folder)[1]["unexpected_keys"]


def test_tensors_of_other_sizes(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "a", larger)
    verdict = lint(folder)
    assert {found.code for found in verdict.findings} == {"DW811"} and verdict.at(TRANSFORMERS) is REFUSED
    with pytest.raises(RuntimeError):
        loading(folder)


def test_a_head_of_its_own_that_the_config_denies(tmp_path: Path) -> None:
    verdict = lint(model_folder(tmp_path / "a", tie_word_embeddings=True))
    assert {found.code for found in verdict.findings} == {"DW815"} and verdict.at(VLLM) is WRONG


def test_a_model_that_is_cut_short_or_a_pickle(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "a")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert {found.code for found in lint(folder).findings} == {"DW811"}
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    verdict = lint(folder)
    assert {found.code for found in verdict.findings} == {"DW812"} and verdict.at(TRANSFORMERS) is UNSURE


def test_a_models_template(tmp_path: Path) -> None:
    plain, other = tiny_base(tmp_path / "a"), tiny_base(tmp_path / "b")
    assert lint(plain, base=str(other)).findings == ()
    (plain / "chat_template.jinja").write_text(CHATML.replace("\n", " "))
    assert {found.code for found in lint(plain, base=str(other)).findings} == {"DW817"}
    (plain / "chat_template.jinja").unlink()
    assert "DW816" in {found.code for found in lint(plain, base=str(other)).findings}


def test_a_models_stop_token(tmp_path: Path) -> None:
    """Its template ends a turn with a token at which its generation config doesn't stop."""
    folder = tiny_base(tmp_path / "a")
    (folder / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "<|endoftext|>"))
    verdict = lint(folder)
    assert {found.code for found in verdict.findings} == {"DW603"} and verdict.exit_code == 1
