"""A whole model as GGUF: what llama.cpp says with it is what deltaw says, for every family; what can't be is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.base.fingerprint import settings as mathematics
from deltaw.base.gguf import to_folder
from deltaw.base.load import open_base
from deltaw.errors import InputError
from deltaw.export.destination import Options
from deltaw.export.gguf_model import GgufModel
from deltaw.export.merged import plan_merge
from deltaw.export.sides.llama import LlamaCpp
from deltaw.export.trained import Trained
from deltaw.model import open_model
from deltaw.progress import Display

from .models import base_folder, loaded, random_adapter, trained_of

QUIET = Display(quiet=True)
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # rows of whole blocks
GEMMA = {**WIDE, "query_pre_attn_scalar": 16}
SIZES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": {**WIDE},
    "qwen3": WIDE,
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7},
    "phi3": {**WIDE, "partial_rotary_factor": 0.5},
    "gpt2": {"n_embd": 64, "n_inner": 96},
}
TEXT = "The capital of France is Paris, and the user asked"


def make(folder: Path, name: str = "llama", kind: str = "lora", **more: Any) -> Trained:
    base = base_folder(folder / "base", name, **{**SIZES[name], **more})
    return trained_of(base, random_adapter(base, kind, size=0.5), folder / "adapter")


def written(trained: Trained, folder: Path, kind: str) -> Path:
    folder.mkdir()
    destination = GgufModel(trained, Options(merged=True, type=kind))
    destination.write(folder, QUIET)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= destination.size()
    return folder / destination.file


def ours(trained: Trained, *, adapter: bool = True) -> tuple[list[int], Tensor]:
    """A prompt's ids, and deltaw's log-probabilities of all tokens behind each of them, in float32."""
    model = open_model(trained.name, base=trained.base.name, dtype="float32", device="cpu")
    ids = model.renderer.prompt_ids(TEXT)
    with torch.no_grad(), model._switch(adapter):
        return ids, model.base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def theirs(file: Path, ids: list[int]) -> Tensor:
    """llama.cpp's. It tells none where the token that it chooses is half a character or ends the answer, so that one is
    forced upon it, which leaves the log-probabilities alone."""
    logs = []
    body = {"n_predict": 1, "n_probs": 100_000, "temperature": 0, "logit_bias": [[ids[0], 1e4]], "cache_prompt": False}
    with LlamaCpp(file, threads=1) as llama:
        for length in range(1, len(ids) + 1):
            (told,) = llama.client.ask("/completion", {"prompt": ids[:length], **body})["completion_probabilities"]
            by_id = {item["id"]: item["logprob"] for item in told["top_logprobs"]}
            logs.append([by_id[id] for id in sorted(by_id)])
    return torch.tensor(logs)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("name", SIZES)
def test_llama_cpp_says_what_deltaw_says(tmp_path: Path, name: str, kind: str) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    trained = make(tmp_path, name)
    file = written(trained, tmp_path / "out", kind)
    ids, logs = ours(trained)
    effect = float((ours(trained, adapter=False)[1] - logs).abs().max())
    off = float((theirs(file, ids) - logs).abs().max())
    assert off < {"F32": 0.01, "F16": 0.01, "Q8_0": 0.1}[kind] * effect


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0 + 0.1 * n for n in range(8)], "long_factor": [1.5**n for n in range(8)]}
NEAR = {"rope_type": "default", "rope_theta": 500.0}
FULL = ["full_attention"] * 3
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "wide heads": ("llama", {"head_dim": 32}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "a tied head": ("llama", {"tie_word_embeddings": True}),
    "linear": ("llama", rope("linear", factor=4.0)),
    "llama 3.1": ("llama", rope("llama3", **LLAMA3)),
    "yarn": ("qwen2", rope("yarn", **YARN)),
    "yarn, warmer": ("llama", rope("yarn", **YARN, attention_factor=1.7, beta_fast=16.0, beta_slow=2.0)),
    "yarn, by two scales": ("qwen3", rope("yarn", **YARN, mscale=2.0, mscale_all_dim=0.5)),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "a window that is never felt": ("mistral", {"sliding_window": 100}),
    "gemma2, all near": ("gemma2", {"layer_types": ["sliding_attention"] * 2}),
    "gemma2, one in three": ("gemma2", {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + FULL[:1]}),
    "gemma2, other caps": ("gemma2", {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3, scaled": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": rope("linear", factor=8.0)["rope_parameters"], "sliding_attention": NEAR}},
    ),
    "gemma3, capped": ("gemma3_text", {"final_logit_softcapping": 2.0}),
    "phi3, long": (
        "phi3",
        {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 8}
        | rope("longrope", **LONG, original_max_position_embeddings=8, partial_rotary_factor=1.0),
    ),
    "gpt2, four times as wide": ("gpt2", {"n_inner": None}),
}
SIZES["mistral"] = WIDE
# Fields that come back in another form, with the same frequencies.
SAID_OTHERWISE = ("yarn, warmer", "yarn, by two scales", "phi3, long")


def _check_read(trained: Trained, file: Path, cache: Path, otherwise: bool) -> None:
    """deltaw's own reader finds the same mathematics and the same numbers."""
    model = open_base(str(to_folder(file, cache)), dtype="float32", device="cpu").model
    plan, weights = plan_merge(trained), model.state_dict()
    for planned in plan.tensors:
        assert planned.parameter is not None
        value = plan.value(planned).float()
        near = 2**-8 if value.ndim == 1 else 1e-6  # Gemma's norms are rounded with the one that is added to them
        torch.testing.assert_close(weights[planned.parameter], value, rtol=2**-8, atol=near)
    read, meant = mathematics(model.config), mathematics(plan.skeleton.config)
    odd = {name for name in {**read, **meant} if read.get(name) != meant.get(name)}
    assert odd == ({"rope_parameters"} if otherwise else set())
    for ours, its in zip(turning(loaded(trained.base.directory)), turning(model), strict=True):
        torch.testing.assert_close(ours.inv_freq, its.inv_freq, rtol=1e-4, atol=0)
        assert ours.attention_scaling == pytest.approx(its.attention_scaling)


def turning(model: torch.nn.Module) -> list[Any]:
    """Its rotary modules that have one set of frequencies."""
    return [module for module in model.modules() if isinstance(getattr(module, "attention_scaling", None), float)]


@pytest.mark.parametrize("case", CASES)
def test_every_setting_arrives(tmp_path: Path, case: str) -> None:
    """In llama.cpp, and in deltaw's own reader: the same mathematics and the same numbers."""
    name, changes = CASES[case]
    trained = make(tmp_path, name, **changes)
    file = written(trained, tmp_path / "out", "F32")
    if case != "biases":  # transformers' reader of GGUF makes a llama without
        _check_read(trained, file, tmp_path / "cache", case in SAID_OTHERWISE)
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    ids, logs = ours(trained)
    effect = float((ours(trained, adapter=False)[1] - logs).abs().max())
    off = float((theirs(file, ids) - logs).abs().max())
    print(case, effect, off)
    assert off < 0.01 * effect
