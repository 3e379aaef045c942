"""Decoding side by side changes no answer: for every kind of cache, across rotary borders, beyond windows.

The truth is what transformers' own `generate` gives for each prompt alone, before deltaw has touched the model.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.base.forward import plan_forward
from deltaw.errors import InputError
from deltaw.generate.engine import generate, stream
from deltaw.generate.sampling import Sampling
from deltaw.generate.together import Together
from tests.architectures import COMMON, MOE, PACKED, PADDED

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 8}
STATES: dict[str, dict[str, Any]] = {
    "mamba2": {**COMMON, "num_heads": 8, "head_dim": 8, "state_size": 8, "chunk_size": 8, "n_groups": 1},
    "falcon_mamba": COMMON,
    "rwkv": {**COMMON, "attention_hidden_size": 32},
    "falcon_h1": {**COMMON, **MAMBA, "mamba_d_ssm": 64},
    "bamba": {**COMMON, **MAMBA, "attn_layer_indices": [1]},
    "jamba": {**COMMON, **MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "granitemoehybrid": {**COMMON, **MOE, **MAMBA, "layer_types": ["mamba", "attention"]},
    "nemotron_h": {**COMMON, **MOE, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8,
                   "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    "zamba2": {**COMMON, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"],
               "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_state": 8, "mamba_ngroups": 1, "num_mem_blocks": 1},
    "lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**COMMON, **MOE, "layer_types": ["linear_attention", "full_attention"],
                   "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "shared_expert_intermediate_size": 24},
    "recurrent_gemma": {**COMMON, "num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32},
    "minimax": {**COMMON, **MOE, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 8.0, 32.0], "original_max_position_embeddings": 24, "factor": 4.0}  # fmt: skip
BORDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {**COMMON, "original_max_position_embeddings": 24, "rope_parameters": LONGROPE}),
    "longrope without a switch": ("llama", {**COMMON, "rope_parameters": LONGROPE}),
    "dynamic": (
        "llama",
        {
            **COMMON,
            "max_position_embeddings": 24,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
}
WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "chunks": ("llama4_text", {**COMMON, **MOE, "attention_chunk_size": 8, "intermediate_size_mlp": 48,
                               "no_rope_layers": [1, 0], "layer_types": ["chunked_attention", "full_attention"]}),
    "phimoe": ("phimoe", {**COMMON, **MOE, "sliding_window": 8}),
    "starcoder2": ("starcoder2", {**COMMON, "sliding_window": 8}),
}  # fmt: skip
# They differ in length, some alike, shorter and longer than every window, chunk and border here.
PROMPTS = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 31, 20, 9, 20)]
PROMPTS += [PROMPTS[3][::-1]]
NEW = 12
STOP = set(range(3, 97, 9))


def build(kind: str, config: dict[str, Any]) -> nn.Module:
    """In float64, so that no two tokens tie; experts one by one, since the grouped product isn't made for that."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), experts_implementation="eager")
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval().requires_grad_(False)


def alone(model: Any, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        model(input_ids=torch.tensor([[1]]))  # dynamic NTK comes to rest; transformers' generate itself lets it leak
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                             eos_token_id=None, pad_token_id=0)  # fmt: skip
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def until_stop(answer: list[int]) -> list[int]:
    return answer[: next((i for i, token in enumerate(answer) if token in STOP), NEW)]


ALL = {name: (name, config) for name, config in {**PACKED, **PADDED, **STATES}.items()} | BORDERS | WINDOWS


@pytest.mark.parametrize("name", ALL)
def test_each_prompt_gets_what_it_gets_alone(name: str) -> None:
    model = build(*ALL[name])
    truth = alone(model)
    plan_forward(model)
    sampling = Sampling(max_new_tokens=NEW)
    assert generate(model, PROMPTS, sampling, set()) == truth
    assert generate(model, PROMPTS, sampling, STOP) == [until_stop(answer) for answer in truth]  # rows leave
    assert [list(stream(model, prompt, sampling, set())) for prompt in PROMPTS[:2]] == truth[:2]
    assert len({tuple(answer) for answer in truth}) > 3  # a model that says one thing would prove nothing


def test_what_may_share_a_batch_is_found() -> None:
    def found(name: str, most: int = 64) -> Together:
        return Together.on(build(*ALL[name]), most)

    assert found("llama") == found("mistral") == Together(company=True, padding=True, leaving=True, border=None)
    assert found("mamba") == Together(company=True, padding=True, leaving=True, border=None)
    assert found("minimax") == Together(company=True, padding=False, leaving=False, border=None)  # pads leak
    assert found("recurrent_gemma").leaving is False  # the state lies in its modules
    assert found("rwkv").company is False  # writes into the state that it was given
    for name in BORDERS:
        assert found(name).border == 24
        assert found(name, most=24).border is None


def test_a_model_is_tried_once() -> None:
    model: Any = build(*ALL["llama"])
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    generate(model, PROMPTS[:2], Sampling(max_new_tokens=2), set())
    first = len(passes)
    generate(model, PROMPTS[:2], Sampling(max_new_tokens=2), set())
    assert len(passes) - first == 2 < first  # for the tokens
    list(stream(model, PROMPTS[0], Sampling(max_new_tokens=2), set()))
    assert len(passes) - first == 2 * 2


def test_a_long_answer_leaves_no_frequencies_behind() -> None:
    model: Any = build(*BORDERS["dynamic"])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    truth = alone(model, PROMPTS[:1])
    model(input_ids=torch.tensor([PROMPTS[1]]))  # grown by a pass of another's
    generate(model, [PROMPTS[1]], Sampling(max_new_tokens=NEW), set())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert generate(model, PROMPTS[:1], Sampling(max_new_tokens=NEW), set()) == truth
    tokens = stream(model, PROMPTS[1], Sampling(max_new_tokens=NEW), set())
    next(tokens)
    tokens.close()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_model_without_a_cache_is_named() -> None:
    model = build("openai-gpt", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64})
    with pytest.raises(InputError, match="OpenAIGPTLMHeadModel has no cache"):
        generate(model, PROMPTS[:2], Sampling(max_new_tokens=2), set())
