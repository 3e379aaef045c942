"""`deltaw lint` from the command line: its exit codes, its JSON, its commands."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import deltaw
from tests.test_cli import call


def test_a_run(folder: Path) -> None:
    code, out, err = call("lint", folder / "one")
    assert code == 0, err
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[:6])
    assert lines["PEFT"] == lines["transformers"] == lines["vLLM"] == "loads" and lines["MLX"].startswith("refused")
    code, out, err = call("lint", folder / "one", "--json")
    said = json.loads(out)
    assert code == said["exit_code"] == 0 and said["form"] == "peft" and err == ""
    assert said["verdicts"]["peft"] == {"verdict": "loads", "findings": ["DW502"], "reads_it_as_it_is": True}


def test_the_exit_code_goes_by_what_was_asked(folder: Path, tmp_path: Path) -> None:
    assert call("lint", folder / "one", "--to", "peft,vllm")[0] == 0
    assert call("lint", folder / "one", "--to", "mlx")[0] == 1
    code, _, err = call("lint", folder / "one", "--to", "tgi")
    assert code == 2 and "vllm" in err
    for nothing in (tmp_path, tmp_path / "nowhere", "x" * 5000):
        code, _, err = call("lint", nothing)
        assert code == 2 and "defect" not in err
    assert call("lint", folder / "one", "--max-lora-rank", 3)[0] == 2


def test_a_broken_one_and_its_mend(folder: Path, tmp_path: Path) -> None:
    """What it says to do is done, and then it is right."""
    adapter = folder / "one/adapter"
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
    verdict = deltaw.lint(folder / "one", to=["mlx"])
    (found,) = verdict.shown
    verb, *arguments = found.fix.split()[1:]
    code, _, err = call(verb, *arguments)
    assert verdict.exit_code == 1 and code == 0, err
    assert deltaw.lint(tmp_path / "one-mlx", to=["mlx"], base=str(folder / "base")).exit_code == 0
