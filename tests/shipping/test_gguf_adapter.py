"""The adapter as GGUF: in real llama.cpp it does what it does in deltaw, and what llama.cpp would drop is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.adapter.algebra import baked
from deltaw.adapter.attach import attach, detach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.base.source import find_base
from deltaw.config import AdapterSpec
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.shipping.base_files import BaseFiles
from deltaw.shipping.destination import Options
from deltaw.shipping.gguf.adapter import ADAPTER, GgufAdapter
from deltaw.shipping.gguf.modelfile import FILE
from deltaw.shipping.gguf.names import family
from deltaw.shipping.trained import TEMPLATE, Trained
from deltaw.shipping.usage import gguf_usage
from deltaw.show.progress import Display
from tests.architectures import PACKED
from tests.base.gguf_models import model_of, write_model
from tests.data.toys import toy

from .llama_cpp import by_transformers, next_token

QUIET = Display(quiet=True)
PROMPTS = ([3, 4, 5, 6, 7], list(range(40, 70)), [7] * 20 + [9, 200, 31])
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48}
# Each of another kind of rows, names or storage.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {"sliding_window": None}),
    "gpt2": ("gpt2", GPT2),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True}),
    "nemotron": ("nemotron", {}),
    "qwen3 with experts": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen2 with experts": ("qwen2_moe", {"shared_expert_intermediate_size": 24}),
}
KEYS = {
    "qwen3_moe": {"feed_forward_length": 48},
    "nemotron": {"attention.layer_norm_epsilon": 1e-5},
    "qwen2_moe": {"feed_forward_length": 48, "expert_shared_feed_forward_length": 24},
}
# Ranks and scales of their own, and a rule that isn't alpha / r.
SPEC = AdapterSpec(
    rank=4,
    alpha=6.0,
    scaling="rslora",
    rank_overrides={"o_proj": 2, "down_proj": 1},
    alpha_overrides={"v_proj": 1.5, "down_proj": 20.0},
)

OVERRIDES = ("rank_overrides", "alpha_overrides")


def trained_on(folder: Path, model_type: str, changes: dict[str, Any], spec: AdapterSpec = SPEC) -> tuple[Any, Trained]:
    """A random model that carries a random adapter of large effect, and both as files."""
    model = model_of(model_type, **changes)
    gguf = write_model(folder / "tiny.gguf", model, keys=KEYS.get(model_type))
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    own = {field: {k: v for k, v in getattr(spec, field).items() if k in names} for field in OVERRIDES}
    adapter = drawn(model, spec.model_copy(update=own))
    return model, Trained("lora", adapter, BaseFiles(find_base(str(gguf))), Renderer(toy("chatml")))


def drawn(model: Any, spec: AdapterSpec) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    attached = attach(model, spec, generator=generator)
    for layer in attached.layers.values():
        low = layer.factors()
        b_MR = torch.randn(low.b_MR.shape, generator=generator) * 0.2
        layer.set_factors(replace(low, b_MR=b_MR))
    return detach(attached, BaseId("org/tiny"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))


def written(folder: Path, export: GgufAdapter) -> Path:
    folder.mkdir(exist_ok=True)
    export.write(folder, QUIET)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= export.size()
    return folder / ADAPTER


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_says_what_deltaw_says(tmp_path: Path, name: str) -> None:
    """Both in float32; where llama.cpp rounds (it looks GELU up in float16), its base alone shows by how much."""
    model, trained = trained_on(tmp_path, *FAMILIES[name])
    gguf = trained.base.gguf
    assert gguf is not None
    rounding = apart(next_token(gguf, [], PROMPTS), by_transformers(model, PROMPTS))
    base = by_transformers(model, PROMPTS)
    attach(model, trained.adapter)
    wanted = by_transformers(model, PROMPTS)
    given = next_token(gguf, [written(tmp_path / "out", GgufAdapter(trained, Options()))], PROMPTS)
    assert rounding < 0.02 and apart(wanted, base) > 2
    assert apart(given, wanted) < 1e-4 + 4 * rounding


Damage = Callable[[dict[str, LowRank]], dict[str, LowRank]]


def unpermuted(tensors: dict[str, LowRank]) -> dict[str, LowRank]:
    def back(rows: Tensor, heads: int) -> Tensor:
        return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    heads = {"attn_q.weight": 4, "attn_k.weight": 2}
    wrong = {name: heads[end] for name in tensors for end in heads if name.endswith(end)}
    assert wrong
    return {
        name: replace(low, b_MR=back(low.b_MR, wrong[name])) if name in wrong else low for name, low in tensors.items()
    }


def one_scale(tensors: dict[str, LowRank]) -> dict[str, LowRank]:
    """As if all modules had the adapter's alpha / r."""
    own = {"attn_v.weight": 4.0, "ffn_down.weight": 0.3}
    return {
        name: replace(low, b_MR=low.b_MR * next((v for end, v in own.items() if name.endswith(end)), 1.0))
        for name, low in tensors.items()
    }


def one_gone(tensors: dict[str, LowRank]) -> dict[str, LowRank]:
    return {name: low for name, low in tensors.items() if name != "blk.1.attn_k.weight"}


@pytest.mark.parametrize("damage", [unpermuted, one_scale, one_gone])
def test_the_comparison_sees_what_is_wrong(tmp_path: Path, damage: Damage) -> None:
    model, trained = trained_on(tmp_path, "llama", {})
    gguf = trained.base.gguf
    assert gguf is not None
    attach(model, trained.adapter)
    export = GgufAdapter(trained, Options())
    export.tensors = damage(export.tensors)
    given = next_token(gguf, [written(tmp_path / "out", export)], PROMPTS)
    assert apart(given, by_transformers(model, PROMPTS)) > 1


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {"sliding_window": 8}),
        ("phi3", {"sliding_window": 8}),
        ("starcoder2", {"sliding_window": 8}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}),
    ],
)
def test_a_window_that_llama_cpp_leaves_out_is_said(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    model = model_of(model_type, **changes)
    gguf = write_model(tmp_path / "tiny.gguf", model)
    near, far = ([3, 4, 5, 6, 7], list(range(40, 70)))
    assert apart(next_token(gguf, [], [near]), by_transformers(model, [near])) < 0.01
    assert apart(next_token(gguf, [], [far]), by_transformers(model, [far])) > 1
    assert "8" in family(model.config).differs


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"])
def test_nothing_is_said_of_a_model_that_runs_as_it_is(model_type: str) -> None:
    sizes = {} if model_type == "gpt2" else {"max_position_embeddings": 128}
    assert not family(AutoConfig.for_model(model_type, **sizes)).differs


def test_the_file_holds_what_llama_cpp_reads(tmp_path: Path) -> None:
    _, trained = trained_on(tmp_path, "llama", {})
    export = GgufAdapter(trained, Options())
    reader = GGUFReader(written(tmp_path / "out", export))
    said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert said["general.type"] == "adapter" and said["general.architecture"] == "llama"
    assert said["adapter.type"] == "lora" and said["adapter.lora.alpha"] == export.rank == 4
    names = [tensor.name for tensor in reader.tensors]
    assert [a.removesuffix(".lora_a") for a in names[::2]] == [b.removesuffix(".lora_b") for b in names[1::2]]
    for tensor in reader.tensors:
        low = export.tensors[tensor.name.rpartition(".")[0]]
        factor = low.a_RN if tensor.name.endswith(".lora_a") else low.b_MR
        assert torch.equal(torch.tensor(tensor.data), factor)


def with_factors(trained: Trained, factors: dict[str, Any]) -> Trained:
    return replace(trained, adapter=replace(trained.adapter, factors=factors))


def head_of(model: Any) -> LowRank:
    generator = torch.Generator().manual_seed(2)
    a_RN, b_MR = (torch.randn(shape, generator=generator) * 0.5 for shape in ((3, 32), (len(model.lm_head.weight), 3)))
    return LowRank(a_RN, b_MR, 1.5)


def test_an_update_of_the_head_goes_on_the_head(tmp_path: Path) -> None:
    model, trained = trained_on(tmp_path, "llama", {})
    low = head_of(model)
    export = GgufAdapter(with_factors(trained, {"lm_head": low}), Options())
    assert list(export.tensors) == ["output.weight"] and trained.base.gguf is not None
    with torch.no_grad():
        model.lm_head.weight += low.dense()
    given = next_token(trained.base.gguf, [written(tmp_path / "out", export)], PROMPTS)
    assert apart(given, by_transformers(model, PROMPTS)) < 1e-4


def test_a_head_that_the_gguf_has_not_is_refused_here_as_in_llama_cpp(tmp_path: Path) -> None:
    model, trained = trained_on(tmp_path, "llama", {"tie_word_embeddings": True})
    low = head_of(model)
    with pytest.raises(InputError) as refused:
        GgufAdapter(with_factors(trained, {"lm_head": low}), Options())
    assert "lm_head" in refused.value.what and "--merged" in str(refused.value.fix)
    export = GgufAdapter(trained, Options())
    export.tensors = {"output.weight": low}
    assert trained.base.gguf is not None
    with pytest.raises(InputError):
        next_token(trained.base.gguf, [written(tmp_path / "out", export)], PROMPTS)


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("model.layers.0.self_attn.q_projection", (32, 32)),  # no such module
        ("model.layers.9.self_attn.q_proj", (32, 32)),  # no such block
        ("model.layers.0.input_layernorm", (32, 1)),  # a norm, which llama.cpp passes over
        ("model.embed_tokens", (661, 32)),
        (LAYER, (32, 16)),  # another shape
        ("", (32, 32)),
    ],
)
def test_what_would_not_arrive_is_refused(tmp_path: Path, path: str, shape: tuple[int, int]) -> None:
    _, trained = trained_on(tmp_path, "llama", {})
    low = LowRank(torch.ones(2, shape[1]), torch.ones(shape[0], 2))
    with pytest.raises(InputError) as refused:
        GgufAdapter(with_factors(trained, {**trained.adapter.factors, path: low}), Options())
    assert path in refused.value.what and len(str(refused.value).splitlines()) <= 5


def test_a_scale_that_float32_has_not_is_refused(tmp_path: Path) -> None:
    _, trained = trained_on(tmp_path, "llama", {})
    low = LowRank(torch.ones(2, 32), torch.full((32, 2), 1e30), 1e30)
    with pytest.raises(InputError):
        GgufAdapter(with_factors(trained, {LAYER: low}), Options())


@pytest.mark.parametrize("spec", [AdapterSpec(full=True), AdapterSpec(rank=2, magnitude=True)])
def test_what_is_no_pair_of_factors_is_refused_with_what_helps(tmp_path: Path, spec: AdapterSpec) -> None:
    model = model_of("llama")
    gguf = write_model(tmp_path / "tiny.gguf", model)
    adapter = detach(attach(model, spec))
    with pytest.raises(InputError) as refused:
        GgufAdapter(Trained("runs/mine", adapter, BaseFiles(find_base(str(gguf))), Renderer(toy("chatml"))), Options())
    assert "runs/mine" in refused.value.what and "--merged" in str(refused.value.fix)


def test_a_base_without_rules_is_refused_by_its_type(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **PACKED["gpt_neox"]))
    model.save_pretrained(tmp_path / "base")
    adapter = detach(attach(model, AdapterSpec(rank=2)))
    with pytest.raises(InputError) as refused:
        GgufAdapter(
            Trained("mine", adapter, BaseFiles(find_base(str(tmp_path / "base"))), Renderer(toy("chatml"))), Options()
        )
    assert "gpt_neox" in refused.value.what


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    scales=st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_padded_and_baked_it_is_the_same_update(ranks: list[int], scales: list[float], seed: int) -> None:
    """Every entry of B is scale · B rounded once, the rest zeros: ΔW moves by no more than that."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        f"m{number}": LowRank(
            torch.randn(rank, 6, generator=generator), torch.randn(7, rank, generator=generator), scale
        )
        for number, (rank, scale) in enumerate(zip(ranks, scales, strict=False))
    }
    for path, made in baked(factors).items():
        low = factors[path]
        exact = low.scale * low.b_MR.double()
        assert made.scale == 1 and made.rank == max(ranks)
        assert torch.equal(made.a_RN[: low.rank], low.a_RN) and not made.b_MR[:, low.rank :].any()
        assert ((made.b_MR[:, : low.rank].double() - exact).abs() <= exact.abs() * 2.0**-23).all()
        error = (made.a_RN.double().T @ made.b_MR.double().T - low.a_RN.double().T @ exact.T).abs()
        assert (error <= 2.0**-23 * (low.a_RN.double().abs().T @ exact.abs().T)).all()


def test_another_template_than_the_bases_goes_along(tmp_path: Path) -> None:
    """A server takes the one in the base's GGUF unless it is told."""
    _, trained = trained_on(tmp_path, "llama", {})
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    own = replace(trained, renderer=Renderer(toy("chatml"), template=str(tmp_path / "own.jinja")))
    for one, files in ((trained, {ADAPTER, FILE}), (own, {ADAPTER, FILE, TEMPLATE})):
        export = GgufAdapter(one, Options())
        folder = written(tmp_path / one.renderer.template_fingerprint, export).parent
        assert {file.name for file in folder.iterdir()} == files
        usage = gguf_usage(one, "tiny.gguf", adapter=ADAPTER, template=export.template)
        assert (TEMPLATE in files) == ("--chat-template-file" in usage)
    assert (folder / TEMPLATE).read_text() == own.renderer.template


def test_of_a_gemma_that_sees_the_part_that_reads_is_adapted(tmp_path: Path) -> None:
    """Its GGUF is that of the language model alone; what trained the other part has no place there."""
    text = model_of("gemma3_text", sliding_window=8, query_pre_attn_scalar=8)
    gguf = write_model(tmp_path / "tiny.gguf", text)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text.config.to_dict(),
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    adapter = drawn(model, SPEC)
    trained = Trained("lora", adapter, BaseFiles(find_base(str(tmp_path / "base"))), Renderer(toy("chatml")))
    rounding = apart(next_token(gguf, [], PROMPTS), by_transformers(text, PROMPTS))
    attach(model, adapter)
    given = next_token(gguf, [written(tmp_path / "out", GgufAdapter(trained, Options()))], PROMPTS)
    assert apart(given, by_transformers(model, PROMPTS)) < 1e-4 + 4 * rounding
    tower = "model.vision_tower.encoder.layers.0.mlp.fc1"
    with pytest.raises(InputError) as refused:
        GgufAdapter(with_factors(trained, {tower: LowRank(torch.ones(2, 16), torch.ones(16, 2))}), Options())
    assert tower in refused.value.what
