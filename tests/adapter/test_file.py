"""An adapter's folder: what deltaw writes PEFT reads and the other way round; what can't be kept is refused by name."""

import json
import os
import pickle
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import KasaConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltaw.adapter.attach import attach
from deltaw.adapter.file import CONFIG, RECORD, WEIGHTS, Adapter, BaseId
from deltaw.adapter.targets import linear_paths
from deltaw.config import AdapterSpec
from deltaw.errors import InputError, RunError
from deltaw.factors import LowRank
from deltaw.kinds import DoRA
from tests.architectures import tiny

BASE = BaseId("someone/tiny", "abc123", "sha256:" + "0" * 64, "sha256:" + "1" * 64)
CLASSIC = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "bias",
    "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "peft_version",
}  # fmt: skip


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=(torch.arange(16).view(2, 8) * 7) % 97, use_cache=False).logits


def same(got: Tensor, wanted: Tensor) -> bool:
    """Whether two float32 computations of the same logits differ by rounding only."""
    return bool((got - wanted).abs().max() <= 3e-4 * wanted.abs().max())


def randomise(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.3)


def made(spec: AdapterSpec, name: str = "llama") -> Adapter:
    """A random adapter of `spec` on a tiny model."""
    attached = attach(tiny(name), spec)
    randomise(attached.parameters)
    return attached.adapter(BASE)


# Out: deltaw -> file -> deltaw and PEFT

SPECS = {
    "plain": AdapterSpec(rank=3, alpha=5.0, targets=("q_proj", "down_proj")),
    "rslora": AdapterSpec(rank=3, alpha=5.0, scaling="rslora"),
    "ranks": AdapterSpec(rank=3, rank_overrides={"layers.0.self_attn.q_proj": 5, "q_proj": 2, "mlp.up_proj": 1}),
    "alphas": AdapterSpec(rank=3, alpha_overrides={"layers.1.mlp.up_proj": 0.5, "up_proj": 7.5}),
    "both": AdapterSpec(rank=3, scaling="rslora", rank_overrides={"v_proj": 4}, alpha_overrides={"v_proj": 9.0}),
    "dropout": AdapterSpec(rank=3, dropout=0.25),
    "attention": AdapterSpec(rank=3, targets="attention"),
    "mlp": AdapterSpec(rank=3, targets="mlp"),
    "paths": AdapterSpec(rank=3, targets=("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.gate_proj")),
}
DORA = {
    "dora": AdapterSpec(rank=3, magnitude=True),
    "dora of ranks": AdapterSpec(rank=3, magnitude=True, scaling="rslora", rank_overrides={"q_proj": 2}),
}


@pytest.mark.parametrize("which", [*SPECS, *DORA])
def test_what_is_saved_is_what_is_loaded_here_and_in_peft(which: str, tmp_path: Path) -> None:
    adapter = made({**SPECS, **DORA}[which])
    again = Adapter.load(adapter.save(tmp_path / "new" / "folder"))
    assert again.spec == adapter.spec and again.base == BASE
    assert list(again.factors) == sorted(adapter.factors)  # safetensors sorts
    for path, update in adapter.factors.items():
        other = again.factors[path]
        assert type(update) is type(other) and update.scale == other.scale == adapter.spec.scale(path)
        if isinstance(update, DoRA):
            assert torch.equal(update.magnitude_M, other.magnitude_M)
            update, other = update.low, other.low
        assert torch.equal(update.a_RN, other.a_RN) and torch.equal(update.b_MR, other.b_MR)
    peft = PeftModel.from_pretrained(tiny("llama"), tmp_path / "new" / "folder")
    here = attach(tiny("llama"), again).model
    assert same(logits(peft), logits(here))
    assert not same(logits(here), logits(tiny("llama")))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_files_hold_exactly_pefts_classic_layout(name: str, tmp_path: Path) -> None:
    adapter = made(AdapterSpec(rank=3, alpha=6.0), name)
    adapter.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {WEIGHTS, CONFIG, RECORD, "README.md"}

    tensors = load_file(tmp_path / WEIGHTS)
    shapes = {}
    for path, update in adapter.factors.items():
        m, n = update.shape
        shapes |= {f"base_model.model.{path}.lora_A.weight": (3, n), f"base_model.model.{path}.lora_B.weight": (m, 3)}
    assert {key: tuple(value.shape) for key, value in tensors.items()} == shapes
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}

    config = json.loads((tmp_path / CONFIG).read_text())
    assert config.keys() == CLASSIC
    assert config["r"] == 3 and config["lora_alpha"] == 6 and type(config["lora_alpha"]) is int
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE.name, BASE.revision)

    record = json.loads((tmp_path / RECORD).read_text())
    assert record["base"] == {name: getattr(BASE, name) for name in ("name", "revision", "fingerprint", "template")}
    assert BASE.name in (tmp_path / "README.md").read_text()
    assert not any(str(tmp_path) in file.read_text(errors="replace") for file in tmp_path.iterdir())


def test_a_group_is_spelt_out_for_tools_that_do_not_know_it(tmp_path: Path) -> None:
    adapter = made(AdapterSpec(rank=2, targets="mlp"))
    grouped = Adapter(AdapterSpec(rank=2, targets="mlp"), adapter.factors, BASE)
    assert set(Adapter.load(grouped.save(tmp_path)).spec.targets) == set(adapter.factors)
    PeftModel.from_pretrained(tiny("llama"), tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    adapter = made(SPECS["plain"])
    before = os.umask(umask)
    try:
        adapter.save(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_went_wrong_is_not_saved(value: float, tmp_path: Path) -> None:
    adapter = made(SPECS["plain"])
    next(iter(adapter.factors.values())).b_MR[1, 1] = value
    with pytest.raises(RunError, match=r"NaN or infinity.*\n.*layers\.0\.self_attn\.q_proj\.lora_B"):
        adapter.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# In: PEFT -> file -> deltaw

PEFT_MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "list": ("llama", {"target_modules": ["q_proj", "up_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "regex": ("llama", {"target_modules": r".*\.(0|1)\.self_attn\.[qk]_proj"}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 2, "layers.0.self_attn.v_proj": 4},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 9, "v_proj": 1.5},
        },
    ),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "exclusions": ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "dora on gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "eva": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "eva"}),
    "bfloat16": ("llama", {"target_modules": ["q_proj"]}),
}


@pytest.mark.parametrize("which", PEFT_MADE)
def test_an_adapter_that_peft_made_answers_the_same_here(which: str, tmp_path: Path) -> None:
    name, options = PEFT_MADE[which]
    peft = get_peft_model(tiny(name), LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options))
    randomise(parameter for parameter in peft.parameters() if parameter.requires_grad)
    if which == "bfloat16":
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.bfloat16().float()
    peft.save_pretrained(tmp_path)
    if which == "bfloat16":
        tensors = {key: value.bfloat16() for key, value in load_file(tmp_path / WEIGHTS).items()}
        save_file(tensors, tmp_path / WEIGHTS)
    attached = attach(tiny(name), Adapter.load(tmp_path))
    assert same(logits(attached.model), logits(peft))
    adapted = {
        key.split(".lora_A")[0].removeprefix("base_model.model.") for key in peft.state_dict() if "lora_A" in key
    }
    assert set(attached.paths) == adapted


def test_the_minimum_is_peft_type_and_targets(tmp_path: Path) -> None:
    broken(tmp_path, config={"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2})
    adapter = Adapter.load(tmp_path)
    assert adapter.spec == AdapterSpec(rank=2, alpha=8, targets=("q_proj",)) and adapter.base == BaseId()


# Refusals

PATH = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{PATH}"
GOOD = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def tensors(prefix: str = KEY, rank: int = 2) -> dict[str, Tensor]:
    return {f"{prefix}.lora_A.weight": torch.ones(rank, 32), f"{prefix}.lora_B.weight": torch.ones(32, rank)}


def broken(folder: Path, *, config: Any = GOOD, weights: Any = None) -> None:
    """An adapter folder from a config (a dict or raw bytes) and weights (tensors or raw bytes)."""
    weights = tensors() if weights is None else weights
    if isinstance(weights, bytes):
        (folder / WEIGHTS).write_bytes(weights)
    else:
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())


def refusal(folder: Path, call: Callable[[], Any] | None = None) -> str:
    """The message of the refusal: short, of bounded lines, and naming the file."""
    with pytest.raises(InputError) as caught:
        (call or (lambda: Adapter.load(folder)))()
    message = str(caught.value)
    assert len(message.splitlines()) <= 5 and max(map(len, message.splitlines())) < 500
    assert str(folder) in message
    return message


def with_nan() -> dict[str, Tensor]:
    weights = tensors()
    weights[f"{KEY}.lora_B.weight"][3, 1] = float("nan")
    return weights


def beside(**extra: Tensor) -> dict[str, Tensor]:
    return {**tensors(), **{f"{KEY}.{name}": value for name, value in extra.items()}}


A_ONLY = {f"{KEY}.lora_A.weight": torch.ones(2, 32)}
WEIGHT_FAULTS: dict[str, tuple[Any, str]] = {
    "NaN": (with_nan(), "lora_B"),
    "all NaN": ({key: value * float("nan") for key, value in tensors().items()}, "NaN"),
    "beyond float32": ({key: value.double() * 1e300 for key, value in tensors().items()}, "infinity"),
    "missing B": (A_ONLY, "has lora_A but not its other half"),
    "every key wrong": ({"x.weight": torch.ones(2, 2)}, "lora_A"),
    "no prefix": (tensors(PATH), "doesn't begin with 'base_model.model.'"),
    "extra key": ({**tensors(), "base_model.model.junk": torch.ones(1)}, "junk"),
    "no tensors": ({}, "no tensors"),
    "DoRA": (beside(lora_magnitude_vector=torch.ones(32)), "DoRA"),
    "half an embedding": (
        {KEY + ".lora_embedding_A": torch.ones(2, 97)},
        "has lora_embedding_A but not its other half",
    ),
    "tokens without numbers": (
        {**tensors(), f"{KEY}.token_adapter.trainable_tokens_delta": torch.ones(2, 32)},
        "trainable_token_indices",
    ),
    "bias on B": ({**tensors(), f"{KEY}.lora_B.bias": torch.ones(32)}, "bias on B"),
    "saved module": (
        {**tensors(), "base_model.model.lm_head.weight": torch.ones(97, 32)},
        "modules_to_save doesn't name",
    ),
    "another rank": (tensors(rank=3), "the config says rank 2"),
    "ranks that differ": ({**tensors(), f"{KEY}.lora_B.weight": torch.ones(32, 5)}, "the config says rank 2"),
    "3-D": ({**tensors(), f"{KEY}.lora_B.weight": torch.ones(32, 2, 1)}, "not a floating matrix"),
    "integers": ({key: value.int() for key, value in tensors().items()}, "not a floating matrix"),
    "another module": (tensors(KEY.replace("q_proj", "k_proj")), "target_modules doesn't name"),
    "empty file": (b"", "cut short"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "WEIGHTS"),
    "a pickle under its name": (pickle.dumps({"a": 1}), "WEIGHTS"),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_broken_weights_are_refused_by_name(fault: str, tmp_path: Path) -> None:
    weights, said = WEIGHT_FAULTS[fault]
    broken(tmp_path, weights=weights)
    message = refusal(tmp_path)
    assert WEIGHTS in message or CONFIG in message
    assert said.replace("WEIGHTS", WEIGHTS) in message


MAGNITUDE_KEY = f"{KEY}.lora_magnitude_vector"
MAGNITUDES: dict[str, tuple[dict[str, Tensor], str]] = {
    "none": (tensors(), f"'{MAGNITUDE_KEY}' is missing"),
    "too short": (beside(lora_magnitude_vector=torch.ones(31)), "(31,), of 32 rows"),
    "a matrix": (beside(lora_magnitude_vector=torch.ones(32, 1)), "(32, 1), of 32 rows"),
    "integers": (beside(lora_magnitude_vector=torch.ones(32).int()), "int32"),
    "another module's": ({**tensors(), MAGNITUDE_KEY.replace("q_", "k_"): torch.ones(32)}, "k_proj.lora_magnitude"),
    "NaN": (beside(lora_magnitude_vector=torch.full((32,), torch.nan)), "NaN"),
}


@pytest.mark.parametrize("fault", MAGNITUDES)
def test_doras_magnitudes_are_one_for_each_row_of_each_module(fault: str, tmp_path: Path) -> None:
    weights, said = MAGNITUDES[fault]
    broken(tmp_path, config={**GOOD, "use_dora": True}, weights=weights)
    assert said in refusal(tmp_path)


CONFIG_FAULTS: dict[str, tuple[Any, str]] = {
    "DoRA": ({**GOOD, "use_dora": True}, "use_dora"),
    "modules_to_save": ({**GOOD, "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "trainable tokens": ({**GOOD, "trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices"),
    "lora_bias": ({**GOOD, "lora_bias": True}, "lora_bias"),
    "bias": ({**GOOD, "bias": "lora_only"}, "bias='lora_only'"),
    **{init: ({**GOOD, "init_lora_weights": init}, init) for init in ("pissa", "pissa_niter_4", "olora", "loftq")},
    "unknown key": ({**GOOD, "use_magic": True}, "'use_magic' is unknown"),
    "unknown type": ({**GOOD, "peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "no type": ({key: value for key, value in GOOD.items() if key != "peft_type"}, "peft_type is None"),
    "no targets": ({**GOOD, "target_modules": None}, "target_modules"),
    "targets of numbers": ({**GOOD, "target_modules": [4]}, "target_modules"),
    "rank 0": ({**GOOD, "r": 0}, "r: "),
    "huge rank": ({**GOOD, "r": 10**9}, "r: "),
    "NaN alpha": ({**GOOD, "lora_alpha": float("nan")}, "lora_alpha: "),
    "alpha 0": ({**GOOD, "lora_alpha": 0}, "lora_alpha: "),
    "alpha beyond a float": ({**GOOD, "lora_alpha": 10**400}, "lora_alpha: "),
    "dropout 1": ({**GOOD, "lora_dropout": 1}, "lora_dropout: "),
    "rank_pattern of text": ({**GOOD, "rank_pattern": {"q_proj": "4"}}, "rank_pattern.q_proj: "),
    "alpha_pattern of NaN": ({**GOOD, "alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern.q_proj: "),
    "truncated": (json.dumps(GOOD).encode()[:40], "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    "a list": (b"[]", "must be a JSON object"),
    "deep": (b'{"a":' * 100_000, "nested too deeply"),
    "huge": (b'{"a": "' + b"x" * 2_000_000 + b'"}', "more than 1,000,000 bytes"),
    "long number": (b'{"r": ' + b"9" * 9999 + b"}", "not valid JSON"),
    "key twice": (b'{"r": 2, "r": 3}', "'r' appears twice"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_config_that_can_not_be_kept_is_refused_by_field(fault: str, tmp_path: Path) -> None:
    config, said = CONFIG_FAULTS[fault]
    broken(tmp_path, config=config)
    message = refusal(tmp_path)
    assert CONFIG in message and said in message


WRONG = ["4", [4], True, {"a": []}]
TYPED = {
    "r": [*WRONG, None, 2.5],
    "lora_alpha": [*WRONG, None],
    "lora_dropout": [*WRONG, False, ""],
    "use_rslora": ["4", [4], None, {}],
    "use_dora": ["4", [4], None, {}],
    "fan_in_fan_out": ["4", [4], None],
    "rank_pattern": ["4", [4], True, 0, ""],
    "alpha_pattern": ["4", [4], True, 0, ""],
    "target_modules": [True, 4, {}, "", [], [None], [""]],
    "peft_type": [*WRONG, None, "lora"],
    "bias": [True, [4], "all"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in TYPED for value in TYPED[field]])
def test_a_field_of_the_wrong_type_is_named(field: str, value: Any, tmp_path: Path) -> None:
    broken(tmp_path, config={**GOOD, field: value})
    message = refusal(tmp_path)
    assert CONFIG in message and field in message


def test_all_of_the_configs_problems_at_once(tmp_path: Path) -> None:
    broken(tmp_path, config={**GOOD, "use_qalora": True, "lora_bias": True, "bias": "all", "magic": 1})
    assert refusal(tmp_path).count("\n") == 3 and "(and 1 more)" in refusal(tmp_path)


def test_a_byte_order_mark_and_unknown_but_empty_fields_are_no_fault(tmp_path: Path) -> None:
    broken(tmp_path, config=b"\xef\xbb\xbf" + json.dumps({**GOOD, "future": None, "later": []}).encode())
    assert Adapter.load(tmp_path).spec.rank == 2


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(a+)+$b", "(.*)*q_proj", "[q", "(x|x)*" * 50 + "y|(a*)*b"])
def test_a_pattern_that_can_not_be_decided_is_refused_by_name(field: str, pattern: str, tmp_path: Path) -> None:
    config = {**GOOD, field: {pattern: 2}, "target_modules": ["a" * 900]}
    broken(tmp_path, config=config, weights=tensors("base_model.model." + "a" * 900))
    message = refusal(tmp_path)
    assert CONFIG in message and repr(pattern)[:40] in message


@pytest.mark.parametrize(
    ("pattern", "ranks"),
    [
        ({"q_proj": 2}, (2, 2)),
        ({"^q_proj": 5}, (3, 3)),
        ({"^layers.1.self_attn.q_proj": 5}, (3, 3)),
        ({r"layers\.0\..*q_proj": 2}, (2, 3)),
        ({"(k|q)_proj": 2, "q_proj": 5}, (2, 2)),
        ({"layers.[^0].*": 2}, (3, 2)),
        ({"model.layers.1.self_attn.q_proj": 1, "q_proj": 2}, (2, 1)),
        ({"q_proj$": 1}, (1, 1)),
        ({"_proj": 5, "roj": 5}, (3, 3)),
    ],
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_mean_here_what_they_mean_to_peft(field: str, pattern: dict, ranks: tuple, tmp_path: Path) -> None:
    peft = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], r=3, lora_alpha=3, **{field: pattern}))
    randomise(parameter for name, parameter in peft.named_parameters() if "lora_" in name)
    peft.eval().save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert same(logits(attach(tiny("llama"), adapter).model), logits(peft))
    read = adapter.spec.rank_of if field == "rank_pattern" else adapter.spec.alpha_of
    assert tuple(read(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1)) == ranks
    again = Adapter.load(adapter.save(tmp_path / "again"))
    assert again.spec == adapter.spec
    other = PeftModel.from_pretrained(tiny("llama"), tmp_path / "again").eval()
    assert same(logits(other), logits(peft))


def test_an_override_by_path_does_not_reach_a_path_that_ends_like_it(tmp_path: Path) -> None:
    """PEFT's `^a.q` is a's alone; as a name, `a.q` would be x.a's, too."""
    weights = {**tensors("base_model.model.a.q"), **tensors("base_model.model.x.a.q"), **tensors("base_model.model.b")}
    config = {**GOOD, "target_modules": ["q", "b"], "alpha_pattern": {"^a.q": 40, "^x.a.+": 8}}
    for pattern, alphas in (
        ({"^a.q": 40, "^x.a.+": 8}, (40, 8, 4)),
        ({"^a.q": 40}, (40, 4, 4)),
        ({"(a.q)": 7}, (7, 7, 4)),
    ):
        broken(tmp_path, config={**config, "alpha_pattern": pattern}, weights=weights)
        adapter = Adapter.load(tmp_path)
        assert tuple(adapter.spec.alpha_of(path) for path in ("a.q", "x.a.q", "b")) == alphas
        again = Adapter.load(adapter.save(tmp_path / "again"))
        assert {p: u.scale for p, u in again.factors.items()} == {p: u.scale for p, u in adapter.factors.items()}


def test_a_regular_expression_as_target_is_never_run(tmp_path: Path) -> None:
    broken(tmp_path, config={**GOOD, "target_modules": "(a+)+$"}, weights=tensors("base_model.model." + "a" * 900))
    began = time.perf_counter()
    assert Adapter.load(tmp_path).spec.targets == ("a" * 900,)
    assert time.perf_counter() - began < 1


def test_truncated_weights_are_refused_at_every_length(tmp_path: Path) -> None:
    broken(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for length in [*range(0, 400, 13), *range(400, len(whole), 61), len(whole) - 1]:
        (tmp_path / WEIGHTS).write_bytes(whole[:length])
        assert WEIGHTS in refusal(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole + b"\0")
    assert WEIGHTS in refusal(tmp_path)


@given(data=st.binary(max_size=200))
def test_no_config_of_any_bytes_escapes_as_another_error(tmp_path_factory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    broken(folder, config=data)
    refusal(folder)


# What a trained adapter adapts is what it has tensors for

FOREIGN: dict[str, dict[str, Any]] = {
    "targets that this model lacks": {"target_modules": ["q_proj", "v_proj", "query_key_value", "dense", "c_attn"]},
    "the rank of an untargeted module": {"rank_pattern": {"q_proj": 2, "down_proj": 8, "lm_head": 0}},
    "an alpha of nothing": {"alpha_pattern": {"o_proj": 2, "lm_head": 4, "nothing": 3.5}},
    "values of nothing": {"alpha_pattern": {"nothing": float("nan")}, "rank_pattern": {"none": 0}},
    "regular expressions": {"target_modules": r".*layers\.1\..*(q|v)_proj", "rank_pattern": {r"layers\.\d.*q_proj": 2}},
    "modules left out": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "modules left out by pattern": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "some layers": {"layers_to_transform": [1]},
    "some layers of a name": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "a rank above a layer's width": {"r": 40},
    "a rank above the whole model's": {"r": 300, "target_modules": "all-linear"},
    "a pattern's rank above a layer's width": {"rank_pattern": {"v_proj": 200}},
    "all of it": {
        "target_modules": ["q_proj", "v_proj", "wq"], "rank_pattern": {"layers.1.self_attn.q_proj": 2, "wq": 7},
        "alpha_pattern": {"q_proj": 16, "wq": 1}, "use_rslora": True, "lora_dropout": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("which", FOREIGN)
def test_an_adapter_that_names_more_than_it_holds_loads_as_peft_loads_it(which: str, tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, **FOREIGN[which]}
    peft = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", **fields))
    randomise(parameter for name, parameter in peft.named_parameters() if "lora_" in name)
    peft.eval().save_pretrained(tmp_path)
    attached = attach(tiny("llama"), Adapter.load(tmp_path))
    held = {key.split(".lora_A")[0].removeprefix("base_model.model.") for key in peft.state_dict() if "lora_A" in key}
    assert set(attached.paths) == held and same(logits(attached.model), logits(peft))
    # And what deltaw makes of it, PEFT reads.
    made = attached.adapter(BASE).save(tmp_path / "again")
    assert same(logits(PeftModel.from_pretrained(tiny("llama"), made).eval()), logits(peft))


def test_a_runs_own_spec_stays_strict() -> None:
    for fields in ({"targets": ("q_proj", "wq")}, {"rank_overrides": {"wq": 2}}, {"alpha_overrides": {"wq": 2}}):
        with pytest.raises(InputError) as caught:
            attach(tiny("llama"), AdapterSpec(rank=2, **fields))
        assert "'wq'" in caught.value.what
    with pytest.raises(InputError) as caught:
        attach(tiny("llama"), AdapterSpec(rank=40, targets=("v_proj",)))
    assert "rank 40 > 16" in caught.value.what


KINDS: dict[str, tuple[Any, str]] = {
    "LoHa": (LoHaConfig(target_modules=["q_proj"]), "LOHA"),
    "LoKr": (LoKrConfig(target_modules=["q_proj"]), "LOKR"),
    "IA3": (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
    "OFT": (OFTConfig(target_modules=["q_proj"], oft_block_size=4), "OFT"),
    "VeRA": (VeraConfig(target_modules=["q_proj"], r=2), "VERA"),
    "prompt tuning": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
    "prefix tuning": (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PREFIX_TUNING"),
    "layer norms": (LNTuningConfig(target_modules=["input_layernorm"]), "LN_TUNING"),
    "KaSA": (LoraConfig(target_modules=["q_proj"], kasa_config=KasaConfig()), "KaSA"),
}


@pytest.mark.parametrize("which", KINDS)
def test_another_kind_of_adapter_is_refused_by_its_own_name(which: str, tmp_path: Path) -> None:
    config, kind = KINDS[which]
    get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert kind in message.splitlines()[0] or kind in message.splitlines()[1]
    assert "lora_A or lora_B" not in message and "merge" not in message


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_unopened(name: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(GOOD))
    (tmp_path / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert f"{name} is a pickle" in refusal(tmp_path)
    assert not (tmp_path / "canary").exists()


CODE_FIELDS = {
    "auto_mapping": {"base_model_class": "Canary", "parent_library": "deltaw_canary"},
    "megatron_core": "deltaw_canary",
    "megatron_config": {"module": "deltaw_canary"},
    "runtime_config": {"module": "deltaw_canary"},
    "auto_map": {"AutoModel": "deltaw_canary.Canary"},
    "_attn_implementation_internal": "deltaw_canary",
}


@pytest.mark.parametrize("field", CODE_FIELDS)
def test_code_that_a_config_names_is_never_imported(field: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "deltaw_canary.py").write_text(f"open({str(tmp_path / 'sung')!r}, 'w')\nclass Canary: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken(tmp_path, config={**GOOD, "target_modules": [PATH], field: CODE_FIELDS[field]})
    try:
        attach(tiny("llama"), Adapter.load(tmp_path))
    except InputError as error:
        assert field in str(error)
    assert not (tmp_path / "sung").exists() and "deltaw_canary" not in sys.modules


def test_a_folder_that_is_no_adapter_says_what_is_missing(tmp_path: Path) -> None:
    assert "no such adapter folder" in refusal(tmp_path / "gone")
    assert f"{WEIGHTS} and {CONFIG} missing" in refusal(tmp_path)
    broken(tmp_path)
    (tmp_path / CONFIG).unlink()
    assert f"{CONFIG} missing" in refusal(tmp_path)


@pytest.mark.parametrize("record", [b"{", b"{}", b'{"base": 3}', b'{"base": {"name": 3}}', b"\xff"])
def test_a_broken_record_of_the_base_is_refused(record: bytes, tmp_path: Path) -> None:
    broken(tmp_path)
    (tmp_path / RECORD).write_bytes(record)
    assert RECORD in refusal(tmp_path)


# The wrong model


def test_an_adapter_of_another_model_is_refused_by_module() -> None:
    llama = made(AdapterSpec(rank=2, targets=("q_proj",)))
    with pytest.raises(InputError, match="'q_proj' matches no layer"):
        attach(tiny("gpt2"), llama)
    path, update = next(iter(llama.factors.items()))
    wider = LowRank(torch.ones(2, 64), torch.ones(64, 2), update.scale)
    with pytest.raises(InputError, match=r"1 mismatch(es)?:\n.*\(64, 64\).*\(32, 32\)"):
        attach(tiny("llama"), Adapter(llama.spec, {**llama.factors, path: wider}))
    with pytest.raises(InputError, match="no factors for it"):
        attach(tiny("llama"), Adapter(llama.spec, {path: update}))
    deeper = {**llama.factors, path.replace("0", "7"): update}
    with pytest.raises(InputError, match=r"layers\.7\..*no such linear layer"):
        attach(tiny("llama"), Adapter(llama.spec, deeper))


def test_an_adapter_of_the_head_alone_goes_on_it(tmp_path: Path) -> None:
    head = {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}
    head |= {"base_model.model.lm_head.lora_B.weight": torch.ones(97, 2)}
    broken(tmp_path, config={**GOOD, "target_modules": ["lm_head"]}, weights=head)
    attached = attach(tiny("llama"), Adapter.load(tmp_path))
    assert attached.paths == ("lm_head",)
    assert torch.equal(attached.adapter(BaseId()).factors["lm_head"].low_rank().a_RN, torch.ones(2, 32))


def test_the_wrong_base_is_told_by_fingerprint_not_by_name() -> None:
    same_weights = BaseId("another/name", None, BASE.fingerprint)
    other_weights = BaseId(BASE.name, BASE.revision, "sha256:" + "f" * 64)
    assert BASE.mismatch(same_weights) is None
    assert BASE.mismatch(BaseId("unknown")) is None and BaseId().mismatch(BASE) is None
    assert "someone/tiny (sha256:000000000000)" in (BASE.mismatch(other_weights) or "")
    assert "sha256:ffffffffffff" in (BASE.mismatch(other_weights) or "")


def test_every_linear_path_of_a_model_can_be_saved_under_its_own_name(tmp_path: Path) -> None:
    adapter = made(AdapterSpec(rank=1), "qwen3_moe")
    assert set(Adapter.load(adapter.save(tmp_path)).factors) == set(linear_paths(tiny("qwen3_moe")))
