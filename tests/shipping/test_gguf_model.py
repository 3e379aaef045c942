"""A whole model as GGUF: llama.cpp says with it what deltaw says, for every family; what can't be is refused."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from deltaw.base.fingerprint import settings as mathematics
from deltaw.base.gguf import to_folder
from deltaw.base.load import open_base
from deltaw.base.source import find_base
from deltaw.data.opening import open_renderer
from deltaw.data.render import Renderer
from deltaw.errors import InputError, RunError
from deltaw.factors import LowRank
from deltaw.files.gguf_header import read_metadata
from deltaw.files.gguf_parts import read_model
from deltaw.model import open_model
from deltaw.shipping.base_files import BaseFiles
from deltaw.shipping.destination import Options
from deltaw.shipping.gguf.meta import metadata
from deltaw.shipping.gguf.model import GgufModel
from deltaw.shipping.gguf.types import name_of, read_values, rounded
from deltaw.shipping.merge.plan import plan_merge
from deltaw.shipping.trained import Trained
from deltaw.show.progress import Display
from tests.architectures import PACKED
from tests.base.gguf_models import model_of, write_model
from tests.data.toys import CHATML, toy

from .models import base_folder, loaded, random_adapter, trained_of

QUIET = Display(quiet=True)
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # rows of whole blocks
GEMMA = {**WIDE, "query_pre_attn_scalar": 16}
SIZES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "mistral": WIDE,
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


def ours(trained: Trained, *, adapter: bool = True, kind: str = "F32") -> tuple[list[int], Tensor]:
    """A prompt's ids, and deltaw's log-probabilities of all tokens behind each of them, in float32; `kind`: with the
    merged weights rounded as in a file of that type."""
    model = open_model(trained.name, base=trained.base.name, dtype="float32", device="cpu")
    ids = model.renderer.prompt_ids(TEXT)
    if kind != "F32":
        destination = GgufModel(trained, Options(merged=True, type=kind))
        model = replace(model, base=replace(model.base, model=loaded(trained.base.directory)), attached=None)
        for place in destination.places:
            planned = destination.tensors.planned[place.name]
            assert planned.parameter is not None
            value = destination.tensors.plan.value(planned).float()
            turned = destination.family.architecture == "gpt2" and ".h." in planned.parameter
            if value.ndim == 2:  # the rows of q and k are permuted in the file, and their blocks with them
                value = rounded(value.T, place.type).T if turned else rounded(value, place.type)
            model.base.model.get_parameter(planned.parameter).data = value
    with torch.no_grad(), model._switch(adapter):
        return ids, model.base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def theirs(file: Path, ids: list[int]) -> Tensor:
    """llama.cpp's."""
    from .llama_cpp import next_token

    return next_token(file, [], [ids[:length] for length in range(1, len(ids) + 1)])


# What llama.cpp's kernels do to a layer's input: nothing, or what the weights' type is (Q8_0: 8 bits a block).
NEAR = {"F32": 2e-5, "F16": 2e-3, "Q8_0": 0.05}
GELU = 2e-3  # which it looks up in a table of float16


def near(name: str, kind: str) -> float:
    """How far from deltaw's a log-probability may be, as a share of what the adapter does to them."""
    return max(NEAR[kind], GELU if name.startswith(("gemma", "gpt2")) else 0)


@pytest.mark.parametrize("kind", NEAR)
@pytest.mark.parametrize("name", [name for name in SIZES if name != "mistral"])  # a llama, as far as that goes
def test_llama_cpp_says_what_deltaw_says(tmp_path: Path, name: str, kind: str) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    trained = make(tmp_path, name)
    file = written(trained, tmp_path / "out", kind)
    ids, logs = ours(trained, kind=kind)
    effect = float((ours(trained, adapter=False)[1] - ours(trained)[1]).abs().max())
    off = float((theirs(file, ids) - logs).abs().max())
    assert off < near(name, kind) * effect


def test_rows_that_stay_unpermuted_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    trained = make(tmp_path, "llama")
    monkeypatch.setattr("deltaw.shipping.gguf.names.permuted", lambda rows, heads: rows)
    file = written(trained, tmp_path / "out", "F32")
    ids, logs = ours(trained)
    assert float((theirs(file, ids) - logs).abs().max()) > 0.1


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0 + 0.1 * n for n in range(8)], "long_factor": [1.5**n for n in range(8)]}
LOCAL = {"rope_type": "default", "rope_theta": 500.0}
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
        {
            "rope_parameters": {
                "full_attention": rope("linear", factor=8.0)["rope_parameters"],
                "sliding_attention": LOCAL,
            }
        },
    ),
    "gemma3, capped": ("gemma3_text", {"final_logit_softcapping": 2.0}),
    "phi3, long": (
        "phi3",
        {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 8}
        | rope("longrope", **LONG, original_max_position_embeddings=8, partial_rotary_factor=1.0),
    ),
    "gpt2, four times as wide": ("gpt2", {"n_inner": None}),
}
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
    assert off < near(name, "F32") * effect


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    return read_model([file]).shapes


def test_a_head_that_is_the_embedding_has_no_tensor(tmp_path: Path) -> None:
    trained = make(tmp_path, "llama", tie_word_embeddings=True)
    assert "output.weight" not in shapes_of(written(trained, tmp_path / "out", "F16"))


def test_a_head_that_the_merge_unties_has_one(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "llama", **WIDE, tie_word_embeddings=True)
    adapter = random_adapter(base, size=0.5)
    head = torch.randn(3, 64), torch.randn(len(toy("chatml")), 3) * 0.1
    factors = {**adapter.factors, "lm_head": LowRank(*head, adapter.spec.scale("lm_head"))}
    trained = trained_of(base, adapter, tmp_path / "adapter")
    trained = replace(trained, adapter=replace(adapter, factors=factors))
    file = written(trained, tmp_path / "out", "F32")
    assert "output.weight" in shapes_of(file)
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, tie_word_embeddings=False).eval()
    plan = plan_merge(trained)
    for planned in plan.tensors:
        assert planned.parameter is not None
        model.get_parameter(planned.parameter).data = plan.value(planned)
    ids = trained.renderer.prompt_ids(TEXT)
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert float((theirs(file, ids) - logs).abs().max()) < 1e-3


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_the_files_hold_is_written_if_it_is_another(tmp_path: Path, same: bool) -> None:
    base = base_folder(tmp_path / "base", "llama", **WIDE, tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone() if same else embedding.flip(0).contiguous()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    trained = trained_of(base, random_adapter(base, size=0.5), tmp_path / "adapter")
    file = written(trained, tmp_path / "out", "F32")
    assert ("output.weight" in shapes_of(file)) is not same
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    ids, logs = ours(trained)
    assert float((theirs(file, ids) - logs).abs().max()) < 1e-3


def test_dora_arrives(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    trained = make(tmp_path, "gpt2", "dora")
    file = written(trained, tmp_path / "out", "F32")
    ids, logs = ours(trained)
    assert float((theirs(file, ids) - logs).abs().max()) < 1e-3


def test_of_a_gemma_that_sees_the_part_that_reads_is_written(tmp_path: Path) -> None:
    text = AutoConfig.for_model("gemma3_text", **{**PACKED["gemma3_text"], **GEMMA, "vocab_size": len(toy("chatml"))})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model(
        "gemma3", text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=300
    )
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    toy("chatml").save_pretrained(base)
    adapter = random_adapter(base, size=0.5)
    assert all("language_model" in path for path in adapter.factors)
    trained = trained_of(base, adapter, tmp_path / "adapter")
    destination = GgufModel(trained, Options(merged=True, type="F32"))
    assert any("mmproj" in note for note in destination.notes)
    file = written(trained, tmp_path / "out", "F32")
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    ids, logs = ours(trained)
    effect = float((ours(trained, adapter=False)[1] - logs).abs().max())
    assert float((theirs(file, ids) - logs).abs().max()) < near("gemma3", "F32") * effect
    seeing = "model.vision_tower.encoder.layers.0.mlp.fc1"
    factors = {**adapter.factors, seeing: LowRank(torch.ones(2, 16), torch.ones(16, 2))}
    nothing(replace(trained, adapter=replace(adapter, factors=factors)), tmp_path, "F32", "fc1")


COARSE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.mark.parametrize("kind", [*COARSE, "BF16"])
def test_each_type_is_where_llama_cpp_has_it(tmp_path: Path, kind: str) -> None:
    trained = make(tmp_path, "llama")
    header = read_model([written(trained, tmp_path / "out", kind)])
    types = {name: name_of(place.kind) for name, place in header.places.items()}
    assert types.pop("output.weight") == ("Q8_0" if kind in COARSE else kind)
    norms = {name for name in types if "norm" in name}
    assert {types[name] for name in norms} == {"F32"}
    assert {types[name] for name in types.keys() - norms} == {kind}
    assert header.metadata["general.file_type"] == {"Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "BF16": 32}[kind]


def test_the_numbers_are_rounded_once(tmp_path: Path) -> None:
    """In GGUF's own blocks, from the float32 sum."""
    trained = make(tmp_path, "llama")
    file = written(trained, tmp_path / "out", "Q4_0")
    plan, header = plan_merge(trained), read_model([file])
    down = plan.value(plan.by_parameter["model.layers.1.mlp.down_proj.weight"])
    read = read_values(file, header.places["blk.1.ffn_down.weight"], tuple(down.shape))
    steps = down.reshape(-1, 32).abs().amax(1) / 8
    assert bool(((read - down).reshape(-1, 32).abs() <= steps[:, None] * 1.01).all())
    assert torch.equal(read, rounded(down, "Q4_0"))


def nothing(trained: Trained, folder: Path, kind: str, named: str) -> None:
    """It is refused, by name, before anything is written."""
    with pytest.raises(InputError, match=named) as caught:
        GgufModel(trained, Options(merged=True, type=kind))
    assert len(str(caught.value).splitlines()) <= 5


def test_rows_that_no_block_takes_are_refused(tmp_path: Path) -> None:
    trained = make(tmp_path, "llama", intermediate_size=80)
    nothing(trained, tmp_path, "Q8_0", r"ffn_down.weight: rows of 80")
    written(trained, tmp_path / "out", "F16")


UNSAID: dict[str, tuple[str, dict[str, Any], str]] = {
    "an activation": ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    "a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding_window"),
    "another scale of queries": ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar"),
    "no caps": ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    "no windows": ("gemma3_text", {"layer_types": FULL, "num_hidden_layers": 3}, "layer_types"),
    "irregular windows": (
        "gemma3_text",
        {"num_hidden_layers": 4, "layer_types": [*FULL[:1], "sliding_attention", *FULL[:2]]},
        "layer_types",
    ),
    "biases": ("qwen3", {"attention_bias": True}, "attention_bias"),
    "dynamic positions": ("llama", rope("dynamic", factor=2.0), "dynamic"),
    "llama 3's positions": ("qwen2", rope("llama3", **LLAMA3), "llama3"),
    "an open ramp": ("llama", rope("yarn", **YARN, truncate=False), "truncate"),
    "a share turned": ("llama", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor"),
    "heads of another width": ("qwen2", {"head_dim": 32}, "head_dim"),
    "scales by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "unscaled scores": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    "another family": ("qwen2_moe", {}, "qwen2_moe"),
}


@pytest.mark.parametrize("case", UNSAID)
def test_what_a_gguf_cannot_say_is_refused_by_name(tmp_path: Path, case: str) -> None:
    name, changes, named = UNSAID[case]
    base = base_folder(tmp_path / "base", name, **{**SIZES.get(name, {}), **changes})
    nothing(trained_of(base, random_adapter(base), tmp_path / "adapter"), tmp_path, "F32", named)


def test_an_untied_head_that_llama_cpp_does_not_read_is_refused(tmp_path: Path) -> None:
    nothing(make(tmp_path, "gemma2", tie_word_embeddings=False), tmp_path, "F32", "head")


def test_tomorrows_setting_is_refused() -> None:
    class Tomorrow(LlamaConfig):
        def __init__(self, attention_temperature: float = 0.0, **more: Any) -> None:
            super().__init__(**more)
            self.attention_temperature = attention_temperature

    assert metadata(Tomorrow(), 100).keys["block_count"] == 32
    with pytest.raises(InputError, match="attention_temperature"):
        metadata(Tomorrow(attention_temperature=2.0), 100)


def test_an_update_that_is_rounded_away_is_refused(tmp_path: Path) -> None:
    """An update of a thousandth of the base's own steps, on a base whose numbers lie on the type's grid."""
    base = base_folder(tmp_path / "base", "llama", **WIDE)
    weights = load_file(base / "model.safetensors")
    plain = {name: rounded(w, "Q4_0") if w.ndim == 2 and "proj" in name else w for name, w in weights.items()}
    save_file(plain, base / "model.safetensors", metadata={"format": "pt"})
    trained = trained_of(base, random_adapter(base, size=1e-4), tmp_path / "adapter")
    with pytest.raises(InputError, match="survives in Q4_0"):
        written(trained, tmp_path / "out", "Q4_0")
    (tmp_path / "forced").mkdir()
    said = GgufModel(trained, Options(merged=True, type="Q4_0", force=True)).write(tmp_path / "forced", QUIET)
    assert said.more["survival"]["kept"] < 0.5
    said = GgufModel(trained, Options(merged=True, type="F32")).write(tmp_path / "forced", QUIET)
    assert said.more["survival"]["cosine"] > 0.99


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "llama", **WIDE)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][5, 3] = 1e5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    trained = trained_of(base, random_adapter(base), tmp_path / "adapter")
    with pytest.raises(InputError, match="embed_tokens"):
        written(trained, tmp_path / "out", "F16")
    written(trained, tmp_path / "more", "BF16")


def test_general_says_where_it_is_from_and_no_path(tmp_path: Path) -> None:
    file = written(make(tmp_path, "llama"), tmp_path / "out", "F16")
    block = read_metadata(file, lambda key: key.startswith("general."))
    assert block["general.name"].value == b"base adapter" and block["general.type"].value == b"model"
    assert block["general.base_model.0.name"].value == b"base"
    assert str(tmp_path).encode() not in file.read_bytes()


# A base that is a GGUF itself.


def from_gguf(folder: Path, renderer: Renderer | None = None, *, split: int = 0) -> tuple[Trained, Path]:
    """An adapter on a GGUF whose tokenizer block has things that no tokenizer.json has."""
    keys = {".tokenizer.ggml.fim_pre_token_id": 7, ".tokenizer.chat_template": CHATML, ".general.license": "mit"}
    model = model_of("llama", hidden_size=64, intermediate_size=96, head_dim=16)
    file = write_model(folder / "base.gguf", model, keys=keys, split=split)
    file = next(iter(sorted(folder.glob("base*.gguf"))))
    source = find_base(str(file))
    adapter = random_adapter(source.directory, size=0.3)
    return Trained("lora", adapter, BaseFiles(source), renderer or open_renderer(source)), file


@pytest.mark.parametrize("split", [0, 8])
def test_the_bases_own_tokenizer_block_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: int) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    trained, base = from_gguf(tmp_path, split=split)
    file = written(trained, tmp_path / "out", "F16")
    old, new = (read_metadata(path, lambda key: key.startswith("tokenizer.")) for path in (base, file))
    ends = {"tokenizer.ggml.eot_token_id"}
    assert {key: new[key] for key in old} == old and new.keys() - old.keys() <= ends
    assert read_metadata(file, lambda key: key == "general.license")["general.license"].value == b"mit"


def test_another_template_replaces_the_blocks_own_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}")
    trained, _ = from_gguf(tmp_path)
    trained = replace(trained, renderer=Renderer(trained.renderer.tokenizer, template=str(other)))
    destination = GgufModel(trained, Options(merged=True, type="F16"))
    assert any("template" in note for note in destination.notes)
    (tmp_path / "out").mkdir()
    destination.write(tmp_path / "out", QUIET)
    block = read_metadata(tmp_path / "out" / destination.file, lambda key: key == "tokenizer.chat_template")
    assert block["tokenizer.chat_template"].value.decode() == other.read_text()


# K types, by a stand-in for llama.cpp's quantiser: it copies the float file and says so.


def stand_in(folder: Path, body: str) -> Path:
    folder.mkdir()
    program = folder / "llama-quantize"
    program.write_text(f"#!{sys.executable}\nimport shutil, sys\n{body}\n")
    program.chmod(0o755)
    return folder


COPY = "print('[   1/   2] blk', flush=True); shutil.copyfile(sys.argv[1], sys.argv[2])"


def test_k_types_go_through_the_quantiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(stand_in(tmp_path / "bin", COPY)))
    trained = make(tmp_path, "llama")
    destination = GgufModel(trained, Options(merged=True, type="q4_k_m"))
    assert any("rows of 64, 96" in note for note in destination.notes)
    (tmp_path / "out").mkdir()
    said = destination.write(tmp_path / "out", QUIET)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"base-adapter-Q4_K_M.gguf", "Modelfile"}
    assert said.more["survival"]["cosine"] > 0.999  # it is float32 still


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("print('out of memory'); sys.exit(3)", "out of memory"),
        ("pass", "failed"),
        ("open(sys.argv[2], 'wb').write(b'GGUFnone')", "no usable file"),
        (
            "d = open(sys.argv[1], 'rb').read().replace(b'blk.1.ffn_up', b'blk.9.ffn_up'); "
            "open(sys.argv[2], 'wb').write(d)",
            "changed more",
        ),
    ],
)
def test_a_quantiser_that_fails_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, named: str
) -> None:
    monkeypatch.setenv("PATH", str(stand_in(tmp_path / "bin", body)))
    trained = make(tmp_path, "llama")
    with pytest.raises(RunError, match=named):
        written(trained, tmp_path / "out", "Q6_K")


def test_without_a_quantiser_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    nothing(make(tmp_path, "llama"), tmp_path, "Q4_K_M", "llama-quantize")


def test_without_the_package_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    nothing(make(tmp_path, "llama"), tmp_path, "F16", "package")


@pytest.mark.parametrize("kind", ["Q3", "int8", "IQ2_XXS", "Q4_K_X"])
def test_an_unknown_type_is_refused(tmp_path: Path, kind: str) -> None:
    nothing(make(tmp_path, "llama"), tmp_path, kind, kind)
