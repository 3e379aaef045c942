"""The fingerprint sees weights and mathematics, and nothing else; marks of weights alone stay valid."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.adapter.file import BaseId
from deltaw.base.fingerprint import fingerprint_of, mathematics, same_base, settings
from deltaw.base.load import fingerprint
from tests.bases import tiny_llama

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "sliding_window": 8,
}
MODELS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "granite",
    "phi3",
    "starcoder2",
    "olmo2",
    "cohere",
)
OTHER: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_activation": "gelu",
    "rope_parameters": None,
    "layer_types": None,
}


def config_of(model_type: str, **changes: Any) -> Any:
    kept = {name: value for name, value in TINY.items() if hasattr(AutoConfig.for_model(model_type), name)}
    return AutoConfig.for_model(model_type, **kept | changes)


def run(config: Any) -> tuple[torch.Tensor, str]:
    """(logits of the model with fixed weights, its fingerprint)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.normal_(generator=torch.Generator().manual_seed(number), std=0.3)
        return model(input_ids=torch.arange(3, 43)[None]).logits, fingerprint(model)


def other(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    return value * 2 if isinstance(value, (int, float)) and value else 0.5


@pytest.mark.parametrize("model_type", MODELS)
def test_whatever_changes_the_logits_changes_the_fingerprint(model_type: str) -> None:
    """Each field of the config is changed by itself, whatever it is called, and the model is run again."""
    config = config_of(model_type)
    here, mark = run(config)
    tried, missed = 0, []
    for name, value in config.to_dict().items():
        if name in {"model_type", "layer_types", "rope_parameters", "dtype"}:
            continue
        try:
            there, its_mark = run(config_of(model_type, **{name: OTHER.get(name, other(value))}))
        except Exception:  # sizes that don't fit each other, values that a class refuses
            continue
        changed = here.shape != there.shape or not torch.equal(here, there)
        tried += changed
        missed += [name] if changed and its_mark == mark else []
    assert missed == [] and tried >= 4


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rms_norm_eps": 1e-5},
        {"num_attention_heads": 2, "head_dim": 16},
        {"hidden_act": "gelu"},
    ],
)
def test_the_same_weights_with_other_mathematics_are_another_base(changes: dict[str, Any]) -> None:
    plain, changed = config_of("llama"), config_of("llama", **changes)
    weights = list(tiny_llama().parameters())
    one, two = fingerprint_of(weights, plain), fingerprint_of(weights, changed)
    assert one != two and not same_base(one, two)
    assert BaseId("a", None, one).mismatch(BaseId("a", None, two))
    old = fingerprint_of(weights)
    assert len(old) == 7 + 64 and one.startswith(old)
    assert same_base(old, one) and same_base(two, old) and same_base(old, old)
    assert BaseId("a", None, old).mismatch(BaseId("a", None, two)) is None
    assert not same_base(old, "sha256:" + "0" * 64) and not same_base("", one)


def test_who_wrote_the_config_does_not_matter() -> None:
    config = config_of("llama", rms_norm_eps=1e-6)
    same = config_of("llama", rms_norm_eps=float(torch.tensor(1e-6)), max_position_embeddings=64, use_cache=False)
    assert settings(config) == settings(same)
    assert settings(config) == settings(config_of("mistral", sliding_window=None, rms_norm_eps=1e-6))
    assert mathematics(config) != mathematics(config_of("mistral", rms_norm_eps=1e-6))
    windowless = config_of("qwen2", use_sliding_window=False, sliding_window=None, max_window_layers=2)
    assert settings(windowless) == settings(config_of("qwen2", use_sliding_window=False, sliding_window=8))
    saved = type(config).from_dict(config.to_dict())
    assert mathematics(saved) == mathematics(config)
    assert fingerprint(tiny_llama()) == fingerprint(tiny_llama().bfloat16().float())
