"""What a model can be given, found without its weights, is what it then takes and no more."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from transformers import AutoModelForCausalLM

from deltaw.base.limits import Limits
from deltaw.data.example import Example
from deltaw.data.examples import Examples
from deltaw.errors import InputError

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OLD = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
MODELS: dict[str, tuple[Any, dict[str, Any], Limits]] = {
    "learned": (T.GPT2Config, OLD, Limits(40, 24, 24)),
    "learned, two rows spoken for": (
        T.OPTConfig,
        {**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 24},
        Limits(40, 24, 24),
    ),
    "learned, padding spoken for": (
        T.RobertaConfig,
        {**SMALL, "intermediate_size": 16, "max_position_embeddings": 24, "is_decoder": True},
        Limits(40, 22, 24),
    ),
    "computed once": (T.GPTJConfig, {**OLD, "rotary_dim": 4}, Limits(40, 24, 24)),
    "rotary": (T.LlamaConfig, {**SMALL, "intermediate_size": 16, "max_position_embeddings": 24}, Limits(40, None, 24)),
    "sinusoidal, grows": (
        T.XGLMConfig,
        {"vocab_size": 40, "d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 16,
         "max_position_embeddings": 24},
        Limits(40, None, 24),
    ),
    "none": (T.BloomConfig, {"vocab_size": 40, "hidden_size": 16, "n_layer": 1, "n_head": 2}, Limits(40, None, None)),
}  # fmt: skip


def row(tokens: list[int], origin: str = "d.jsonl:1") -> Example:
    return Example(np.array(tokens, np.int32), np.ones(len(tokens), bool), origin)


def test_a_towers_table_of_patches_is_no_limit_of_text() -> None:
    text = {**SMALL, "intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 24}
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = T.Gemma3Config(text_config=text, vision_config={**tower, "image_size": 4, "patch_size": 2})
    with torch.device("meta"):
        model = T.Gemma3ForConditionalGeneration(config)
    assert any(m.num_embeddings == 4 for m in model.modules() if isinstance(m, torch.nn.Embedding))
    assert Limits.of(model) == Limits(40, None, 24)


@pytest.mark.parametrize("name", MODELS)
def test_the_limits_are_those_at_which_the_model_fails(name: str) -> None:
    kind, fields, wanted = MODELS[name]
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(kind(**fields))
    limits = Limits.of(skeleton)
    assert limits == wanted
    model = AutoModelForCausalLM.from_config(kind(**fields)).eval()
    for length in (22, 23, 24, 25, 60):
        rows = [row([5] * length)]
        if limits.table is not None and length > limits.table:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, length), 5))
            with pytest.raises(InputError, match=r"d\.jsonl:1"):
                limits.check(Examples.of(rows))
        else:
            model(input_ids=torch.full((1, length), 5))
            limits.check(Examples.of(rows))
        assert bool(limits.warnings(Examples.of(rows))) == (limits.context is not None and length > limits.context)
    limits.check(Examples.of([row([39])]))
    with pytest.raises(InputError, match="token id 40"):
        limits.check(Examples.of([row([1, 40, 2])]))


def test_a_head_smaller_than_the_embedding_bounds_the_ids() -> None:
    model = AutoModelForCausalLM.from_config(T.LlamaConfig(**SMALL, intermediate_size=16, tie_word_embeddings=False))
    model.lm_head = torch.nn.Linear(16, 30, bias=False)
    assert Limits.of(model).vocabulary == 30


def test_every_row_is_counted_and_the_first_are_named() -> None:
    rows = [row([1] * (30 if n in (3, 7, 8) else 5), f"d.jsonl:{n}") for n in range(10)]
    with pytest.raises(InputError) as refused:
        Limits(40, 24, 24).check(Examples.of(rows))
    assert (
        "3 rows" in refused.value.what and "d.jsonl:3: 30" in refused.value.what and "and 1 more" in str(refused.value)
    )
    assert "max_length to 24" in str(refused.value.fix)
    (said,) = Limits(40, None, 24).warnings(Examples.of(rows))
    assert "3 rows (30.0 %)" in said and "30 (d.jsonl:3)" in said
