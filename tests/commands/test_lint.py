"""`deltaw lint` from the command line: its exit codes, its JSON, its commands."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import deltaw
from tests.test_cli import call
from tests.tiny import run_file, tiny_base, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lint")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    none = {"general": None, "report": False, "samples": 0}
    (folder / "run.yaml").write_text(yaml.safe_dump(run_file(folder, evaluate=none)))
    assert call("train", folder / "run.yaml", "--quiet")[0] == 0
    return folder


def test_help_has_an_example() -> None:
    code, out, _ = call("lint", "--help")
    assert code == 0 and "deltaw lint" in out.split("Example")[-1]


def test_a_run(folder: Path) -> None:
    code, out, err = call("lint", folder / "run")
    assert code == 0, err
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[:6])
    assert lines["PEFT"] == lines["transformers"] == lines["vLLM"] == "loads" and lines["MLX"].startswith("refused")
    code, out, err = call("lint", folder / "run", "--json")
    said = json.loads(out)
    assert code == said["exit_code"] == 0 and said["form"] == "peft" and err == ""
    assert said["verdicts"]["peft"] == {"verdict": "loads", "findings": ["DW502"], "reads_it_as_it_is": True}


def test_the_exit_code_goes_by_what_was_asked(folder: Path, tmp_path: Path) -> None:
    assert call("lint", folder / "run", "--to", "peft,vllm")[0] == 0
    assert call("lint", folder / "run", "--to", "mlx")[0] == 1
    code, _, err = call("lint", folder / "run", "--to", "tgi")
    assert code == 2 and "vllm" in err
    for nothing in (tmp_path, tmp_path / "nowhere", "x" * 5000):
        code, _, err = call("lint", nothing)
        assert code == 2 and "defect" not in err
    assert call("lint", folder / "run", "--max-lora-rank", 3)[0] == 2


def test_a_broken_one_and_its_mend(folder: Path, tmp_path: Path) -> None:
    """What it says to do is done, and then it is right."""
    adapter = folder / "run/adapter"
    (tmp_path / "a").mkdir()
    for name in ("adapter_config.json", "deltaw.json"):
        (tmp_path / "a" / name).write_bytes((adapter / name).read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    broken = tmp_path / "a/adapter_model.safetensors"
    save_file({name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}, broken)
    code, out, _ = call("lint", tmp_path / "a", "--base", folder / "base")
    assert code == 1 and "DW201" in out and "base_model.model. in front" in out
    save_file(tensors, broken, {"format": "pt"})
    assert call("lint", tmp_path / "a", "--base", folder / "base")[0] == 0


def test_the_command_that_it_prints_mends(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    verdict = deltaw.lint(folder / "run", to=["mlx"])
    (found,) = verdict.shown
    verb, *arguments = found.mend.split()[1:]
    code, _, err = call(verb, *arguments)
    assert verdict.exit_code == 1 and code == 0, err
    assert deltaw.lint(tmp_path / "run-mlx", to=["mlx"], base=str(folder / "base")).exit_code == 0
