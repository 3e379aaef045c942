"""What lint says of PEFT and transformers is what the two do: each made adapter is loaded by both."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.shipping.lint.finding import LOADS, PEFT, REFUSED, TRANSFORMERS, UNSURE, WRONG, Effect
from deltaw.shipping.lint.lint import lint
from tests.shipping.lint_folders import (
    GONE,
    LAYER,
    NAMES,
    PREFIX,
    Tensors,
    by_peft,
    by_transformers,
    changed,
    effect,
    good,
    opened,
    write,
)
from tests.tiny import tiny_base

Change = Callable[[Tensors], Tensors]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("lint") / "base")


@dataclass(frozen=True)
class Case:
    """An adapter that is right (`right` and `config` over the good one), and then broken (`wrong` and `fields`)."""

    name: str
    code: str
    peft: Effect
    transformers: Effect | None = None  # as PEFT
    wrong: Change = lambda tensors: tensors
    fields: dict[str, Any] = field(default_factory=dict)
    right: Change = lambda tensors: tensors
    config: dict[str, Any] = field(default_factory=dict)


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(*ends: str) -> Change:
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(ends)}


def plus(**more: Tensor) -> Change:
    return lambda tensors: {**tensors, **{PREFIX + name.replace("__", "."): tensor for name, tensor in more.items()}}


def magnitudes(tensors: Tensors) -> Tensors:
    ends = {n.removesuffix("lora_B.weight"): len(t) for n, t in tensors.items() if n.endswith("lora_B.weight")}
    return {**tensors, **{f"{stem}lora_magnitude_vector": torch.full((rows,), 3.0) for stem, rows in ends.items()}}


def b_biases(tensors: Tensors) -> Tensors:
    return {
        **tensors,
        **{n.replace("B.weight", "B.bias"): torch.ones(len(t)) for n, t in tensors.items() if "lora_B" in n},
    }


def times(factor: float, part: str = "lora_") -> Change:
    return lambda tensors: {name: t * factor if part in name else t for name, t in tensors.items()}


HEAD = torch.randn(362, 32, generator=torch.Generator().manual_seed(3))
EMBEDDED = plus(
    model__embed_tokens__lora_embedding_A=torch.randn(4, 362, generator=torch.Generator().manual_seed(4)),
    model__embed_tokens__lora_embedding_B=torch.randn(32, 4, generator=torch.Generator().manual_seed(5)),
)
TOKENS = plus(model__embed_tokens__token_adapter__trainable_tokens_delta=torch.randn(2, 32))
HALVES = ("0.self_attn.q_proj.lora_B.weight", "0.self_attn.q_proj.lora_A.weight")
CASES = [
    Case("no prefix", "DW201", WRONG, LOADS, renamed(PREFIX, "")),
    Case("the adapter's name in the names", "DW202", LOADS, WRONG, renamed(".weight", ".default.weight")),
    Case("no B", "DW203", WRONG, wrong=without(HALVES[0])),
    Case("no A", "DW203", WRONG, wrong=without(HALVES[1])),
    Case("another rank", "DW204", REFUSED, fields={"r": 8}),
    Case("another rank by pattern", "DW204", REFUSED, fields={"rank_pattern": {"q_proj": 2}}),
    Case("another size", "DW205", REFUSED, wrong=lambda t: {**t, f"{LAYER}.lora_B.weight": torch.ones(64, 4)}),
    Case("another head's size", "DW205", REFUSED, right=plus(lm_head__weight=HEAD),
         config={"modules_to_save": ["lm_head"]}, wrong=plus(lm_head__weight=torch.ones(300, 32))),
    Case("another layer", "DW206", WRONG, wrong=renamed("layers.0.", "layers.7.")),
    Case("other layers all", "DW206", WRONG, wrong=renamed("model.layers", "model.h")),
    Case("a compiled model's names", "DW206", WRONG, wrong=renamed(PREFIX, f"{PREFIX}_orig_mod.")),
    Case("targets too few", "DW207", WRONG, fields={"target_modules": ["q_proj", "v_proj"]}),
    Case("targets excluded", "DW207", WRONG, fields={"exclude_modules": ["q_proj"]}),
    Case("targets in one layer", "DW207", WRONG, fields={"layers_to_transform": [0]}),
    Case("targets by a pattern, too few", "DW207", WRONG, fields={"target_modules": ".*(q_proj|v_proj)"}),
    Case("targets that are none", "DW208", REFUSED, fields={"target_modules": ["query"]}),
    Case("targets too many", "DW209", LOADS, fields={"target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"]}),
    Case("nothing in it", "DW211", WRONG, wrong=lambda t: {}),
    Case("a pattern that is none", "DW213", REFUSED, fields={"rank_pattern": {"q_proj(": 4}}),
    Case("an unknown kind", "DW301", REFUSED, fields={"peft_type": "FOO"}),
    Case("no kind", "DW301", REFUSED, fields={"peft_type": GONE}),
    Case("rank 0", "DW302", REFUSED, fields={"r": 0}),
    Case("rank 4.0", "DW302", REFUSED, fields={"r": 4.0}),
    Case("rank as text", "DW302", REFUSED, fields={"r": "4"}),
    Case("rank 0 by pattern", "DW302", REFUSED, fields={"rank_pattern": {"q_proj": 0}}),
    Case("alpha 0", "DW303", WRONG, fields={"lora_alpha": 0}),
    Case("alpha NaN", "DW303", WRONG, fields={"lora_alpha": math.nan}),
    Case("alpha infinite", "DW303", WRONG, fields={"lora_alpha": math.inf}),
    Case("alpha as text", "DW303", REFUSED, fields={"lora_alpha": "8"}),
    Case("alpha null", "DW303", REFUSED, fields={"lora_alpha": None}),
    Case("a rank that isn't given", "DW204", REFUSED, fields={"r": GONE}),
    Case("a task that is none", "DW312", REFUSED, fields={"task_type": "SPEAK"}),
    Case("fan_in_fan_out", "DW310", LOADS, fields={"fan_in_fan_out": True}),
    Case("use_dora without magnitudes", "DW322", WRONG, right=magnitudes, config={"use_dora": True},
         wrong=without("lora_magnitude_vector")),
    Case("magnitudes without use_dora", "DW322", WRONG, right=magnitudes, config={"use_dora": True},
         fields={"use_dora": False}),
    Case("biases without lora_bias", "DW324", WRONG, right=b_biases, config={"lora_bias": True},
         fields={"lora_bias": False}),
    Case("a head that isn't there", "DW327", REFUSED, WRONG, right=plus(lm_head__weight=HEAD),
         config={"modules_to_save": ["lm_head"]}, wrong=without("lm_head.weight")),
    Case("a whole tensor for no module", "DW328", WRONG, right=plus(lm_head__weight=HEAD),
         config={"modules_to_save": ["lm_head"]}, fields={"modules_to_save": None}, wrong=renamed("lm_head", "head")),
    Case("CorDA, unconverted", "DW335", REFUSED, fields={"init_lora_weights": "corda"}),
    Case("a start that is none", "DW336", REFUSED, fields={"init_lora_weights": "zigzag"}),
    Case("NaN", "DW401", WRONG, wrong=times(math.nan)),
    Case("untrained", "DW402", WRONG, wrong=times(0.0, "lora_B")),
]  # fmt: skip
# What loads, and with the logits that are meant: lint must not say otherwise.
RIGHT = [
    Case("plain", "", LOADS),
    Case("rsLoRA", "DW306", LOADS, config={"use_rslora": True}),
    Case("alpha_pattern", "DW307", LOADS, config={"alpha_pattern": {"q_proj": 16}}),
    Case("targets by a pattern", "", LOADS, config={"target_modules": ".*(q_proj|v_proj|down_proj)"}),
    Case("alpha 8.0", "DW304", LOADS, config={"lora_alpha": 8.0}),
    Case("no task", "", LOADS, config={"task_type": GONE}),
    Case("DoRA", "DW321", LOADS, WRONG, right=magnitudes, config={"use_dora": True}),
    Case("biases on B", "DW323", LOADS, right=b_biases, config={"lora_bias": True}),
    Case("a trained head", "DW326", LOADS, right=plus(lm_head__weight=HEAD), config={"modules_to_save": ["lm_head"]}),
    Case("a trained head that isn't named", "DW328", LOADS, right=plus(lm_head__weight=HEAD)),
    Case("a trained norm", "DW332", LOADS, right=plus(model__norm__weight=torch.full((32,), 2.0))),
    Case("LoRA on the embedding", "DW329", LOADS, right=EMBEDDED, config={"target_modules": [*NAMES, "embed_tokens"]}),
    Case("trained tokens", "DW331", LOADS, right=TOKENS, config={"trainable_token_indices": [7, 14]}),
    Case("dropout", "", LOADS, config={"lora_dropout": 0.5}),
    Case("gaussian", "", LOADS, config={"init_lora_weights": "gaussian"}),
    Case("bias all, none there", "DW325", LOADS, config={"bias": "all"}),
]


@pytest.mark.parametrize("case", CASES + RIGHT, ids=lambda case: case.name)
def test_the_verdict_is_what_happens(case: Case, base: Path, tmp_path: Path) -> None:
    tensors, config = good(opened(base))
    tensors, config = case.right(tensors), changed(config, **case.config)
    meant = by_peft(base, write(tmp_path / "right", tensors, config))
    wrong = write(tmp_path / "wrong", case.wrong(tensors), changed(config, **case.fields))
    verdict = lint(wrong, base=str(base))
    assert not case.code or case.code in {found.code for found in verdict.findings}
    expected = {PEFT: case.peft, TRANSFORMERS: case.peft if case.transformers is None else case.transformers}
    for reader, place in ((by_peft, PEFT), (by_transformers, TRANSFORMERS)):
        assert effect(reader, base, wrong, meant) is expected[place], place
        assert verdict.at(place) is expected[place], (
            place,
            [found for found in verdict.findings if place in found.effects],
        )
    assert verdict.exit_code == (case.peft is not LOADS or expected[TRANSFORMERS] is WRONG) or case.peft is LOADS


def test_a_plain_one_has_no_finding_but_those_of_other_forms(base: Path, tmp_path: Path) -> None:
    """MLX has a form of its own, and Ollama's reader shuffles q and k; nothing else is so with a plain adapter."""
    verdict = lint(write(tmp_path / "a", *good(opened(base))), base=str(base))
    assert {found.code for found in verdict.findings} == {"DW108", "DW508"} and verdict.exit_code == 0
    assert UNSURE not in {verdict.at(place) for place in (PEFT, TRANSFORMERS)}
