"""What lint says of a GGUF is what llama.cpp does with it: each made file is given to the real one."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from deltaw.adapter.attach import attach, detach
from deltaw.adapter.file import BaseId
from deltaw.base.source import find_base
from deltaw.config import AdapterSpec
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.shipping.base_files import BaseFiles
from deltaw.shipping.destination import Options
from deltaw.shipping.gguf.adapter import ADAPTER, GgufAdapter
from deltaw.shipping.lint.finding import LLAMA_CPP, LOADS, OLLAMA, PEFT, REFUSED, UNSURE, WRONG, Effect
from deltaw.shipping.lint.lint import lint
from deltaw.shipping.trained import Trained
from deltaw.show.progress import Display
from tests.base.gguf_models import model_of, write_model
from tests.data.toys import toy
from tests.shipping.llama_cpp import next_token

Tensors = dict[str, np.ndarray]
PROMPTS = ([3, 4, 5, 6, 7], list(range(40, 70)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("lint") / "tiny.gguf", model_of("llama"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right one, as deltaw writes it."""
    folder = tmp_path_factory.mktemp("adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(folder / "cache"))
        attached = attach(model_of("llama"), AdapterSpec(rank=4, alpha=6.0))
        with torch.no_grad():
            for parameter in attached.parameters:
                parameter.normal_(std=0.3)
        trained = Trained(
            "lora", detach(attached, BaseId("tiny")), BaseFiles(find_base(str(base))), Renderer(toy("chatml"))
        )
        GgufAdapter(trained, Options()).write(folder, Display(quiet=True))
    return folder / ADAPTER


def rewritten(adapter: Path, path: Path, change: Callable[[Tensors], Tensors] | None = None, **fields: Any) -> Path:
    """The same file with other tensors or fields (None: left out)."""
    tensors = {t.name: np.array(t.data) for t in GGUFReader(adapter).tensors}
    tensors = change(tensors) if change else tensors
    said = {"architecture": "llama", "type": "adapter", "kind": "lora", "alpha": 4.0, **fields}
    writer = GGUFWriter(path, said["architecture"])
    if said["type"]:
        writer.add_type(said["type"])
    if said["kind"]:
        writer.add_string("adapter.type", said["kind"])
    if isinstance(said["alpha"], float):
        writer.add_float32("adapter.lora.alpha", said["alpha"])
    elif said["alpha"] is not None:
        writer.add_uint32("adapter.lora.alpha", said["alpha"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def without(*ends: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(ends)}


def plus(name: str, *sides: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: np.full(sides, 2.0, np.float32)}


def halved(tensors: Tensors) -> Tensors:
    """Half the rank in one module, as a module of its own rank has it."""
    a, b = "blk.0.attn_v.weight.lora_a", "blk.0.attn_v.weight.lora_b"
    return {**tensors, a: tensors[a][:2], b: tensors[b][:, :2]}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


CASES: list[tuple[str, str, Effect, Callable[[Tensors], Tensors] | None, dict[str, Any]]] = [
    ("right", "", LOADS, None, {}),
    ("no type", "DW702", REFUSED, None, {"type": None}),
    ("another type", "DW702", REFUSED, None, {"type": "imatrix"}),
    ("another kind of adapter", "DW702", REFUSED, None, {"kind": "control"}),
    ("another architecture", "DW703", REFUSED, None, {"architecture": "qwen2"}),
    ("another tool's tensor", "DW704", REFUSED, plus("blk.0.attn_q.weight.lora_m", 32), {}),
    ("a half", "DW705", REFUSED, without("blk.0.attn_q.weight.lora_b"), {}),
    ("a tensor that the base hasn't", "DW706", REFUSED, renamed("blk.2.", "blk.7."), {}),
    ("another size", "DW706", REFUSED, plus("blk.0.attn_q.weight.lora_b", 64, 4), {}),
    ("another rank inside", "DW706", REFUSED, plus("blk.0.attn_q.weight.lora_b", 32, 3), {}),
    ("a norm", "DW707", WRONG, plus("blk.0.attn_norm.weight", 32), {}),
    ("alpha 0", "DW708", WRONG, None, {"alpha": 0.0}),
    ("alpha NaN", "DW708", WRONG, None, {"alpha": math.nan}),
    ("no alpha", "DW708", WRONG, None, {"alpha": None}),
]


@pytest.mark.parametrize(("name", "code", "effect", "change", "fields"), CASES, ids=[case[0] for case in CASES])
def test_the_verdict_is_what_llama_cpp_does(
    name: str,
    code: str,
    effect: Effect,
    change: Callable[[Tensors], Tensors] | None,
    fields: dict[str, Any],
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    # alpha 8 on rank 4 is a scale of 2, so that a scale of 1 shows; a norm that is left out leaves the rest as it is.
    good = rewritten(adapter, tmp_path / "good.gguf", alpha=8.0)
    made = rewritten(adapter, tmp_path / "made.gguf", change, **{"alpha": 8.0, **fields})
    verdict = lint(made, base=str(base))
    assert not code or code in {found.code for found in verdict.findings}
    assert verdict.exit_code == (effect > UNSURE)
    assert verdict.at(LLAMA_CPP) is verdict.at(OLLAMA) is effect and verdict.at(PEFT) is REFUSED
    if effect is REFUSED:
        with pytest.raises(InputError):
            next_token(base, [made], PROMPTS)
    elif name == "a norm":  # the norm would have changed the answer
        assert torch.equal(next_token(base, [made], PROMPTS), next_token(base, [good], PROMPTS))
    elif not math.isnan(fields.get("alpha") or 0.0):
        same = torch.allclose(next_token(base, [made], PROMPTS), next_token(base, [good], PROMPTS), atol=1e-3)
        assert same is (effect is LOADS)


def test_an_alpha_that_is_no_float(adapter: Path, tmp_path: Path) -> None:
    """llama.cpp ends its process there, which is no error to catch."""
    verdict = lint(rewritten(adapter, tmp_path / "made.gguf", alpha=4))
    assert "DW709" in {found.code for found in verdict.findings} and verdict.at(LLAMA_CPP) is REFUSED


def test_several_ranks_under_one_alpha(adapter: Path, base: Path, tmp_path: Path) -> None:
    verdict = lint(rewritten(adapter, tmp_path / "made.gguf", halved))
    assert "DW710" in {found.code for found in verdict.findings} and verdict.at(LLAMA_CPP) is UNSURE


def test_a_broken_file(adapter: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(adapter.read_bytes()[:-100])
    verdict = lint(cut)
    assert "DW701" in {found.code for found in verdict.findings} and verdict.exit_code == 1


def test_a_models_tokenizer_and_template(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    verdict = lint(base)
    assert {found.code for found in verdict.findings} == {"DW108", "DW721"} and verdict.exit_code == 0
    model = model_of("llama")
    whole = write_model(tmp_path / "a.gguf", model, keys={".tokenizer.chat_template": "{{ messages }}"})
    assert {found.code for found in lint(whole).findings} == {"DW108"}
    bos = write_model(tmp_path / "b.gguf", model, keys={".tokenizer.ggml.bos_token_id": 1})
    assert "DW725" in {found.code for found in lint(bos).findings}
    other = write_model(tmp_path / "c.gguf", model, keys={".tokenizer.chat_template": "{{ bos_token }}"})
    assert "DW722" in {found.code for found in lint(other, base=str(whole)).findings}


@pytest.mark.parametrize(("gone", "code"), [("tokenizer.ggml.pre", "DW723"), ("tokenizer.ggml.eos_token_id", "DW724")])
def test_a_models_missing_words(gone: str, code: str, base: Path, tmp_path: Path) -> None:
    """The key is spelt otherwise in the file, so that it is missing by its name."""
    odd = gone[:-1] + "_"
    made = tmp_path / "made.gguf"
    made.write_bytes(base.read_bytes().replace(gone.encode(), odd.encode()))
    verdict = lint(made)
    assert code in {found.code for found in verdict.findings} and verdict.exit_code == 1


def test_deltaws_own_export_is_right(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    copy = shutil.copy(adapter, tmp_path / "adapter.gguf")
    assert {found.code for found in lint(copy, base=str(base)).findings} == {"DW108"}
