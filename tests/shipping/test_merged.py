"""The plan of a merge: every update lands in one tensor, and the values are those of the attached model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.adapter.attach import attach
from deltaw.adapter.checkpoints import Checkpoint
from deltaw.adapter.file import Adapter
from deltaw.base.load import open_skeleton
from deltaw.base.source import Source
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.shipping.base_files import BaseFiles
from deltaw.shipping.merge.plan import plan_merge
from deltaw.shipping.merge.rewrite import rewrite
from deltaw.shipping.trained import Trained
from tests.data.toys import toy
from tests.every_causal_type import build
from tests.shipping.models import FAMILIES, base_folder, loaded, random_adapter, several_models


def opened(base: Path, adapter: Adapter) -> Trained:
    """Without a tokenizer, which a plan doesn't need."""
    return Trained("an adapter", adapter, BaseFiles(Source(base.name, base)), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_values_are_the_fused_layers(tmp_path: Path, name: str, kind: str) -> None:
    base = base_folder(tmp_path / "base", name)
    adapter = random_adapter(base, kind)
    plan = plan_merge(opened(base, adapter))
    model = loaded(base)
    attached = attach(model, adapter)
    assert {planned.module for planned in plan.tensors} - {None} == set(adapter.factors)
    for planned in plan.tensors:
        if planned.module is None:
            continue
        wanted = attached.layers[planned.module].fuse().weight
        assert torch.allclose(plan.value(planned), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    assert plan.transposed == (name == "gpt2")


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_written_in_chunks_is_the_values(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks and pieces of a few rows, which end in the middle of a tensor."""
    base = base_folder(tmp_path / "base", name)
    plan = plan_merge(opened(base, random_adapter(base, kind)))
    monkeypatch.setattr("deltaw.shipping.merge.rewrite.PIECE", 1000)
    (tmp_path / "out").mkdir()
    survivals = rewrite(plan, tmp_path / "out")
    new = load_file(tmp_path / "out" / "model.safetensors")
    for planned in plan.tensors:
        assert torch.allclose(new[planned.name], plan.value(planned), rtol=1e-6, atol=1e-6)
        if planned.module:
            assert survivals[planned.module].entries == new[planned.name].numel()


def test_names_that_transformers_changes_when_it_loads(tmp_path: Path) -> None:
    base = several_models(tmp_path / "base")
    names = set(load_file(base / "model.safetensors"))
    tensors = {f"{name}".replace("model.language_model.", "language_model.model."): tensor
               for name, tensor in load_file(base / "model.safetensors").items()}  # fmt: skip
    tensors = {name.replace("model.vision_tower", "vision_tower"): tensor for name, tensor in tensors.items()}
    tensors = {name.replace("model.multi_modal", "multi_modal"): tensor for name, tensor in tensors.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = random_adapter(base)
    plan = plan_merge(opened(base, adapter))
    assert {planned.name for planned in plan.tensors} == set(tensors) and len(names) == len(tensors)
    assert {planned.module for planned in plan.tensors if planned.fate == "changed"} == set(adapter.factors)
    assert set(plan.by_parameter) == {name for name, _ in loaded(base).named_parameters()}


def test_a_tied_head_of_a_model_beside_a_tower(tmp_path: Path) -> None:
    base = several_models(tmp_path / "base")
    adapter = random_adapter(base)
    head = LowRank(torch.randn(2, 32), torch.randn(len(toy("chatml")), 2))
    spec = adapter.spec.model_copy(update={"targets": ("lm_head",)})
    plan = plan_merge(opened(base, Adapter(spec, {"lm_head": head}, adapter.base)))
    (untied,) = [planned for planned in plan.tensors if planned.fate == "untied"]
    assert plan.unties and untied.name == "lm_head.weight" and untied.source.endswith("embed_tokens.weight")


def test_everything_that_lands_nowhere_is_named(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter = random_adapter(base)
    tensors = load_file(base / "model.safetensors")
    gone = "model.layers.0.mlp.up_proj.weight"
    narrow = "model.layers.1.mlp.up_proj.weight"
    bad = {**tensors, narrow: tensors[narrow].to(torch.float8_e4m3fn)}
    del bad[gone]
    save_file(bad, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as refused:
        plan_merge(opened(base, adapter))
    assert gone in str(refused.value) and narrow in str(refused.value)
    path, update = next(iter(adapter.factors.items()))
    wide = LowRank(torch.randn(3, 7), torch.randn(5, 3), update.scale)
    with pytest.raises(InputError, match="update is"):
        plan_merge(opened(base, replace(adapter, factors={**adapter.factors, path: wide})))
    with pytest.raises(InputError, match="no such linear layer"):
        plan_merge(opened(base, replace(adapter, factors={**adapter.factors, "model.layers.9.q_proj": wide})))


def test_what_transformers_makes_of_several_tensors_takes_no_update(tmp_path: Path) -> None:
    """hrm_text cuts q, k and v out of one tensor of the file."""
    base = tmp_path / "base"
    build("hrm_text").save_pretrained(base)
    adapter = random_adapter(base)
    with pytest.raises(InputError, match="merge_into"):
        plan_merge(opened(base, adapter))


def test_experts_are_parts(tmp_path: Path) -> None:
    """A file with a matrix for each expert, a model with one for all: copied, as parts of it."""
    base = base_folder(tmp_path / "base", "qwen2_moe")
    plan = plan_merge(opened(base, random_adapter(base)))
    parts = [planned for planned in plan.tensors if planned.part]
    assert parts and all(planned.fate == "copied" and planned.parameter in plan.weights for planned in parts)
    assert all(".experts." in planned.name for planned in parts)


def test_a_file_that_the_config_names(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    (base / "model.safetensors").rename(base / "other.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    plan = plan_merge(opened(base, random_adapter(base)))
    assert {file.name for file in plan.by_file} == {"other.safetensors"}


def test_a_checkpoint_knows_each_tensor_by_the_models_name(tmp_path: Path) -> None:
    base = several_models(tmp_path / "base")
    checkpoint = Checkpoint(base, open_skeleton(Source("base", base)))
    assert all(checkpoint.find(name) for name, _ in loaded(base).named_parameters())
