"""The probe crosses every border: what a model does from some length on is found, however far off that is."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralForCausalLM
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from deltaw.adapter.attach import attach
from deltaw.base.attention import AttentionCall, is_packed, pairs
from deltaw.base.batch import Batch
from deltaw.base.forward import APART, PACKED, plan_forward
from deltaw.base.probe import borders, probe_documents, uncrossed
from deltaw.base.small import BORDER, small_copy
from deltaw.config import AdapterSpec
from tests.architectures import COMMON, MOE, tiny

LENGTHS = (30, 1, 44, 3)  # across the small borders below, twice
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)
TOKENS = torch.randint(3, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def made(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**COMMON, **options})).eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim >= 2:
            parameter.mul_(8)
    return model


class Hands(nn.Module):
    """A layer's attention that hands something more to the attention function."""

    def __init__(self, inner: nn.Module, **more: Any) -> None:
        super().__init__()
        self.inner, self.more = inner, more

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs, **self.more)


def hands(**more: Any) -> nn.Module:
    model = made("llama")
    for layer in model.model.layers:
        layer.self_attn = Hands(layer.self_attn, **more)
    return model


def masked_alone(window: int) -> nn.Module:
    """A window that attention isn't told."""
    kinds = ["sliding_attention", "full_attention"]
    model = made("qwen2", sliding_window=window, use_sliding_window=True, layer_types=kinds)
    model.model.layers[0].self_attn.sliding_window = None
    return model


def told_alone(window: int) -> nn.Module:
    """A window that attention is told and the mask, which is what the model's own attention heeds, doesn't have."""
    return hands(sliding_window=window)


TEMPERATURE = {"attn_temperature_tuning": True, "attn_scale": 0.5, "no_rope_layers": [0, 0]} | {
    "layer_types": ["full_attention"] * 2, "intermediate_size_mlp": 48, "num_local_experts": 2,
}  # fmt: skip
LLAMA4 = {"intermediate_size_mlp": 48, "num_local_experts": 2, "layer_types": ["chunked_attention", "full_attention"]}
WINDOWED = {**MOE, "use_sliding_window": True, "max_window_layers": 1, "shared_expert_intermediate_size": 24}
SWITCHED = {"decoder_sparse_step": 1, "layer_types": ["full_attention", "sliding_attention"]}
UNTOLD: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name} beyond {border}": (name, {**options, key: border})
    for border in (8, 4096)
    for name, key, options in (
        ("llama4_text", "attention_chunk_size", LLAMA4),
        ("phimoe", "sliding_window", MOE),
        ("qwen2_moe", "sliding_window", WINDOWED | SWITCHED),
    )
}


@torch.no_grad()
def apart(model: nn.Module) -> Tensor:
    parts = [model(input_ids=TOKENS[None, a:b], use_cache=False).logits[0] for a, b in pairwise(STARTS.tolist())]
    return torch.cat(parts).float()


def answers_as_its_own(model: nn.Module, *, packed: bool) -> str:
    """Plan `model`, look that it answers as before; -> what the plan says of it."""
    truth = apart(model)
    own = model.config._attn_implementation
    forward = plan_forward(model)
    assert forward.packed == packed, forward.describe()
    with torch.no_grad():
        torch.testing.assert_close(forward.logits(Batch.of(TOKENS, STARTS.tolist())), truth, **CLOSE)
    torch.testing.assert_close(apart(model), truth, **CLOSE)
    assert is_packed(model) if packed else model.config._attn_implementation == own
    return forward.why


# What stands in the mask


@pytest.mark.parametrize("which", UNTOLD)
def test_what_a_model_states_in_its_mask_alone_is_heeded_at_any_length(which: str) -> None:
    name, options = UNTOLD[which]
    assert "mask" in answers_as_its_own(made(name, **options), packed=False)


@pytest.mark.parametrize("window", [8, 4096])
@pytest.mark.parametrize("model", [masked_alone, told_alone])
def test_mask_and_argument_must_say_the_same(model: Any, window: int) -> None:
    assert "mask" in answers_as_its_own(model(window), packed=False)


@pytest.mark.parametrize("window", [8, 4096])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "cohere2"])
def test_a_window_that_attention_is_told_is_packed(name: str, window: int) -> None:
    assert answers_as_its_own(made(name, sliding_window=window), packed=True) == ""


@given(
    told=st.none() | st.integers(2, 5000),
    kind=st.sampled_from(["causal", "window", "chunk"]),
    size=st.integers(2, 5000),
    others=st.sets(st.integers(2, 9000), max_size=5),
)
def test_honest_is_exactly_the_equality_of_mask_and_window(
    told: int | None, kind: str, size: int, others: set[int]
) -> None:
    """Whatever the size, as long as it is one of the numbers that are looked at."""
    sees = {
        "causal": causal_mask_function,
        "window": sliding_window_causal_mask_function(size),
        "chunk": chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long)),
    }[kind]
    call = AttentionCall(8, None, told, None, True, sees)
    places = pairs(others | {size} | ({told} if told else set()))
    assert call.honest(*places) == ((kind, told) == ("causal", None) or (kind == "window" and told == size))


@pytest.mark.parametrize("sees", [None, lambda b, h, q, k: torch.zeros(3, 3)[q, k] == 0])
def test_a_mask_that_cannot_be_asked_is_not_trusted(sees: Any) -> None:
    assert not AttentionCall(8, None, None, None, True, sees).honest(*pairs({4}))


# What else reaches attention


def test_an_argument_that_attention_here_does_not_know_is_no_reason_to_drop_it() -> None:
    assert "indices" in answers_as_its_own(hands(indices=torch.arange(3)), packed=False)


@pytest.mark.parametrize("more", [{"output_router_logits": True}, {"indices": None}, {"is_causal": True}])
def test_options_of_the_models_own_forward_are_no_hindrance(more: dict[str, Any]) -> None:
    assert answers_as_its_own(hands(**more), packed=True) == ""


# What lies beyond a pass


@pytest.mark.parametrize("border", [8, 8192])
def test_a_temperature_by_the_place_in_the_pass_is_found(border: int) -> None:
    """Packed, the second document's places would count on from the first one's."""
    assert answers_as_its_own(made("llama4_text", **TEMPERATURE, floor_scale=border), packed=False)


@pytest.mark.parametrize("border", [8, 8192])
def test_without_the_temperature_the_same_model_is_packed(border: int) -> None:
    options = {**TEMPERATURE, "attn_temperature_tuning": False, "floor_scale": border}
    assert answers_as_its_own(made("llama4_text", **options), packed=True) == ""


def test_the_documents_cross_what_the_config_states_and_a_table_of_positions_holds() -> None:
    starts = probe_documents(made("mistral", sliding_window=40)).starts
    assert starts[1] == 5 and 40 < starts[2] - starts[1] <= COMMON["max_position_embeddings"]
    assert not uncrossed(made("mistral", sliding_window=40))
    assert uncrossed(made("mistral", sliding_window=4096))
    assert not uncrossed(tiny("llama")) and not uncrossed(tiny("gpt2"))
    assert probe_documents(tiny("gpt2")).starts[-1] <= 128


def test_borders_are_every_whole_number_at_any_depth() -> None:
    config = {"a": 3, "b": {"c": [4, {"d": 5}], "e": True, "f": "6", "g": 7.5, "h": 8.0}, "i": None, "j": 1}
    assert borders(config) == {3, 4, 5, 8}


def test_a_small_copy_keeps_the_switches_and_makes_the_lengths_small() -> None:
    model = made("gemma3_text", num_hidden_layers=12, sliding_window=4096, max_position_embeddings=131072)
    state, before = torch.random.get_rng_state(), model.config.to_dict()
    small = small_copy(model)
    assert small is not None and type(small) is type(model)
    assert small.config.sliding_window == BORDER and small.config.num_hidden_layers == 6
    assert small.config.layer_types == model.config.layer_types[:6]
    assert set(small.config.layer_types) == {"sliding_attention", "full_attention"}
    assert sum(p.numel() for p in small.parameters()) < 100_000
    assert torch.equal(torch.random.get_rng_state(), state) and model.config.to_dict() == before


def test_lengths_are_made_small_at_any_depth_and_under_any_name() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.1}
    rope |= {"original_max_position_embeddings": 16384}
    small = small_copy(made("ministral3", rope_parameters=rope, max_position_embeddings=65536))
    assert small is not None and small.config.rope_parameters["original_max_position_embeddings"] == BORDER
    small = small_copy(made("llama4_text", **LLAMA4, attention_chunk_size=8192, floor_scale=8192))
    assert small is not None and small.config.attention_chunk_size == small.config.floor_scale == BORDER
    assert small.config.head_dim == COMMON["head_dim"]


class Fussy(MistralForCausalLM):
    """Can't be built in another size."""

    def __init__(self, config: Any) -> None:
        if config.sliding_window != 4096:
            raise ValueError("4096")
        super().__init__(config)


def test_a_copy_that_cannot_be_built_proves_nothing() -> None:
    model = Fussy(AutoConfig.for_model("mistral", **COMMON, sliding_window=4096)).eval().requires_grad_(False)
    assert uncrossed(model) and small_copy(model) is None
    assert answers_as_its_own(model, packed=True) == ""


# Ways


class Averages(nn.Module):
    """A layer's MLP that also sees the mean of its row, filler and all."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + x.mean(1, keepdim=True)


def test_what_neither_packs_nor_pads_runs_a_document_at_a_time() -> None:
    model = made("llama")
    model.model.layers[0].mlp = Averages(model.model.layers[0].mlp)
    answers_as_its_own(model, packed=False)
    forward = plan_forward(model)
    assert forward.way == APART and APART in forward.describe()
    attached = attach(model, AdapterSpec(rank=2, alpha=4))
    loss, count = forward.loss(Batch.of(TOKENS, STARTS.tolist(), TOKENS.roll(-1)))
    loss.backward()
    assert count == len(TOKENS) and any(p.grad is not None and p.grad.any() for p in attached.parameters)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "qwen3_moe"])
def test_a_planned_model_still_answers_when_simply_called(name: str) -> None:
    """With a mask of padding on either side, with a mask of its own, with positions that begin anew."""
    own, planned = tiny(name), tiny(name)
    own.set_attn_implementation("eager")
    assert plan_forward(planned).way == PACKED
    ids = TOKENS[:60].view(2, 30)
    left = torch.ones_like(ids)
    left[0, :7] = 0
    right = left.flip(1)
    square = torch.full((30, 30), torch.finfo(torch.float32).min).triu(1)
    square[10:, 3] = torch.finfo(torch.float32).min
    for mask in (None, torch.ones_like(ids), left, right, square.expand(2, 1, 30, 30)):
        real = mask.bool() if mask is not None and mask.ndim == 2 else torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            got, want = (m(input_ids=ids, attention_mask=mask, use_cache=False).logits[real] for m in (planned, own))
        torch.testing.assert_close(got, want, **CLOSE)
    restart = torch.cat([torch.arange(n) for n in (12, 18)])[None]
    with torch.no_grad():
        got, want = (m(input_ids=ids, position_ids=restart, use_cache=False).logits for m in (planned, own))
    torch.testing.assert_close(got, want, **CLOSE)
