"""What lint finds, code by code: each adapter here is made to have one thing that is so with it."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.base.load import open_base
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.shipping.lint.finding import (
    DESTINATIONS,
    LLAMA_CPP,
    LOADS,
    MLX,
    OLLAMA,
    PEFT,
    REFUSED,
    TRANSFORMERS,
    UNSURE,
    VLLM,
    WRONG,
    Effect,
)
from deltaw.shipping.lint.lint import lint
from deltaw.shipping.lint.verdict import Verdict
from tests.architectures import COMMON
from tests.shipping.lint_folders import GONE, LAYER, PREFIX, Config, Tensors, changed, good, opened, write
from tests.shipping.models import FAMILIES, base_folder
from tests.tiny import tiny_base

PLAIN = {"DW108", "DW508"}  # what is found with a plain adapter of a Llama: MLX's form, and Ollama's reader
REFUSING = {VLLM: REFUSED, LLAMA_CPP: REFUSED, OLLAMA: REFUSED}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("lint") / "base")


@pytest.fixture(scope="module")
def right(base: Path) -> tuple[Tensors, Config]:
    return good(opened(base))


def codes(verdict: Verdict) -> set[str]:
    return {found.code for found in verdict.findings}


def check(verdict: Verdict, code: str, effects: dict[str, Effect]) -> None:
    """It is found, and comes to at least this at each of these destinations."""
    (found, *_) = [found for found in verdict.findings if found.code == code]
    assert {place: found.effects.get(place, LOADS) for place in effects} == effects
    assert all(verdict.at(place) >= effect for place, effect in effects.items())
    assert found.what and found.fix


FIELDS: list[tuple[str, dict[str, Any], str, dict[str, Effect]]] = [
    ("rank above vLLM's", {"r": 32}, "DW309", {VLLM: REFUSED}),
    ("rank above vLLM's by pattern", {"rank_pattern": {"o_proj": 64}}, "DW309", {VLLM: REFUSED}),
    ("rsLoRA", {"use_rslora": True}, "DW306", {LLAMA_CPP: WRONG, OLLAMA: WRONG, VLLM: LOADS}),
    ("alpha_pattern", {"alpha_pattern": {"v_proj": 1}}, "DW307", {LLAMA_CPP: WRONG, OLLAMA: WRONG, VLLM: LOADS}),
    ("rank_pattern", {"rank_pattern": {"v_proj": 2}}, "DW308", {LLAMA_CPP: LOADS, VLLM: LOADS}),
    ("alpha 8.5", {"lora_alpha": 8.5}, "DW304", {OLLAMA: REFUSED, VLLM: LOADS}),
    ("alpha 8.0", {"lora_alpha": 8.0}, "DW304", {OLLAMA: REFUSED}),
    ("alpha below 0", {"lora_alpha": -8}, "DW304", {OLLAMA: REFUSED, PEFT: LOADS}),
    ("alpha 0", {"lora_alpha": 0}, "DW303", {LLAMA_CPP: WRONG, VLLM: WRONG}),
    ("no alpha", {"lora_alpha": GONE}, "DW305", {VLLM: REFUSED, LLAMA_CPP: REFUSED, OLLAMA: WRONG, PEFT: LOADS}),
    ("no targets", {"target_modules": GONE}, "DW305", {VLLM: REFUSED, PEFT: UNSURE}),
    ("an unknown field", {"use_magic": 3}, "DW311", dict.fromkeys(DESTINATIONS, UNSURE)),
    ("IA3", {"peft_type": "IA3"}, "DW301", {PEFT: UNSURE}),
    ("lora_bias", {"bias": "lora_only"}, "DW325", {VLLM: REFUSED, PEFT: LOADS}),
    ("aLoRA", {"alora_invocation_tokens": [1, 2]}, "DW337", {VLLM: REFUSED, OLLAMA: WRONG, LLAMA_CPP: LOADS}),
    ("QALoRA", {"use_qalora": True}, "DW338", {VLLM: REFUSED, PEFT: UNSURE}),
    ("replicated layers", {"layer_replication": [[0, 2]]}, "DW338", {VLLM: REFUSED}),
    ("LoRA-GA", {"init_lora_weights": "lora_ga"}, "DW335", {PEFT: WRONG, VLLM: WRONG}),
    ("PiSSA", {"init_lora_weights": "pissa_niter_4"}, "DW335", {VLLM: REFUSED, LLAMA_CPP: WRONG}),
    ("layers by weights", {"target_parameters": ["down_proj.weight"]}, "DW334", {PEFT: LOADS}),
    ("a base by its path", {"base_model_name_or_path": "/home/me/base"}, "DW502", {PEFT: LOADS}),
    ("a base by a bare name", {"base_model_name_or_path": "base"}, "DW502", {PEFT: LOADS}),
    ("no base", {"base_model_name_or_path": GONE}, "DW501", {TRANSFORMERS: LOADS}),
    ("a slow pattern", {"target_modules": "(.*)*(.*)*(.*)*x"}, "DW213", {PEFT: REFUSED}),
    ("a slow pattern of ranks", {"rank_pattern": {"(.*)*(.*)*(.*)*!": 2}}, "DW213", {PEFT: REFUSED, VLLM: REFUSED}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "code", "effects"), FIELDS, ids=[row[0] for row in FIELDS])
def test_of_the_config(
    name: str,
    fields: dict[str, Any],
    code: str,
    effects: dict[str, Effect],
    base: Path,
    right: tuple[Tensors, Config],
    tmp_path: Path,
) -> None:
    tensors, config = right
    check(lint(write(tmp_path / "a", tensors, changed(config, **fields)), base=str(base)), code, effects)


def extra(name: str, *sides: int) -> Tensors:
    return {PREFIX + name: torch.randn(*sides)}


EMBED = PREFIX + "model.embed_tokens"
TENSORS: list[tuple[str, Tensors, dict[str, Any], str, dict[str, Effect]]] = [
    ("DoRA", extra("model.layers.0.self_attn.q_proj.lora_magnitude_vector", 32), {"use_dora": True}, "DW321", REFUSING),
    ("a bias", extra("model.layers.0.self_attn.q_proj.lora_B.bias", 32), {"lora_bias": True}, "DW323", REFUSING),
    ("a bias unsaid", extra("model.layers.0.self_attn.q_proj.lora_B.bias", 32), {}, "DW324", {PEFT: WRONG, **REFUSING}),
    ("a head", extra("lm_head.weight", 362, 32), {"modules_to_save": ["lm_head"]}, "DW326", REFUSING),
    ("a head unnamed", extra("lm_head.weight", 362, 32), {}, "DW328", REFUSING),
    ("an embedding", extra("model.embed_tokens.weight", 362, 32), {"modules_to_save": ["embed_tokens"]}, "DW326",
     REFUSING),
    ("a score", extra("score.weight", 2, 32), {"modules_to_save": ["score"]}, "DW326",
     {VLLM: LOADS, LLAMA_CPP: REFUSED}),
    ("tokens", extra("model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32),
     {"trainable_token_indices": [1, 2]}, "DW331", REFUSING),
    ("LoRA on the embedding", {**extra("model.embed_tokens.lora_embedding_A", 4, 362),
     **extra("model.embed_tokens.lora_embedding_B", 32, 4)}, {}, "DW329", {VLLM: LOADS, OLLAMA: REFUSED}),
    ("a copy of a base layer", extra("model.embed_tokens.base_layer.weight", 362, 32), {}, "DW330", {VLLM: UNSURE}),
    ("a norm", extra("model.norm.weight", 32), {}, "DW332", {VLLM: REFUSED, LLAMA_CPP: WRONG}),
    ("experts", {**extra("model.layers.0.mlp.experts.lora_A.weight", 4, 32),
     **extra("model.layers.0.mlp.experts.lora_B.weight", 48, 4)},
     {"target_parameters": ["mlp.experts.down_proj"]}, "DW333", {OLLAMA: REFUSED}),
    ("another tool's tensor", extra("model.layers.0.self_attn.q_proj.lora_C.weight", 4, 4), {}, "DW210",
     {PEFT: WRONG, **REFUSING}),
    ("no matrix", {f"{LAYER}.lora_A.weight": torch.randn(4, 32, 1)}, {}, "DW212", {PEFT: WRONG}),
    ("whole numbers", {f"{LAYER}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}, {}, "DW212", {PEFT: WRONG}),
    ("infinity", {f"{LAYER}.lora_A.weight": torch.full((4, 32), math.inf)}, {}, "DW401",
     dict.fromkeys(DESTINATIONS, WRONG)),
    ("too large for float16", {f"{LAYER}.lora_A.weight": torch.randn(4, 32) * 1e6}, {}, "DW404",
     {VLLM: UNSURE, PEFT: LOADS}),
    ("one number", {f"{LAYER}.lora_A.weight": torch.ones(4, 32)}, {}, "DW403", {PEFT: UNSURE}),
    ("a larger layer", {f"{LAYER}.lora_B.weight": torch.randn(64, 4)}, {}, "DW205",
     {VLLM: REFUSED, LLAMA_CPP: REFUSED}),
    ("a smaller layer", {f"{LAYER}.lora_B.weight": torch.randn(16, 4)}, {}, "DW205", {VLLM: WRONG, LLAMA_CPP: REFUSED}),
    ("a layer of no kind", extra("model.layers.0.attn.query.lora_A.weight", 4, 32), {}, "DW206", {VLLM: REFUSED}),
    ("a half", extra("model.layers.0.self_attn.o_proj.lora_A.weight", 4, 32), {}, "DW203",
     {VLLM: REFUSED, LLAMA_CPP: REFUSED}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "more", "fields", "code", "effects"), TENSORS, ids=[row[0] for row in TENSORS])
def test_of_the_tensors(
    name: str,
    more: Tensors,
    fields: dict[str, Any],
    code: str,
    effects: dict[str, Effect],
    base: Path,
    right: tuple[Tensors, Config],
    tmp_path: Path,
) -> None:
    tensors, config = right
    folder = write(tmp_path / "a", {**tensors, **more}, changed(config, **fields))
    check(lint(folder, base=str(base)), code, effects)


def test_files_that_are_missing_broken_or_pickles(base: Path, right: tuple[Tensors, Config], tmp_path: Path) -> None:
    refused = dict.fromkeys(DESTINATIONS, REFUSED)
    folder = write(tmp_path / "config", *right)
    (folder / "adapter_config.json").unlink()
    check(lint(folder), "DW101", refused)
    (folder / "adapter_config.json").write_text('{"r": ')
    check(lint(folder), "DW101", refused)
    folder = write(tmp_path / "twice", *right)
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text('{"r": 4, ' + text[1:])
    check(lint(folder, base=str(base)), "DW102", dict.fromkeys(DESTINATIONS, UNSURE))
    folder = write(tmp_path / "weights", *right)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-5])
    check(lint(folder), "DW105", refused)
    (folder / "adapter_model.safetensors").unlink()
    check(lint(folder), "DW103", refused)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(tmp_path / "ran"))
    check(lint(folder), "DW104", dict.fromkeys(DESTINATIONS, UNSURE))
    assert not (tmp_path / "ran").exists()


def test_a_file_that_its_owner_alone_can_read(base: Path, right: tuple[Tensors, Config], tmp_path: Path) -> None:
    folder = write(tmp_path / "a", *right)
    assert codes(lint(folder, base=str(base))) == PLAIN
    (folder / "adapter_model.safetensors").chmod(0o600)
    check(lint(folder, base=str(base)), "DW107", {VLLM: LOADS})


def test_full_fine_tuning_is_read_by_deltaw_alone(base: Path, tmp_path: Path) -> None:
    model = open_base(str(base), dtype="float32", device="cpu")
    adapter = attach(model.model, AdapterSpec(full=True)).adapter(BaseId("base"))
    verdict = lint(adapter.save(tmp_path / "full"))
    check(verdict, "DW106", dict.fromkeys(DESTINATIONS, REFUSED))
    assert verdict.exit_code == 1


def test_no_base_here(right: tuple[Tensors, Config], tmp_path: Path) -> None:
    """Nothing is held to it, and that is said; what shows without it is found all the same."""
    tensors, config = right
    verdict = lint(write(tmp_path / "a", tensors, config))
    check(verdict, "DW503", {PEFT: UNSURE, VLLM: UNSURE})
    assert verdict.exit_code == 0 and codes(verdict) == {"DW108", "DW503"}
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    check(lint(write(tmp_path / "b", bare, config)), "DW201", {PEFT: WRONG, TRANSFORMERS: LOADS})
    other = lint(write(tmp_path / "c", tensors, changed(config, task_type="SEQ_2_SEQ_LM")))
    check(other, "DW509", {VLLM: REFUSED, PEFT: LOADS})


def test_another_base_by_its_fingerprint(base: Path, tmp_path: Path) -> None:
    here = open_base(str(base), dtype="float32", device="cpu")
    attached = attach(here.model, AdapterSpec(rank=2))
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_()
    folder = attached.adapter(BaseId("org/base", None, here.fingerprint)).save(tmp_path / "a")
    assert codes(lint(folder, base=str(base))) == PLAIN
    check(lint(folder, base=str(tiny_base(tmp_path / "other", seed=1))), "DW504", dict.fromkeys(DESTINATIONS, WRONG))


def test_another_revision(base: Path, right: tuple[Tensors, Config], tmp_path: Path, monkeypatch: Any) -> None:
    cache = tmp_path / "hub/models--org--base"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    commit = "a" * 40
    (cache / "refs/main").write_text(commit)
    (cache / "snapshots" / commit).symlink_to(base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tensors, config = right
    assert codes(lint(write(tmp_path / "a", tensors, config))) == PLAIN  # found in the hub's cache by its name
    folder = write(tmp_path / "b", tensors, changed(config, revision="b" * 40))
    check(lint(folder, base="org/base"), "DW505", {PEFT: UNSURE})


@pytest.mark.parametrize(("name", "kind"), [("qwen2", "DW507"), ("gemma2", ""), ("gpt2", "DW507"), ("phi3", "DW507")])
def test_what_ollamas_own_reader_knows(name: str, kind: str, tmp_path: Path) -> None:
    place = base_folder(tmp_path / "base", name)
    last = {"gpt2": "c_attn", "phi3": "qkv_proj"}.get(name, "q_proj")
    model = opened(place)
    tensors, config = {}, {}
    for path, module in model.named_modules():
        if path.endswith(last):
            sides = module.weight.shape if name == "gpt2" else module.weight.shape[::-1]
            tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(4, sides[0])
            tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(sides[1], 4)
    config = {**good(model, names=())[1], "target_modules": [last]}
    verdict = lint(write(tmp_path / "a", tensors, config), base=str(place))
    assert codes(verdict) - {"DW310"} == {"DW108", kind} - {""}
    assert ("DW310" in codes(verdict)) == (name == "gpt2")
    assert verdict.at(OLLAMA) == (REFUSED if kind else LOADS)


def test_a_kind_that_llama_cpp_is_not_known_to_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "helium", COMMON)
    place = base_folder(tmp_path / "base", "helium")
    verdict = lint(write(tmp_path / "a", *good(opened(place))), base=str(place))
    check(verdict, "DW506", {LLAMA_CPP: UNSURE})


def test_trained_tokens_that_the_base_does_not_have(tmp_path: Path) -> None:
    place = tiny_base(tmp_path / "base", tie_word_embeddings=True)
    tensors, config = good(opened(place))
    tensors |= {f"{EMBED}.token_adapter.trainable_tokens_delta": torch.randn(2, 32)}
    for row, wanted in ((361, False), (362, True)):
        folder = write(tmp_path / f"{row}", tensors, changed(config, trainable_token_indices=[1, row]))
        verdict = lint(folder, base=str(place))
        assert ("DW340" in {finding.code for finding in verdict.findings}) == wanted
    check(verdict, "DW340", {PEFT: REFUSED, VLLM: REFUSED})


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_tied_ends(end: str, tmp_path: Path) -> None:
    place = tiny_base(tmp_path / "base", tie_word_embeddings=True)
    tensors, config = good(opened(place))
    if end == "lm_head":
        more = {**extra("lm_head.lora_A.weight", 4, 32), **extra("lm_head.lora_B.weight", 362, 4)}
    else:
        more = {f"{EMBED}.lora_embedding_A": torch.randn(4, 362), f"{EMBED}.lora_embedding_B": torch.randn(32, 4)}
    config = changed(config, target_modules=[*config["target_modules"], end])
    verdict = lint(write(tmp_path / "a", {**tensors, **more}, config), base=str(place))
    check(verdict, "DW339", {LLAMA_CPP: REFUSED if end == "lm_head" else UNSURE, PEFT: LOADS})
    over = lint(
        write(tmp_path / "b", {**tensors, **extra("lm_head.weight", 362, 32)}, good(opened(place))[1]), base=str(place)
    )
    check(over, "DW328", {PEFT: WRONG, TRANSFORMERS: WRONG})


def test_layers_that_peft_takes_for_experts(tmp_path: Path) -> None:
    place = base_folder(tmp_path / "base", "qwen2_moe", mlp_only_layers=[0])
    model = opened(place)
    dense = [path for path, _ in model.named_modules() if path.endswith("layers.0.mlp.down_proj")]
    tensors, config = good(model, names=("q_proj", "down_proj"))
    assert dense and all(f"{PREFIX}{path}.lora_A.weight" in tensors for path in dense)
    verdict = lint(write(tmp_path / "a", tensors, config), base=str(place))
    check(verdict, "DW214", {PEFT: UNSURE, TRANSFORMERS: UNSURE, VLLM: LOADS})  # the installed one takes them rightly
    attached = attach(open_base(str(place), dtype="float32", device="cpu").model, AdapterSpec(rank=2))
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_()
    ours = lint(attached.adapter(BaseId("org/base")).save(tmp_path / "ours"), base=str(place))
    assert "DW214" not in codes(ours) and "DW334" in codes(ours) and ours.at(PEFT) is LOADS


def test_the_rank_that_vllm_is_started_with(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", *good(opened(base), rank=32, names=("down_proj",)))
    verdict = lint(folder, base=str(base), to=["vllm"])
    check(verdict, "DW309", {VLLM: REFUSED})
    assert verdict.exit_code == 1 and "--max-lora-rank 32" in verdict.shown[0].fix
    assert lint(folder, base=str(base), to=["vllm"], max_lora_rank=32).exit_code == 0
    with pytest.raises(InputError):
        lint(folder, max_lora_rank=33)


def test_of_deltaws_own_only_what_is_true(base: Path, tmp_path: Path) -> None:
    """An adapter of deltaw's in every form that it has on a Llama."""
    known = {"plain": AdapterSpec(rank=2), "dora": AdapterSpec(rank=2, magnitude=True),
             "rslora": AdapterSpec(rank=4, scaling="rslora"),
             "own": AdapterSpec(rank=2, rank_overrides={"q_proj": 4}, alpha_overrides={"v_proj": 9.0})}  # fmt: skip
    beside = {"plain": set(), "dora": {"DW321"}, "rslora": {"DW306"}, "own": {"DW307", "DW308"}}
    for name, spec in known.items():
        attached = attach(open_base(str(base), dtype="float32", device="cpu").model, spec)
        with torch.no_grad():
            for parameter in attached.parameters:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = attached.adapter(BaseId("org/base")).save(tmp_path / name)
        assert codes(lint(folder, base=str(base))) - PLAIN == beside[name], name
        assert Adapter.load(folder).spec.rank == spec.rank


@pytest.mark.parametrize("fields", [{"lora_alpha": 2}, {"use_rslora": False}, {"alpha_pattern": {}}, {"r": 2}])
def test_a_lost_scale(fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """deltaw.json remembers what the config has lost."""
    spec = AdapterSpec(rank=4, scaling="rslora", alpha_overrides={"v_proj": 9.0})
    folder = attach(open_base(str(base), dtype="float32", device="cpu").model, spec).adapter(BaseId("org/base"))
    folder = folder.save(tmp_path / "a")
    assert "DW313" not in codes(lint(folder, base=str(base)))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    check(lint(folder, base=str(base)), "DW313", {PEFT: WRONG, VLLM: WRONG, LLAMA_CPP: WRONG})


def test_what_was_asked_for_decides(base: Path, right: tuple[Tensors, Config], tmp_path: Path) -> None:
    folder = write(tmp_path / "a", *right)
    exits = {place: lint(folder, base=str(base), to=[place]).exit_code for place in DESTINATIONS}
    assert exits == {PEFT: 0, TRANSFORMERS: 0, VLLM: 0, LLAMA_CPP: 0, OLLAMA: 1, MLX: 1}
    verdict = lint(folder, base=str(base), to=[PEFT, VLLM])
    assert verdict.shown == [] and list(verdict.to_json()["verdicts"]) == [PEFT, VLLM]
    with pytest.raises(InputError):
        lint(folder, to=["tgi"])
    for nothing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError):
            lint(nothing)


def test_a_destination_may_be_one_text_and_a_wrong_one_never_passes(
    base: Path, right: tuple[Tensors, Config], tmp_path: Path
) -> None:
    """`at` a name that is none said "loads"."""
    tensors, config = right
    folder = write(tmp_path / "a", tensors, changed(config, lora_alpha=0))
    verdict = lint(folder, base=str(base), to="vLLM")
    assert list(verdict.to_json()["verdicts"]) == [VLLM]
    assert verdict.at("vLLM") is verdict.at(VLLM) is WRONG
    with pytest.raises(InputError, match="tgi"):
        verdict.at("tgi")
    with pytest.raises(InputError, match="tgi"):
        lint(folder, to="tgi")


def test_the_json_says_all_and_is_json(base: Path, right: tuple[Tensors, Config], tmp_path: Path) -> None:
    tensors, config = right
    verdict = lint(write(tmp_path / "a", tensors, changed(config, use_rslora=True)), base=str(base))
    said = json.loads(json.dumps(verdict.to_json()))
    assert said["verdicts"]["llama.cpp"] == {"verdict": "wrong", "findings": ["DW306"], "reads_it_as_it_is": False}
    assert {found["code"] for found in said["findings"]} == codes(verdict) and said["exit_code"] == 0
    lines = verdict.text().splitlines()
    assert [line.split()[0] for line in lines[:6]] == list(DESTINATIONS.values())
    assert all(len(line) <= 120 or line.lstrip().startswith("fix: ") for line in lines)
