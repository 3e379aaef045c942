"""What real PEFT saves, in its varieties: lint's verdict is what PEFT and transformers make of the very folder."""

import json
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from deltaw.errors import InputError
from deltaw.shipping.lint.finding import LOADS, PEFT, REFUSED, TRANSFORMERS, UNSURE, VLLM, WRONG, Effect
from deltaw.shipping.lint.lint import lint
from tests.shipping.lint_folders import by_peft, by_transformers, effect, good, logits, opened, write
from tests.shipping.models import base_folder
from tests.tiny import tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("saved") / "base")


def saved(base: Path, config: peft.PeftConfig, folder: Path) -> Tensor:
    """An adapter with random numbers, saved; the logits of the model that it was saved from."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(opened(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return logits(model)


def happens(base: Path, folder: Path, meant: Tensor) -> dict[str, Effect]:
    return {
        place: effect(reader, base, folder, meant)
        for place, reader in ((PEFT, by_peft), (TRANSFORMERS, by_transformers))
    }


CAUSAL = {"task_type": "CAUSAL_LM"}
TARGETS = {**CAUSAL, "target_modules": ["q_proj", "down_proj"]}
OTHERS: list[tuple[str, Callable[..., peft.PeftConfig], dict[str, Any]]] = [
    ("IA3", peft.IA3Config, {**TARGETS, "feedforward_modules": ["down_proj"]}),
    ("LoHa", peft.LoHaConfig, {**TARGETS, "r": 4}),
    ("LoKr", peft.LoKrConfig, {**TARGETS, "r": 4}),
    ("AdaLoRA", peft.AdaLoraConfig, {**TARGETS, "total_step": 10}),
    ("OFT", peft.OFTConfig, {**TARGETS, "oft_block_size": 4}),
    ("LN tuning", peft.LNTuningConfig, {**CAUSAL, "target_modules": ["input_layernorm"]}),
    ("VeRA", peft.VeraConfig, {**CAUSAL, "target_modules": ["q_proj"], "r": 4}),
    ("prefixes", peft.PrefixTuningConfig, {**CAUSAL, "num_virtual_tokens": 4}),
    ("prompts", peft.PromptTuningConfig, {**CAUSAL, "num_virtual_tokens": 4}),
]


@pytest.mark.parametrize(("kind", "fields"), [case[1:] for case in OTHERS], ids=[case[0] for case in OTHERS])
def test_what_is_no_lora_is_not_held_to_loras_names(
    kind: Callable[..., peft.PeftConfig], fields: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """Their tensors and fields aren't LoRA's: that made nine kinds "refused" or "wrong" which load rightly."""
    meant = saved(base, kind(**fields), tmp_path / "a")
    truth = happens(base, tmp_path / "a", meant)
    verdict = lint(tmp_path / "a", base=str(base))
    assert truth[PEFT] is LOADS and verdict.at(PEFT) is UNSURE  # lint looks at LoRA only
    assert verdict.at(TRANSFORMERS) is (REFUSED if truth[TRANSFORMERS] is REFUSED else UNSURE)
    assert verdict.at(VLLM) is REFUSED
    assert {found.code for found in verdict.findings} <= {"DW107", "DW108", "DW301", "DW502"}


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_peft_makes_again(start: str, base: Path, tmp_path: Path) -> None:
    """Unconverted it is right, converted with the field left as it was it is wrong: the file doesn't tell."""
    meant = saved(base, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=start, **TARGETS), tmp_path / "a")
    assert happens(base, tmp_path / "a", meant) == {PEFT: LOADS, TRANSFORMERS: LOADS}
    tensors, config = good(opened(base))
    plain = by_peft(base, write(tmp_path / "plain", tensors, config))
    write(tmp_path / "b", tensors, {**config, "init_lora_weights": start})
    assert happens(base, tmp_path / "b", plain) == {PEFT: WRONG, TRANSFORMERS: WRONG}
    for folder in ("a", "b"):
        verdict = lint(tmp_path / folder, base=str(base))
        assert (verdict.at(PEFT), verdict.at(TRANSFORMERS), verdict.at(VLLM)) == (UNSURE, UNSURE, REFUSED)


@pytest.mark.parametrize("pattern", ["layers", ["h", "layers"]])
def test_layers_by_a_plain_layers_pattern(pattern: Any, base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, layers_to_transform=1, layers_pattern=pattern, **TARGETS)
    meant = saved(base, config, tmp_path / "a")
    verdict = lint(tmp_path / "a", base=str(base))
    assert happens(base, tmp_path / "a", meant)[PEFT] is LOADS is verdict.at(PEFT)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layers_to_transform": 0}))
    verdict = lint(tmp_path / "a", base=str(base))
    assert happens(base, tmp_path / "a", meant)[PEFT] is WRONG is verdict.at(PEFT)


@pytest.mark.parametrize(("family", "truth"), [("qwen2_moe", LOADS), ("qwen3_moe", WRONG)])
def test_dense_layers_beside_experts(family: str, truth: Effect, tmp_path: Path) -> None:
    """PEFT goes by a table of transformers' that has some versions' families in it and others not."""
    base = base_folder(tmp_path / "base", family, **{"mlp_only_layers": [0], **(MOE if family == "qwen3_moe" else {})})
    tensors, config = good(opened(base), names=("q_proj", "down_proj"))
    folder = write(tmp_path / "a", tensors, config)
    dropped = any("down_proj" in name for name in tensors) and not _held(base, folder)
    assert dropped is (truth is WRONG)
    assert lint(folder, base=str(base)).at(PEFT) is (WRONG if dropped else UNSURE)


MOE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2,
}  # fmt: skip


def _held(base: Path, folder: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(opened(base), folder)
    return any("layers.0.mlp.down_proj.lora_B" in name for name, _ in model.named_parameters())


def test_a_trainers_state_is_no_adapter(base: Path, tmp_path: Path) -> None:
    """optimizer.pt passed for the weights."""
    folder = write(tmp_path / "checkpoint-100", *good(opened(base)))
    torch.save({}, folder / "optimizer.pt")
    assert lint(folder, base=str(base)).at(PEFT) is LOADS
    (folder / "adapter_model.safetensors").unlink()
    verdict = lint(folder, base=str(base))
    assert verdict.at(PEFT) is REFUSED and verdict.exit_code == 1
    torch.save({}, folder / "adapter_model.bin")
    assert lint(folder, base=str(base)).at(PEFT) is UNSURE
    with pytest.raises(InputError) as error:
        lint(tmp_path)
    assert "checkpoint-100" in str(error.value)


def test_a_byte_order_mark_is_read_by_none(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", *good(opened(base)))
    meant, file = by_peft(base, folder), folder / "adapter_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert happens(base, folder, meant) == {PEFT: REFUSED, TRANSFORMERS: REFUSED}
    verdict = lint(folder, base=str(base))
    assert verdict.at(PEFT) is verdict.at(TRANSFORMERS) is REFUSED


def test_a_templates_path_can_be_pasted(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "my adapter", *good(opened(base)))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (fix,) = [found.fix for found in lint(folder, base=str(base)).findings if found.code == "DW602"]
    assert str(folder / "chat_template.jinja") in shlex.split(fix.partition(";")[0])


def test_added_tokens_ask_for_a_resized_base(base: Path, tmp_path: Path) -> None:
    """It said "name the base that it was trained on", which it was."""
    model = opened(base)
    model.resize_token_embeddings(367)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.LoraConfig(r=4, **TARGETS)).save_pretrained(tmp_path / "a")
        verdict = lint(tmp_path / "a", base=str(base))
        assert effect(by_peft, base, tmp_path / "a", torch.zeros(1)) is REFUSED is verdict.at(PEFT)
        (fix,) = [found.fix for found in verdict.findings if found.code == "DW205"]
        again = opened(base)
        exec(fix.partition(": ")[2], {"model": again})
        peft.PeftModel.from_pretrained(again, tmp_path / "a")


def test_an_empty_template_is_none(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", *good(opened(base)))
    (folder / "chat_template.jinja").write_text("\n")
    assert "DW602" not in {found.code for found in lint(folder, base=str(base)).findings}
