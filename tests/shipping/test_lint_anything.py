"""Lint on what nobody would write: it says something, or that there is no adapter; it doesn't hang and runs nothing."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaw.adapter.peft_config import IGNORED, READ, UNSUPPORTED
from deltaw.errors import DeltawError
from deltaw.shipping.lint.finding import DESTINATIONS
from deltaw.shipping.lint.lint import lint
from tests.shipping.lint_folders import PREFIX, good, opened
from tests.tiny import tiny_base

FIELDS = sorted({*IGNORED, *READ, *UNSUPPORTED, "made_up"})
SLOW = ["(a|a)*$", "(.*)*(.*)*x", "^^^", "(", "\\", "[", "(?P<a>.)(?P=a)", "q_proj", ".*"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from([*SLOW, "pissa", "all-linear", "LORA", "org/base", "/etc", "builtin:smollm2", "../x", "\x00"])
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(SLOW), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = st.sampled_from([
    f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight", f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight",
    f"{PREFIX}lm_head.weight", "lora_A.weight", ".lora_B.bias", "model.norm.weight", f"{PREFIX}.lora_embedding_A",
    "weight",
    f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector", f"{PREFIX}a.experts.base_layer.lora_A.weight",
    f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", "a..b", "lora_A.default.weight",
]) | st.text(max_size=12)  # fmt: skip
SHAPES = st.lists(st.integers(0, 5), max_size=4)
TYPES = st.sampled_from(["F32", "BF16", "F16", "I8", "F8_E4M3", "BOOL", "U64", "F4", "C64"])
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "F8_E4M3": 1, "BOOL": 1, "U64": 8, "F4": 1, "C64": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("anything") / "base")


def safetensors(tensors: dict[str, tuple[list[int], str]]) -> bytes:
    """A file whose header says this, with data of the length that it takes."""
    header: dict[str, Any] = {}
    end = 0
    for name, (shape, kind) in tensors.items():
        size = BYTES[kind]
        for side in shape:
            size *= side
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + os.urandom(end)


def looked_at(folder: Path, base: Path | None) -> None:
    try:
        verdict = lint(folder, base=str(base) if base else None)
    except DeltawError as error:
        assert error.what
        return
    json.dumps(verdict.to_json(), allow_nan=True)
    assert verdict.text() and verdict.exit_code in (0, 1) and set(verdict.to_json()["verdicts"]) == set(DESTINATIONS)


CALM = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


Right = tuple[dict[str, tuple[list[int], str]], dict[str, Any]]


@pytest.fixture(scope="module")
def right(base: Path) -> Right:
    """A right adapter's sizes and types by name, and its config."""
    tensors, config = good(opened(base), names=("q_proj",))
    return {name: (list(tensor.shape), "F32") for name, tensor in tensors.items()}, config


@CALM
@given(fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6))
def test_any_config(fields: dict[str, Any], base: Path, right: Right, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("config")
    sizes, config = right
    (folder / "adapter_model.safetensors").write_bytes(safetensors(sizes))
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    looked_at(folder, base if "base_model_name_or_path" not in fields else None)


@CALM
@given(tensors=st.dictionaries(NAMES, st.tuples(SHAPES, TYPES), max_size=8))
def test_any_tensors(
    tensors: dict[str, tuple[list[int], str]], base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tensors")
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    looked_at(folder, base)


FILES = (
    "adapter_config.json", "adapter_model.safetensors", "deltaw.json", "tokenizer_config.json", "tokenizer.json",
    "chat_template.jinja", "adapters.safetensors", "config.json", "config.yaml", "adapter_model.bin", "a.gguf",
)  # fmt: skip


@CALM
@given(
    files=st.dictionaries(
        st.sampled_from(FILES), st.binary(max_size=40) | VALUES.map(json.dumps).map(str.encode), max_size=5
    ),
    one=st.sampled_from(["", "a.gguf"]),
)
def test_any_files(files: dict[str, bytes], one: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("files")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    looked_at(folder / one, None)


@CALM
@given(at=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_byte_changed(at: int, byte: int, right: Right, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("byte")
    sizes, config = right
    weights, text = bytearray(safetensors(sizes)), bytearray(json.dumps(config).encode())
    weights[at % len(weights)] = byte
    text[at % len(text)] = byte
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_bytes(text)
    looked_at(folder, None)


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    trap = b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(tmp_path / "ran")
    for name in ("adapter_model.bin", "adapter_model.pt", "training_args.bin"):
        (tmp_path / name).write_bytes(trap)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    looked_at(tmp_path, None)
    assert not (tmp_path / "ran").exists()


def test_many_of_all(base: Path, tmp_path: Path) -> None:
    """25,000 tensors with long names and 60,000 targets: what goes through one for each of the other takes hours."""
    dots = "a." * 80
    name = f"{PREFIX}{dots}%d.lora_%s.weight"
    header: dict[str, Any] = {
        name % (i, part): {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * (2 * i + at), 4 * (2 * i + at) + 4]}
        for i in range(12_500)
        for at, part in enumerate("AB")
    }
    text = json.dumps(header).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * len(header)))
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": [f"x{i}" for i in range(60_000)],
        "target_parameters": [f"x{i}.weight" for i in range(3_000)],
        "modules_to_save": [f"m{i}" for i in range(10_000)],
        "rank_pattern": {f"q{i}": 2 for i in range(5_000)},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    looked_at(tmp_path, base)
