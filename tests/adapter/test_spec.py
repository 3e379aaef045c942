"""Which modules a spec names: groups, names, overrides, and what is said when nothing matches."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltaw.adapter.spec import explicit_targets, find_targets, linear_paths
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from tests.architectures import PACKED, PADDED, tiny

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
        ("self_attn", "'self_attn' matches no layer"),
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
