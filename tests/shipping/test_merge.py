"""`deltaw merge`: the folder that transformers opens answers as base and adapter do; of a failure nothing is left."""

import errno
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.base.load import open_base
from deltaw.commands.merge import merge_named
from deltaw.errors import InputError, RunError
from deltaw.factors import LowRank
from tests.faults.common import changed, child
from tests.shipping.models import FAMILIES, base_folder, loaded, random_adapter, several_models
from tests.tiny import Said

KINDS = ("lora", "dora", "full")
IDS = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def merged(base: Path, adapter: Adapter, output: Path, **how: object) -> dict:
    """The adapter saved beside `output`, and merged."""
    adapter.save(output.with_name(f"{output.name}-adapter"))
    result = merge_named(str(output.with_name(f"{output.name}-adapter")), str(output), base=str(base), **how).data
    return result


def attached_logits(base: Path, adapter: Adapter) -> torch.Tensor:
    model = loaded(base)
    attach(model, adapter, fuse=())
    return logits(model)


def close(got: torch.Tensor, wanted: torch.Tensor, relative: float = 2e-5) -> bool:
    return float((got - wanted).norm() / wanted.norm()) < relative


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_are_those_of_base_and_adapter(tmp_path: Path, name: str, kind: str) -> None:
    base = base_folder(tmp_path / "base", name)
    adapter = random_adapter(base, kind)
    result = merged(base, adapter, tmp_path / "merged")
    wanted = attached_logits(base, adapter)
    got = logits(loaded(tmp_path / "merged"))
    assert close(got, wanted) and not close(got, logits(loaded(base)), 1e-2)
    assert result["fates"]["changed"] == len(adapter.factors) and result["fates"]["untied"] == 0
    assert result["survival"]["cosine"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_changed_weights_are_rounded_once_and_the_others_are_the_same_bits(tmp_path: Path, name: str) -> None:
    base = base_folder(tmp_path / "base", name, dtype=torch.bfloat16)
    adapter = random_adapter(base, size=0.02)
    result = merged(base, adapter, tmp_path / "merged")
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert old.keys() == new.keys()
    modules = {row["name"]: row["module"] for row in result["tensors"]}
    changed = 0
    for key, weight in old.items():
        if modules[key] is None:
            assert torch.equal(weight, new[key])
            continue
        delta = adapter.factors[modules[key]].dense().double()
        true = weight.double() + (delta.T if name == "gpt2" else delta)
        # One rounding of a float32 sum: at most half a step of bfloat16, and what float32 is off by.
        assert ((new[key].double() - true).abs() <= true.abs() * (2**-8 + 1e-5)).all()
        changed += int((new[key] != weight).sum())
    assert result["survival"]["changed"] == changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_base_in_float64_stays_so(tmp_path: Path, name: str, kind: str) -> None:
    base = base_folder(tmp_path / "base", name, dtype=torch.float64)
    adapter = random_adapter(base, kind)
    result = merged(base, adapter, tmp_path / "merged")
    assert {row["dtype"] for row in result["tensors"]} == {"F64"} and result["survival"]["kept"] == pytest.approx(1)
    assert close(logits(loaded(tmp_path / "merged")), attached_logits(base, adapter))


def test_the_survey_is_what_the_files_show(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    adapter = random_adapter(base, size=0.003)
    result = merged(base, adapter, tmp_path / "merged")
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    for path, update in adapter.factors.items():
        seen, true = (new[f"{path}.weight"].double() - old[f"{path}.weight"].double()), update.dense().double()
        found = result["survival"]["modules"][path]
        assert found["share"] == float((seen != 0).double().mean())
        assert found["cosine"] == pytest.approx(float((seen * true).sum() / seen.norm() / true.norm()), abs=1e-5)
        assert found["kept"] == pytest.approx(float((seen * true).sum() / true.norm() ** 2), abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_type_that_is_asked_for(tmp_path: Path, dtype: str) -> None:
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    adapter = random_adapter(base)
    result = merged(base, adapter, tmp_path / "merged", dtype=dtype)
    tensors = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)} and result["dtype"] == dtype
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["dtype"] == dtype
    got = logits(loaded(tmp_path / "merged"))
    assert close(got, attached_logits(base, adapter), {"float32": 1e-5, "float16": 1e-2, "bfloat16": 0.1}[dtype])


@pytest.mark.parametrize("tower", [False, True])
def test_a_head_that_was_tied_is_written_on_its_own(tmp_path: Path, tower: bool) -> None:
    base = several_models(tmp_path / "base") if tower else base_folder(tmp_path / "base", tie_word_embeddings=True)
    head = head_adapter(base)
    said = Said()
    result = merged(base, head, tmp_path / "merged", display=said)
    assert result["fates"]["untied"] == 1 and any("lm_head.weight" in line for line in said.lines)
    model = loaded(tmp_path / "merged")
    old = loaded(base)
    embedding, delta = old.get_input_embeddings().weight, head.factors["lm_head"].dense()
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.allclose(model.get_output_embeddings().weight, embedding + delta, atol=1e-6)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert not tower or config["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("dora", [False, True])
def test_a_strangers_adapter_with_a_head_answers_as_in_peft(tmp_path: Path, dora: bool) -> None:
    base = base_folder(tmp_path / "base", tie_word_embeddings=True)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "lm_head"], use_dora=dora, init_lora_weights=False)
    torch.manual_seed(0)
    peft = get_peft_model(loaded(base), config).eval()
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = merge_named(str(tmp_path / "adapter"), str(tmp_path / "merged"), base=str(base)).data
    assert result["fates"]["untied"] == 1
    assert close(logits(loaded(tmp_path / "merged")), logits(peft))


def test_tied_weights_that_are_stored_twice(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    result = merged(base, head_adapter(base), tmp_path / "merged")
    assert result["fates"] == {"changed": 1, "copied": len(tensors) - 1, "untied": 0}
    model = loaded(tmp_path / "merged")
    assert torch.equal(model.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])
    assert not torch.equal(model.get_output_embeddings().weight, tensors["lm_head.weight"])


def head_adapter(base: Path) -> Adapter:
    """A LoRA on the head alone, as PEFT makes it."""
    adapter = random_adapter(base)
    weight = loaded(base).get_output_embeddings().weight
    a, b = (
        torch.randn(shape, generator=torch.Generator().manual_seed(7))
        for shape in ((3, weight.shape[1]), (weight.shape[0], 3))
    )
    spec = adapter.spec.model_copy(update={"targets": ("lm_head",)})
    return Adapter(spec, {"lm_head": LowRank(a, 0.01 * b, spec.scale("lm_head"))}, adapter.base)


def test_shards_stay_shards(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", shard="20KB")
    files = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(files) > 2
    adapter = random_adapter(base)
    merged(base, adapter, tmp_path / "merged")
    assert sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors")) == files
    old, new = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, tmp_path / "merged")
    )
    assert old["weight_map"] == new["weight_map"]
    assert old["metadata"]["total_size"] == new["metadata"]["total_size"]
    assert close(logits(loaded(tmp_path / "merged")), attached_logits(base, adapter))


def test_a_checkpoint_of_the_bare_model(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "gpt2")
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)  # a mask, as old checkpoints hold it
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    adapter = random_adapter(base)
    result = merged(base, adapter, tmp_path / "merged")
    new = load_file(tmp_path / "merged/model.safetensors")
    assert new.keys() == bare.keys() and torch.equal(new["h.0.attn.bias"], bare["h.0.attn.bias"])
    assert result["fates"]["changed"] == len(adapter.factors)
    assert close(logits(loaded(tmp_path / "merged")), attached_logits(base, adapter))


def test_other_types_and_metadata_come_along(tmp_path: Path) -> None:
    """Copied tensors are bytes: also those of types that torch can't add, odd sizes, empty ones and scalars."""
    base = base_folder(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    odd = {
        "odd.bytes": torch.arange(3, dtype=torch.uint8),
        "odd.float8": torch.randn(5).to(torch.float8_e4m3fn),
        "odd.empty": torch.empty(0, 4),
        "odd.scalar": torch.tensor(3),
        "odd.nan": torch.tensor([float("nan")]),  # no part of the model: not ours to judge
    }
    save_file({**tensors, **odd}, base / "model.safetensors", {"format": "pt", "note": "kept"})
    adapter = random_adapter(base)
    for dtype in (None, "bfloat16"):
        output = tmp_path / str(dtype)
        merged(base, adapter, output, dtype=dtype)
        with safe_open(output / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "note": "kept"}
            for name, tensor in odd.items():
                new = file.get_tensor(name)
                assert new.dtype == tensor.dtype and new.shape == tensor.shape
                assert torch.equal(new.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_what_stops_and_the_template_that_was_trained_come_along(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter = random_adapter(base)
    folder = tmp_path / "merged-adapter"
    adapter.save(folder)
    turns = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}[assistant] {% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    merge_named(str(folder), str(tmp_path / "merged"), base=str(base))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == template
    stops = GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops and tokenizer.eos_token_id in stops
    assert str(tmp_path) not in (tmp_path / "merged/config.json").read_text()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_what_rounding_takes_away_is_said_loudly(tmp_path: Path, dtype: str | None) -> None:
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    said = Said()
    result = merged(base, random_adapter(base, size=1e-3), tmp_path / "merged", display=said, dtype=dtype)
    loud = [line for line in said.lines if "float32" in line and line.startswith("WARNING")]
    assert (
        bool(loud) == (dtype is None) == (result["survival"]["cosine"] < 0.9)
        and result["warning"] == (loud or [None])[0]
    )


def test_a_merge_of_which_nothing_survives_is_refused(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    adapter = random_adapter(base, size=1e-7)
    with pytest.raises(InputError, match="float32"):
        merged(base, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*/model*"))
    merged(base, adapter, tmp_path / "forced", force=True)
    assert merged(base, adapter, tmp_path / "wide", dtype="float32")["survival"]["kept"] > 0.5


def test_broken_numbers_are_named(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter = random_adapter(base)
    good = load_file(base / "model.safetensors")
    for name, value, dtype in (
        ("model.layers.1.mlp.up_proj.weight", float("nan"), None),
        ("model.norm.weight", float("inf"), None),
        ("model.layers.0.self_attn.q_proj.weight", 7e4, "float16"),
        ("model.embed_tokens.weight", 7e4, "float16"),
    ):
        bad = {**good, name: good[name].clone()}
        bad[name].view(-1)[5] = value
        save_file(bad, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=name):
            merged(base, adapter, tmp_path / "merged", dtype=dtype)
        assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*.tmp"))


def test_another_base_is_refused(tmp_path: Path) -> None:
    base, other = base_folder(tmp_path / "base"), base_folder(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * 2}, other / "model.safetensors")
    adapter = random_adapter(base)
    of_base = open_base(str(base), dtype="float32", device="cpu").fingerprint
    marked = Adapter(adapter.spec, adapter.factors, BaseId("base", fingerprint=of_base))
    with pytest.raises(InputError, match="isn't that base"):
        merged(other, marked, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merged(base, marked, tmp_path / "merged")


@pytest.mark.parametrize("nth", [1, 2, 6, 20])  # the first is the lock's
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_disk_that_fills_up_and_a_key_that_is_pressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException
) -> None:
    base = base_folder(tmp_path / "base")
    adapter = random_adapter(base)
    real, calls = os.pwrite, itertools.count()

    def failing(descriptor: int, data: memoryview, at: int) -> int:
        if next(calls) == nth:
            raise error
        return real(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises((RunError, KeyboardInterrupt)):
        merged(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged-adapter"]


def test_a_process_that_is_killed_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    base, output = base_folder(tmp_path / "base"), tmp_path / "merged"
    adapter = random_adapter(base)
    adapter.save(tmp_path / "adapter")
    calls, real = itertools.count(), os.pwrite

    def dying(*arguments: Any) -> int:
        if next(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    with changed(os, "pwrite", dying):
        ended = child(lambda: merge_named(str(tmp_path / "adapter"), str(output), base=str(base)))
    assert ended.code == 128 + signal.SIGKILL and not output.exists() and list(tmp_path.glob(".merged*"))
    merged(base, adapter, output)
    assert close(logits(loaded(output)), attached_logits(base, adapter))
    assert not list(tmp_path.glob(".merged*tmp"))


def test_an_existing_folder(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    adapter = random_adapter(base)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/mine").write_text("mine")
    with pytest.raises(InputError, match="--replace"):
        merged(base, adapter, tmp_path / "merged")
    with pytest.raises(InputError, match="not written by deltaw"):
        merged(base, adapter, tmp_path / "merged", replace=True)
    assert (tmp_path / "merged/mine").read_text() == "mine"
    merged(base, adapter, tmp_path / "new")
    before = (tmp_path / "new/model.safetensors").read_bytes()
    merged(base, adapter, tmp_path / "new", replace=True)
    assert (tmp_path / "new/model.safetensors").read_bytes() == before


def test_a_disk_that_is_too_full_is_found_out_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_folder(tmp_path / "base")
    adapter = random_adapter(base)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(RunError, match="needs"):
        merged(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
