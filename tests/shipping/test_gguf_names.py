"""A model's tensors in GGUF: what the reader undoes is what was done, for weights, biases and updates."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.shipping.gguf.names import TYPES, family, permuted

small = st.integers(1, 5)


@given(kv_heads=small, groups=small, half=small, width=st.integers(0, 3))
def test_permuted_rows_are_what_transformers_puts_back(kv_heads: int, groups: int, half: int, width: int) -> None:
    for heads in (kv_heads, kv_heads * groups):
        shape = (heads * half * 2, *([width] * bool(width)))
        rows = torch.arange(torch.Size(shape).numel()).reshape(shape)
        reader = LlamaTensorProcessor(config={})
        assert torch.equal(reader._reverse_permute_weights(permuted(rows, heads), kv_heads * groups, heads), rows)


def config(model_type: str, **changes: Any) -> Any:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "num_hidden_layers": 2}
    return AutoConfig.for_model(model_type, **sizes, **changes)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_an_update_lands_on_the_rows_of_its_weight(model_type: str, projection: str) -> None:
    """stored(W + ΔW) = stored(W) + ΔW as GGUF has it."""
    names, path = family(config(model_type)), f"model.layers.1.self_attn.{projection}"
    low = LowRank(torch.randn(3, 32), torch.randn(32, 3), 0.5)
    (stored,) = names.stored(f"{path}.weight", low.dense()).values()
    torch.testing.assert_close(names.factors(path, low).dense(), stored)


def test_gpt2s_update_is_the_turned_weights() -> None:
    names, path = family(AutoConfig.for_model("gpt2")), "transformer.h.0.mlp.c_fc"
    low = LowRank(torch.randn(3, 8), torch.randn(32, 3))
    (stored,) = names.stored(f"{path}.weight", low.dense().T).values()
    torch.testing.assert_close(names.factors(path, low).dense(), stored)


def test_biases_move_with_their_rows() -> None:
    names = family(config("llama", attention_bias=True))
    weight = torch.randn(16, 32)
    for projection in ("q_proj", "k_proj"):
        path = f"model.layers.0.self_attn.{projection}"
        (rows,) = names.stored(f"{path}.weight", weight).values()
        (bias,) = names.stored(f"{path}.bias", weight[:, 0]).values()
        assert torch.equal(bias, rows[:, 0]) and not torch.equal(bias, weight[:, 0])


def test_norms_less_one_are_added_to_in_float32() -> None:
    weight = torch.tensor([2.0**-9]).bfloat16()
    (stored,) = family(config("gemma2")).stored("model.norm.weight", weight).values()
    assert stored.item() == 1 + 2.0**-9


def test_a_model_that_sees_keeps_the_name_of_the_part_that_reads() -> None:
    names = family(AutoConfig.for_model("gemma3"))
    assert names.tensor("model.language_model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    with pytest.raises(InputError):
        names.tensor("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight")


@pytest.mark.parametrize("parameter", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.side.weight", "x", ""])
def test_what_has_no_place_is_refused(parameter: str) -> None:
    with pytest.raises(InputError):
        family(config("llama")).tensor(parameter)


def test_an_expert_alone_has_no_tensor() -> None:
    with pytest.raises(InputError):
        family(config("qwen3_moe")).tensor("model.layers.0.mlp.experts.0.up_proj.weight")


def test_a_type_without_rules_is_refused_with_those_that_have() -> None:
    with pytest.raises(InputError) as refused:
        family(AutoConfig.for_model("gpt_neox"))
    assert "gpt_neox" in refused.value.what and all(name in str(refused.value.fix) for name in TYPES)
