"""A merged model's config read by those who know transformers' older names alone."""

from typing import Any

import pytest
from transformers import AutoConfig

from deltaw.base.fingerprint import mathematics
from deltaw.shipping.merge.older_config import NEW, with_older_names

SMALL = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3, "rope_theta": 1e4}
DEFAULT = {"rope_type": "default", "rope_theta": 1e5}


def config_of(model_type: str, **fields: Any) -> Any:
    return AutoConfig.for_model(model_type, **SMALL, **fields)


def read(raw: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**raw)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        *[(kind, {NEW: rope}) for kind in ("llama", "qwen2", "qwen3", "mistral") for rope in (DEFAULT, LINEAR, YARN)],
        ("llama", {NEW: LLAMA3}),
        ("gemma2", {NEW: DEFAULT}),
        ("gemma3_text", {NEW: {"full_attention": LINEAR, "sliding_attention": {**DEFAULT, "rope_theta": 3e4}}}),
        ("gemma3_text", {}),
        ("phi3", {NEW: {**LONG, "partial_rotary_factor": 0.75}, "original_max_position_embeddings": 4096}),
        ("stablelm", {NEW: {**DEFAULT, "partial_rotary_factor": 0.25}}),
        ("gpt2", {}),
    ],
)
def test_both_forms_and_the_older_alone_mean_the_same(model_type: str, fields: dict[str, Any]) -> None:
    config = config_of(model_type, **fields)
    raw = config.to_dict()
    both = with_older_names(raw)
    older = {name: value for name, value in both.items() if name != NEW}
    assert mathematics(read(both)) == mathematics(config)
    assert mathematics(read(older)) == mathematics(config)
    if NEW in raw:
        assert older != {name: value for name, value in raw.items() if name != NEW}, "nothing was added"
        without = {name: value for name, value in raw.items() if name != NEW}
        if fields:
            assert mathematics(read(without)) != mathematics(config), "the case shows nothing"


def test_what_has_the_older_names_stays_as_it_is() -> None:
    raw = {"rope_theta": 1e5, NEW: DEFAULT}
    assert with_older_names(raw) == raw


def test_a_models_text_part_is_looked_at_too() -> None:
    assert with_older_names({"text_config": {NEW: DEFAULT}})["text_config"]["rope_theta"] == 1e5
