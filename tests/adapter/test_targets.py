"""Which modules a spec names: groups, names, overrides, and what is said when nothing matches."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.targets import explicit_targets, find_targets, linear_paths, lines_of
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from tests.architectures import COMMON, MOE, PACKED, PADDED, tiny

ALL = [*PACKED, *PADDED]
model = functools.cache(tiny)  # nothing here writes to a model


def paths(name: str, **fields: object) -> tuple[str, ...]:
    return find_targets(model(name), AdapterSpec(**{"rank": 2, **fields})).paths


def refusal(name: str, **fields: object) -> str:
    with pytest.raises(InputError) as caught:
        paths(name, **fields)
    assert len(str(caught.value).splitlines()) <= 5
    return str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_all_linear_is_every_linear_layer_but_the_head(name: str) -> None:
    found = paths(name)
    assert found == linear_paths(model(name)) and len(found) == len(set(found)) > 0
    head = model(name).get_output_embeddings()
    assert isinstance(head, nn.Linear)
    assert not any(model(name).get_submodule(path) is head for path in found)
    assert [path for path, _ in model(name).named_modules() if path in found] == list(found)  # the model's order


@pytest.mark.parametrize("name", sorted(set(ALL) - {"mamba", "qwen3_moe", "gpt_oss"}))
def test_attention_and_mlp_split_all_linear(name: str) -> None:
    attention, mlp = paths(name, targets="attention"), paths(name, targets="mlp")
    assert attention and mlp and not set(attention) & set(mlp)
    assert set(attention) | set(mlp) == set(paths(name)) == set(paths(name, targets=("attention", "mlp")))
    assert all("att" in path for path in attention) and all("mlp" in path for path in mlp)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_that_are_no_linear_layers_are_no_mlp(name: str) -> None:
    assert paths(name, targets="attention") == paths(name)
    assert "'mlp' matches no layer" in refusal(name, targets="mlp")


def test_a_state_space_models_scan_is_left_alone() -> None:
    """It reads these weights without calling the layers, so an update there would do nothing."""
    found = find_targets(model("mamba"), AdapterSpec(rank=2))
    assert {path.rpartition(".")[2] for path in found.paths} == {"in_proj", "x_proj"}
    assert {f"backbone.layers.{i}.mixer.{part}" for i in (0, 1) for part in ("dt_proj", "out_proj")} <= set(
        found.unmatched
    )
    assert "'dt_proj' matches no layer that can be adapted" in refusal("mamba", targets="dt_proj")


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("q_prj", "'q_prj' matches no layer that can be adapted (did you mean 'q_proj'?)"),
        (("q_proj", "atention"), "'atention' matches no layer that can be adapted (did you mean 'attention'?)"),
        ("proj", "'proj' matches no layer"),
        ("layers.2.self_attn.q_proj", "matches no layer"),
        ("embed_tokens", "'embed_tokens' matches no layer"),
        ("self_atn", "'self_atn' matches no layer"),
        ("layers.2", "'layers.2' matches no layer"),
        (".*q_proj", "'.*q_proj' matches no layer"),
    ],
)
def test_a_target_that_matches_nothing_lists_what_could(targets: str | tuple[str, ...], said: str) -> None:
    message = refusal("llama", targets=targets)
    assert said in message
    assert "could match: all-linear, attention, mlp, q_proj (2), k_proj (2)" in message


@pytest.mark.parametrize("targets", ["lm_head", ("q_proj", "lm_head")])
def test_the_output_head_is_refused_by_name(targets: str | tuple[str, ...]) -> None:
    assert "lm_head is the output head" in refusal("llama", targets=targets)


@pytest.mark.parametrize("field", ["rank_overrides", "alpha_overrides"])
def test_an_override_of_nothing_is_refused(field: str) -> None:
    assert "'v_prj' matches no layer" in refusal("llama", **{field: {"q_proj": 2, "v_prj": 2}})
    assert "'up_proj' matches no layer" in refusal("llama", targets="attention", **{field: {"up_proj": 2}})


def test_a_rank_beyond_the_layer_is_refused_with_its_shape() -> None:
    message = refusal("llama", rank=17, targets=("k_proj", "up_proj"))
    assert "model.layers.0.self_attn.k_proj is 16 x 32: rank 17 > 16" in message
    assert "up_proj" not in message
    assert paths("llama", rank=17, targets=("k_proj", "up_proj"), rank_overrides={"k_proj": 16})
    assert "k_proj" in refusal("llama", rank=2, rank_overrides={"k_proj": 17})


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(InputError, match="no linear layer"):
        find_targets(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)), AdapterSpec())


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(ALL), data=st.data())
def test_explicit_targets_find_exactly_the_chosen_paths(name: str, data: st.DataObject) -> None:
    everything = linear_paths(model(name))
    chosen = set(data.draw(st.lists(st.sampled_from(everything), min_size=1)))
    ordered = tuple(path for path in everything if path in chosen)
    names = explicit_targets(model(name), ordered)
    assert paths(name, targets=names) == ordered
    assert len(names) <= len(ordered)


@pytest.mark.parametrize("name", ALL)
def test_explicit_targets_of_a_group_are_short_unless_a_last_part_is_ambiguous(name: str) -> None:
    names = explicit_targets(model(name), paths(name))
    assert all("." not in target for target in names)
    assert paths(name, targets=names) == paths(name)


def test_a_last_part_that_others_share_is_not_used() -> None:
    """GPT-2's attention and MLP both end in c_proj."""
    names = explicit_targets(model("gpt2"), paths("gpt2", targets="mlp"))
    assert "transformer.h.0.mlp.c_proj" in names
    assert paths("gpt2", targets=names) == paths("gpt2", targets="mlp")


# A group leaves out what can't be done, and says so


def qwen2_moe(device: str = "cpu") -> nn.Module:
    config = AutoConfig.for_model(
        "qwen2_moe", **{**COMMON, **MOE}, shared_expert_intermediate_size=24, decoder_sparse_step=1
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("group", ["all-linear", "mlp"])
def test_a_layer_narrower_than_the_rank_is_left_out_of_a_group(group: str, device: str) -> None:
    gates = [f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)]
    found = find_targets(qwen2_moe(device), AdapterSpec(rank=8, targets=group))
    assert list(found.left_out) == gates and not set(gates) & set(found.paths) and set(gates) <= set(found.unmatched)
    assert all("1 x 32" in reason and "rank 8" in reason for reason in found.left_out.values())
    assert len(lines_of(found.left_out)) == 1 and "(and 1 more)" in lines_of(found.left_out)[0]
    attached = find_targets(qwen2_moe(), AdapterSpec(rank=8, rank_overrides={"shared_expert_gate": 1}))
    assert set(gates) <= set(attached.paths) and not attached.left_out


def test_a_narrow_layer_asked_for_by_name_is_an_error() -> None:
    for fields in (
        {"targets": ("q_proj", "shared_expert_gate")},
        {"targets": ("all-linear", "shared_expert_gate")},
        {"rank_overrides": {"shared_expert_gate": 2}},
    ):
        with pytest.raises(InputError) as caught:
            find_targets(qwen2_moe(), AdapterSpec(rank=8, **fields))
        assert "shared_expert_gate is 1 x 32: rank" in caught.value.what


def test_a_rank_beyond_every_layer_is_refused() -> None:
    assert "rank 4096 > " in refusal("llama", rank=4096)


# Towers


def gemma3(**changes: Any) -> nn.Module:
    text = {**COMMON, "head_dim": 8, "sliding_window": 8}
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, **changes)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("attention", "up_proj")])
def test_the_language_model_is_meant(targets: Any) -> None:
    found = find_targets(gemma3(), AdapterSpec(rank=2, targets=targets))
    assert found.paths and all(path.startswith("model.language_model.layers.") for path in found.paths)
    assert found.left_out and all("vision_tower" in path for path in found.left_out)
    assert not any("vision" in path for path in found.unmatched)
    attached = attach(gemma3(), AdapterSpec(rank=2, targets=targets))
    assert attached.paths == found.paths and any("vision_tower" in line for line in attached.notes())
    assert attached.spec.targets and not any("vision" in path for path in attached.adapter(BaseId()).factors)


def test_a_path_names_the_tower_and_what_never_runs_on_text_is_refused() -> None:
    path = "model.vision_tower.encoder.layers.0.self_attn.v_proj"
    spec = AdapterSpec(rank=2, targets=("q_proj", path))
    assert path in find_targets(gemma3(), spec).paths
    with pytest.raises(InputError) as caught:
        attach(gemma3(), spec)
    assert path in caught.value.what


def test_a_trained_adapter_of_the_tower_is_attached(tmp_path: Path) -> None:
    """PEFT's `q_proj` names the tower's, too; what a trained adapter adapts is what it has tensors for."""
    peft = get_peft_model(gemma3(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    peft.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert any("vision_tower" in path for path in adapter.factors)
    model, tokens = gemma3(), torch.arange(3, 12)[None]
    model.load_state_dict(
        {k.replace("base_layer.", ""): v for k, v in peft.base_model.model.state_dict().items() if "lora_" not in k}
    )
    attached = attach(model, adapter)
    assert set(attached.paths) == set(adapter.factors)
    with torch.no_grad():
        wanted, got = (m(input_ids=tokens, use_cache=False).logits for m in (peft.eval(), model))
    assert float((got - wanted).abs().max()) <= 3e-4 * float(wanted.abs().max())


# Embeddings, the head, tied weights


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_and_the_embedding_are_no_targets_tied_or_not(tied: bool) -> None:
    config = AutoConfig.for_model("llama", **COMMON, tie_word_embeddings=tied)
    made = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    found = find_targets(made, AdapterSpec(rank=2))
    assert "lm_head" not in found.paths and len(found.paths) == 14
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(InputError) as caught:
            find_targets(made, AdapterSpec(rank=2, targets=("q_proj", name)))
        assert name in caught.value.what


def test_layers_with_one_weight_are_adapted_each() -> None:
    """Tied weights: neither layer's own use is the other's."""
    made = tiny("llama")
    made.model.layers[1].self_attn.k_proj.weight = made.model.layers[0].self_attn.k_proj.weight
    attached = attach(made, AdapterSpec(rank=2))
    assert len(attached.paths) == 14 and not attached.left_out
