"""What a GGUF says becomes the model's mathematics, or is refused by name."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaw.base.fingerprint import settings as mathematics
from deltaw.base.gguf import to_folder
from deltaw.base.gguf_rope import llama3
from deltaw.base.load import fingerprint, open_base
from deltaw.errors import InputError

from .gguf_models import model_of, write_model


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


def divisors(model: Any) -> list[float]:
    """What `rope_freqs.weight` holds: by how much this model's frequencies are smaller than unscaled ones."""
    dim = model.config.head_dim
    plain = [10000.0 ** (-2 * i / dim) for i in range(dim // 2)]
    return [a / float(b) for a, b in zip(plain, model.model.rotary_emb.inv_freq, strict=True)]


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_KEYS = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0], "attention_factor": 1.2}
# (model type, the config's settings, keys beside the usual, tensors of the model)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any]] = {
    "llama": ("llama", {}, {}, None),
    "llama, wide heads": ("llama", {"head_dim": 16}, {}, None),
    "llama, linear": ("llama", rope("linear", factor=4.0), LINEAR_KEYS, None),
    "llama, linear by its old name": ("llama", rope("linear", factor=4.0), {"rope.scale_linear": 4.0}, None),
    "llama, scaling none": ("llama", {}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    "llama, yarn": ("llama", rope("yarn", **YARN), YARN_KEYS, None),
    "llama, yarn, warmer": (
        "llama",
        rope("yarn", **YARN, attention_factor=1.5 * (1 + 0.1 * math.log(4)), beta_fast=16.0, beta_slow=2.0),
        YARN_KEYS
        | {"rope.scaling.attn_factor": 1.5, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        None,
    ),
    "llama 3.1": ("llama", rope("llama3", **LLAMA3), {}, divisors),
    "mistral": ("mistral", {"sliding_window": 8}, {}, None),
    "mistral by its name": ("mistral", {"sliding_window": None}, {".general.name": "mistral"}, None),
    "qwen2": ("qwen2", {}, {}, None),
    "qwen2, yarn": ("qwen2", rope("yarn", **YARN), YARN_KEYS, None),
    "qwen3": ("qwen3", {"head_dim": 16}, {}, None),
    "qwen3moe": ("qwen3_moe", {"norm_topk_prob": True}, {"feed_forward_length": 48}, None),
    "qwen2moe": (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 24},
        {"feed_forward_length": 48, "expert_shared_feed_forward_length": 24},
        None,
    ),
    "qwen3moe, shares as they come": (
        "qwen3_moe",
        {"norm_topk_prob": False},
        {"feed_forward_length": 48, "expert_weights_norm": False},
        None,
    ),
    "nemotron": ("nemotron", rope("default", partial_rotary_factor=0.5), {"attention.layer_norm_epsilon": 1e-5}, None),
    "stablelm, in parallel": ("stablelm", {"use_parallel_residual": True}, {}, None),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 8,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
            "query_pre_attn_scalar": 8,
        },
        {},
        None,
    ),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 8, "num_hidden_layers": 7, "query_pre_attn_scalar": 8, "rope_parameters": GEMMA3},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        None,
    ),
    "gemma3, capped": (
        "gemma3_text",
        {"sliding_window": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 4},
        {"attention.scale": 0.5},
        None,
    ),
    "phi3": ("phi3", {"sliding_window": 8}, {}, None),
    "phi3, a share turned": ("phi3", rope("default", partial_rotary_factor=0.5), {}, None),
    "phi3, long": (
        "phi3",
        rope("longrope", **FACTORS, partial_rotary_factor=1.0) | {"original_max_position_embeddings": 32},
        {"rope.scaling.attn_factor": 1.2, "rope.scaling.original_context_length": 32},
        lambda _: {
            "rope_factors_short.weight": FACTORS["short_factor"],
            "rope_factors_long.weight": FACTORS["long_factor"],
        },
    ),
    "starcoder2": ("starcoder2", {}, {}, None),
    "stablelm": ("stablelm", {"use_qkv_bias": True}, {}, None),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48}, {}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_model_that_comes_out_is_the_one_that_went_in(tmp_path: Path, name: str) -> None:
    model_type, config, keys, tensors = CASES[name]
    model = model_of(model_type, **config)
    extra = tensors(model) if tensors else {}
    extra = extra if isinstance(extra, dict) else {"rope_freqs.weight": extra}
    path = write_model(tmp_path / "x.gguf", model, keys=keys, tensors=extra)
    base = open_base(str(to_folder(path, tmp_path / "cache")), dtype="float32", device="cpu")
    assert mathematics(base.model.config) == mathematics(model.config)
    assert base.fingerprint == fingerprint(model)
    for length in (6, 100):  # within every window and past it
        ids = torch.arange(3, 3 + length)[None]
        with torch.no_grad():
            torch.testing.assert_close(
                base.model(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
            )


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "a scale of attention": ("llama", {"attention.scale": 0.5}, {}, "attention.scale"),
    "a scale of logits": ("llama", {"logit_scale": 3.0}, {}, "logit_scale"),
    "a scale of residuals": ("qwen2", {"residual_scale": 0.1}, {}, "residual_scale"),
    "a scale of embeddings": ("llama", {"embedding_scale": 12.0}, {}, "embedding_scale"),
    "caps": ("llama", {"final_logit_softcapping": 30.0}, {}, "final_logit_softcapping"),
    "caps that gemma3 never applies": ("gemma3_text", {"attn_logit_softcapping": 50.0}, {}, "attn_logit_softcapping"),
    "a window": ("qwen2", {"attention.sliding_window": 16}, {}, "sliding_window"),
    "another's architecture": ("llama", {".general.architecture": "falcon"}, {}, "falcon"),
    "a number for a flag": ("stablelm", {"use_parallel_residual": 1}, {}, "use_parallel_residual"),
    "a clamp": ("llama", {"attention.clamp_kqv": 8.0}, {}, "clamp_kqv"),
    "a share turned": ("llama", {"rope.dimension_count": 4}, {}, "rope.dimension_count"),
    "another kind of scaling": ("llama", {"rope.scaling.type": "su"}, {}, "rope.scaling.type"),
    "attention's factor alone": ("llama", {"rope.scaling.attn_factor": 1.2}, {}, "attn_factor"),
    "sections": ("llama", {"rope.dimension_sections": [2, 1, 1, 0]}, {}, "dimension_sections"),
    "tomorrow's key": ("llama", {"attention.temperature_tuning": True}, {}, "temperature_tuning"),
    "another's key": ("llama", {".qwen2.rope.freq_base": 5.0}, {}, "qwen2.rope.freq_base"),
    "a key without a space": ("llama", {".rope.scaling.factor": 8.0}, {}, "rope.scaling.factor"),
    "tomorrow's tokenizer": ("llama", {".tokenizer.ggml.lowercase": True}, {}, "tokenizer.ggml.lowercase"),
    "heads that differ": ("llama", {"attention.head_count_kv": [2, 1, 2]}, {}, "head_count_kv"),
    "no heads of keys": ("llama", {"attention.head_count_kv": None}, {}, "head_count_kv"),
    "infinity": ("llama", {"rope.freq_base": float("inf")}, {}, "rope.freq_base"),
    "a text": ("llama", {"rope.freq_base": "10000"}, {}, "rope.freq_base"),
    "a bias": ("llama", {}, {"blk.0.attn_q.bias": [1.0] * 32}, "blk.0.attn_q.bias"),
    "a tensor nobody knows": ("gemma2", {}, {"blk.1.new.weight": [[1.0, 2.0]]}, "blk.1.new.weight"),
    "factors of no scaling": ("llama", {}, {"rope_freqs.weight": [1.0, 3.0, 2.0, 8.0]}, "rope_freqs.weight"),
    "too few factors": ("llama", {}, {"rope_freqs.weight": [8.0, 8.0]}, "rope_freqs.weight"),
    "factors and scaling": ("llama", LINEAR_KEYS, {"rope_freqs.weight": [1.0, 1.0, 8.0, 8.0]}, "rope_freqs.weight"),
    "long factors": ("llama", {}, {"rope_factors_long.weight": [1.0] * 4}, "rope_factors_long.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_refused_by_name(tmp_path: Path, name: str) -> None:
    model_type, keys, tensors, named = REFUSED[name]
    path = write_model(tmp_path / "x.gguf", model_of(model_type), keys=keys, tensors=tensors)
    with pytest.raises(InputError) as caught:
        to_folder(path, tmp_path / "cache")
    assert named in caught.value.what and "x.gguf" in caught.value.what
    assert len(str(caught.value).splitlines()) <= 5


def test_what_says_nothing_is_no_reason(tmp_path: Path) -> None:
    keys = {
        "logit_scale": 1.0,
        "attention.causal": True,
        "expert_count": 0,
        "attention.scale": 8**-0.5,
        "rope.scaling.finetuned": False,
        ".general.quantized_by": "somebody",
        ".quantize.imatrix.chunks_count": 3,
        ".somebody.note": "hello",
        ".tokenizer.ggml.eot_token_id": 3,
    }
    path = write_model(tmp_path / "x.gguf", model_of("llama"), keys=keys)
    assert open_base(str(to_folder(path, tmp_path / "cache")), dtype="float32").fingerprint == fingerprint(
        model_of("llama")
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    dim=st.sampled_from([8, 16, 64, 80, 128]),
    theta=st.floats(5e3, 2e6),
    factor=st.floats(1.5, 40),
    original=st.integers(64, 20_000),
    low=st.floats(0.5, 3),
    ratio=st.floats(1.2, 20),
)
def test_llama3_is_recovered_from_its_factors(
    dim: int, theta: float, factor: float, original: int, low: float, ratio: float
) -> None:
    """Whatever the four numbers are, those that are found give the same frequencies by transformers' own formula."""
    wanted = {"factor": factor, "low_freq_factor": low, "high_freq_factor": low * ratio}
    wanted["original_max_position_embeddings"] = original
    frequencies = frequencies_of(dim, theta, {"rope_type": "llama3", **wanted})
    plain = frequencies_of(dim, theta, {"rope_type": "default"})
    found = llama3(tuple((plain / frequencies).tolist()), theta, dim, 8192)
    assert found is not None
    torch.testing.assert_close(
        frequencies_of(dim, theta, {"rope_type": "default", **found}), frequencies, rtol=1e-4, atol=0
    )


def frequencies_of(dim: int, theta: float, parameters: dict[str, Any]) -> torch.Tensor:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    return LlamaRotaryEmbedding(config).inv_freq
