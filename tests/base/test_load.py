"""open_base: frozen and whole, or refused by name; the fingerprint sees weights and nothing else."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from deltaw.base import dtype
from deltaw.base.dtype import fast_dtype
from deltaw.base.load import Base, check_finite, fingerprint, open_base, pick_device
from deltaw.base.source import find_base
from deltaw.errors import InputError
from tests.bases import BUILTIN, tiny_gpt2, tiny_llama


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_base_is_frozen_quiet_and_what_was_saved(
    model: PreTrainedModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "m")
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    base = open_base(str(tmp_path / "m"), dtype="float32")
    assert capfd.readouterr() == ("", "")
    assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled())
    assert not base.model.training and not any(weight.requires_grad for weight in base.model.parameters())
    assert (base.dtype, base.device.type) == (torch.float32, pick_device("auto").type)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(base.model.cpu()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_fingerprint_sees_weights_only(folder: Path, sharded: Path) -> None:
    prints = {open_base(str(f), dtype=d).fingerprint for f in (folder, sharded) for d in ("float32", "bfloat16")}
    assert len(prints) == 1
    assert prints == {fingerprint(tiny_llama())}
    assert prints.pop().startswith("sha256:")
    different = [tiny_llama(1), tiny_llama(tied=True), tiny_gpt2()]
    changed = tiny_llama()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 0.1
    assert len({fingerprint(model) for model in [tiny_llama(), *different, changed]}) == 5


def test_fingerprint_of_stored_half_precision(folder: Path) -> None:
    half = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    prints = {open_base(str(folder), dtype=d).fingerprint for d in ("float32", "bfloat16")}
    assert len(prints) == 1


def test_empty_parameters_have_a_fingerprint() -> None:
    assert fingerprint(torch.nn.ParameterList([torch.zeros(0), torch.zeros(())])).startswith("sha256:")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nonfinite_weights_are_refused_by_name(folder: Path, value: float, dtype: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        open_base(str(folder), dtype=dtype)


def test_weights_that_float16_cannot_hold_are_refused_with_another_type(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        open_base(str(folder), dtype="float16")
    assert "float32" in str(caught.value.fix)
    assert open_base(str(folder), dtype="bfloat16").dtype == torch.bfloat16


def test_missing_extra_and_misshapen_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    broken = {
        "not in the files": {key: value for key, value in whole.items() if key != name},
        "no place for it": whole | {"extra.weight": torch.zeros(3)},
        "can't load it|wrong shape": whole | {name: torch.zeros(3, 3)},
    }
    for message, weights in broken.items():
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(InputError, match=message) as caught:
            open_base(str(folder))
        assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "nonesuch"},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "vit", "architectures": ["ViTModel"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": 3},
        {"is_encoder_decoder": True},
        {"hidden_size": "many"},
        {"hidden_size": 32},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 3},
        {"vocab_size": -1},
    ],
)
def test_models_that_are_no_causal_lm_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(InputError, match="tiny") as caught:
        open_base(str(folder))
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize("model_type", ["llama", "canary"])
def test_code_in_the_folder_never_runs(folder: Path, tmp_path: Path, model_type: str) -> None:
    code = f"open({str(tmp_path / 'canary')!r}, 'w').write('ran')\n"
    for module in ("configuration_canary", "modeling_canary"):
        (folder / f"{module}.py").write_text(code)
    auto_map = {
        "AutoConfig": "configuration_canary.CanaryConfig",
        "AutoModelForCausalLM": "modeling_canary.CanaryForCausalLM",
    }
    edit(folder, model_type=model_type, auto_map=auto_map, trust_remote_code=True)
    if model_type == "llama":
        assert open_base(str(folder)).fingerprint == fingerprint(tiny_llama())
    else:
        with pytest.raises(InputError):
            open_base(str(folder))
    assert not (tmp_path / "canary").exists()


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("nonesuch", "cuda:99", "", "privateuseone", "meta"):
        with pytest.raises(InputError, match="device"):
            pick_device(name)


def test_the_race_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    fast_dtype.cache_clear()
    start = time.perf_counter()
    assert fast_dtype() in (torch.float32, torch.bfloat16)
    assert time.perf_counter() - start < 2  # 0.12 s on an idle machine


@pytest.mark.parametrize("disturbed", [False, True])
def test_a_race_that_was_run_undisturbed_is_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disturbed: bool
) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dtype, "UNDISTURBED", 2.0 if disturbed else 0.0)
    winners = iter([torch.bfloat16, torch.float32])
    monkeypatch.setattr(dtype, "_raced", lambda: next(winners))
    first, second = [dtype.fast_dtype.__wrapped__() for _ in range(2)]
    assert (first, second) == (torch.bfloat16, torch.float32 if disturbed else torch.bfloat16)
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / dtype.FILE).write_text('{"cut')  # raced anew, not trusted
    monkeypatch.setattr(dtype, "_raced", lambda: torch.float32)
    assert dtype.fast_dtype.__wrapped__() == torch.float32


def test_the_real_model_answers(builtin: Base, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    from deltaw.generate.engine import generate, stream
    from deltaw.generate.sampling import Sampling

    tokenizer = AutoTokenizer.from_pretrained(builtin.source.directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    stop = {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    [answer] = generate(builtin.model, [prompt], Sampling(max_new_tokens=16), stop)
    assert "Paris" in tokenizer.decode(answer)
    assert list(stream(builtin.model, prompt, Sampling(max_new_tokens=16), stop)) == answer

    start = time.perf_counter()
    source = find_base(BUILTIN)
    again = open_base(source, dtype="float32")
    with capsys.disabled():
        print(f" [second opening: {time.perf_counter() - start:.2f} s]", end="")
    assert again.fingerprint == builtin.fingerprint
    assert sum(weight.numel() for weight in again.model.parameters()) == 134_515_008
    check_finite(again.model, source.directory)
