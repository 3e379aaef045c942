"""`deltaw export`: what it says, what it refuses, and that a folder is whole or not there."""

import json
from pathlib import Path

import pytest

import deltaw
from deltaw.commands.export import NAMES, export_named, form_of
from deltaw.errors import InputError
from deltaw.shipping.card import CARD
from deltaw.shipping.destination import Options, Written
from deltaw.shipping.peft import PeftAdapter
from deltaw.shipping.target import MARK
from tests.shipping.models import base_folder, random_adapter
from tests.test_cli import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    base_folder(folder / "base", intermediate_size=64)  # Q8_0 wants rows of a multiple of 32
    random_adapter(folder / "base").save(folder / "adapter")
    return folder


def run(folder: Path, *words: object) -> tuple[int, str, str]:
    return call("export", folder / "adapter", "--base", folder / "base", *words)


def test_json_says_what_was_written(folder: Path, tmp_path: Path) -> None:
    code, out, _ = run(folder, "--to", "vllm", "-o", tmp_path / "out", "--json")
    result = json.loads(out)
    assert code == 0 and result["to"] == "vllm" and result["max_lora_rank"] == 8 and result["pushed"] is None
    files = {p.relative_to(tmp_path / "out").as_posix(): p.stat().st_size for p in (tmp_path / "out").rglob("*")}
    assert files.pop(MARK) and result["files"] == files and CARD in files


def test_people_get_lines(folder: Path, tmp_path: Path) -> None:
    code, out, _ = run(folder, "--to", "vllm", "-o", tmp_path / "out")
    assert code == 0 and "--max-lora-rank 8" in out and str(tmp_path / "out") in out


def test_an_existing_folder_stays_unless_it_is_to_be_replaced(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "--to", "peft", "-o", tmp_path / "out")[0] == 0
    code, _, err = run(folder, "--to", "vllm", "-o", tmp_path / "out")
    assert code == 2 and "--replace" in err
    assert json.loads((tmp_path / "out" / MARK).read_text())["to"] == "peft"
    assert run(folder, "--to", "vllm", "-o", tmp_path / "out", "--replace")[0] == 0
    assert json.loads((tmp_path / "out" / MARK).read_text())["to"] == "vllm"


@pytest.mark.parametrize(
    "words",
    [
        ("--to", "tensorrt"),
        ("--to", "peft", "--type", "Q8_0"),
        ("--to", "peft", "--merged"),
        ("--to", "gguf", "--plain"),
        ("--to", "peft", "--plain"),
        ("--to", "peft", "--force"),
        ("--to", "gguf", "--force"),
        ("--to", "peft", "--public"),
        (),
    ],
)
def test_options_that_do_not_go_together(folder: Path, words: tuple[str, ...], tmp_path: Path) -> None:
    code, out, err = run(folder, *words, "-o", tmp_path / "out")
    assert code == 2 and not out and len(err.strip().splitlines()) <= 5 and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_all_of_them_are_said_at_once(folder: Path, tmp_path: Path) -> None:
    _, _, err = run(folder, "--to", "peft", "--type", "F16", "--plain", "--public", "-o", tmp_path / "out")
    assert all(option in err for option in ("--type", "--plain", "--public"))


def test_help_has_an_example_for_each_destination() -> None:
    code, out, _ = call("export", "--help")
    assert code == 0 and all(f"--to {name}" in out for name in NAMES)


def test_what_fails_while_it_is_written_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch) -> None:
    real = PeftAdapter.write

    def broken(self: PeftAdapter, *arguments: object) -> None:
        real(self, *arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(PeftAdapter, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        export_named(str(folder / "adapter"), "peft", str(tmp_path / "out"), base=str(folder / "base"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["peft", "vllm", "mlx"])
def test_the_size_that_is_asked_of_the_disk_is_enough(folder: Path, to: str, tmp_path: Path, monkeypatch) -> None:
    from deltaw.commands import export as command

    asked = []
    real = command.target

    def watched(*arguments: object, **options: object) -> object:
        asked.append(options["needed"])
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "target", watched)
    result = deltaw.export(folder / "adapter", to=to, output=tmp_path / "out", base=str(folder / "base"))
    assert sum(result["files"].values()) <= asked[0]


@pytest.mark.parametrize(("type_", "relation"), [("F16", "finetune"), ("Q8_0", "quantized")])
def test_a_merged_gguf_has_a_card_as_well(folder: Path, type_: str, relation: str, tmp_path: Path) -> None:
    code, out, _ = run(folder, "--to", "gguf", "--merged", "--type", type_, "-o", tmp_path / "out", "--json")
    result = json.loads(out)
    assert code == 0 and any(name.endswith(".gguf") for name in result["files"]) and result["type"] == type_
    text = (tmp_path / "out" / CARD).read_text()
    assert 'library_name: "gguf"' in text and "merged into the weights" in text
    written = Written("", more={"type": type_})
    assert form_of("gguf", Options(merged=True), written).relation == relation


def test_from_python_it_raises(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        deltaw.export(folder / "adapter", to="gguf", output=tmp_path / "out", plain=True)


@pytest.mark.parametrize("verb", ["export", "merge", "verify", "lint"])
def test_a_name_that_is_too_long_is_no_defect(verb: str, folder: Path, tmp_path: Path) -> None:
    """It was "a defect of deltaw", as the adapter and as the output."""
    adapter, base, name = str(folder / "adapter"), ("--base", str(folder / "base")), "x" * 300
    more = {"export": ("--to", "peft", "-o", str(tmp_path / "o")), "merge": ("-o", str(tmp_path / "o"))}
    calls = [(name, *more.get(verb, (adapter,) * (verb == "verify")))]
    if verb in more:
        calls.append((adapter, *more[verb][:-1], str(tmp_path / name), *base))
    for words in calls:
        code, out, err = call(verb, *words)
        assert code == 2 and "too long" in err and "defect" not in err and not out, err
    assert not list(tmp_path.iterdir())


def test_from_python_paths_are_paths_and_an_adapter_is_none(folder: Path, tmp_path: Path) -> None:
    result = deltaw.export(folder / "adapter", to="peft", output=tmp_path / "o", base=folder / "base")
    assert result["output"] == str(tmp_path / "o")
    assert deltaw.lint(tmp_path / "o", base=folder / "base").at("peft") == 0
    assert deltaw.verify(tmp_path / "o", folder / "adapter", base=folder / "base", prompts=2, tokens=2).agree
    with pytest.raises(TypeError, match="not Adapter"):
        deltaw.export(deltaw.Adapter.load(folder / "adapter"), to="peft", output=tmp_path / "p")
