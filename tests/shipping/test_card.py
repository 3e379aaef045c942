"""The model card: what the hub reads of it, that its code answers as deltaw does, that nothing private is in it."""

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from deltaw.adapter.file import Adapter
from deltaw.adapter.history import History
from deltaw.commands.export import export_named
from deltaw.config import parse_config
from deltaw.model import open_model
from deltaw.shipping.card import Form, card
from deltaw.shipping.trained import open_trained
from deltaw.shipping.usage import QUESTION, transformers_usage
from deltaw.training.run import train
from tests.shipping.models import base_folder, random_adapter
from tests.tiny import Said, run_file, tiny_base, words


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run in a folder whose name is nobody's business."""
    folder = tmp_path_factory.mktemp("private")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    evaluate = {"metrics": ["exact_match"], "max_new_tokens": 4, "general": "builtin:general", "report": True}
    train(parse_config(run_file(folder, evaluate=evaluate)), display=Said())
    return folder / "run"


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> tuple[Path, Path]:
    """(an adapter trained through the chat template, its base)"""
    folder = tmp_path_factory.mktemp("chat")
    base = base_folder(folder / "base", "qwen2")
    random_adapter(base).save(folder / "adapter")
    return folder / "adapter", base


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---")[1])
    return found


def shipped(name: Path, to: str, output: Path, base: Path | None = None) -> str:
    export_named(str(name), to, str(output), base=str(base) if base else None)
    return (output / "README.md").read_text()


def ran(text: str, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the card's Python prints, run as it stands in its folder, but for the base's place."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert f'"{base.name}"' in code or "base" not in code
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace(f'"{base.name}"', repr(str(base))), {})
    return printed.getvalue().strip()


def test_it_says_what_data_and_figures(run: Path, tmp_path: Path) -> None:
    text = shipped(run, "peft", tmp_path / "out")
    for part in ("LoRA, rank 4, alpha 8", "train.jsonl, 52 rows", "0.01", "8 held-out rows", "| loss |", "exact match",
                 "general text", "builtin:general", "(report.html)", "deltaw"):  # fmt: skip
        assert part in text, part
    head = front(text)
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-generation" and "lora" in head["tags"]
    assert "base_model" not in head  # a folder's name is no repository
    assert (tmp_path / "out/report.html").is_file()


def test_nothing_of_the_machine_is_in_it(run: Path, tmp_path: Path) -> None:
    for to in ("peft", "vllm", "mlx"):
        shipped(run, to, tmp_path / to)
        for file in (tmp_path / to).rglob("*"):
            assert str(run.parent).encode() not in file.read_bytes(), file.name
    assert str(run.parent) in (run / "report.html").read_text()  # or there would be nothing to take out


def test_the_hub_takes_its_front_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base on the hub is named with its relation."""
    base = base_folder(tmp_path / "base")
    adapter = random_adapter(base, "dora")
    object.__setattr__(adapter, "base", type(adapter.base)("some-org/some-model", "abc123"))
    adapter.save(tmp_path / "adapter")
    text = shipped(tmp_path / "adapter", "peft", tmp_path / "out", base)
    head = front(text)
    assert head["base_model"] == "some-org/some-model" and head["base_model_relation"] == "adapter"
    assert "dora" in head["tags"] and 'revision="abc123"' in text
    assert ModelCard(text).data.to_dict()["base_model"] == "some-org/some-model"
    trained = open_trained(tmp_path / "adapter", base=str(base))
    assert front(card(trained, Form("quantized", "gguf"), ""))["base_model_relation"] == "quantized"


def test_an_adapter_without_a_run_has_a_card(chat: tuple[Path, Path], tmp_path: Path) -> None:
    text = shipped(chat[0], "peft", tmp_path / "out", chat[1])
    assert "rank 3" in text and "## Figures" not in text and not (tmp_path / "out/report.html").exists()


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_its_code_answers_as_deltaw_does(chat: tuple[Path, Path], to: str, tmp_path: Path, monkeypatch) -> None:
    if to == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx_lm is not installed")
        patched_for_mlx(chat[1])
    adapter, base = chat
    text = shipped(adapter, to, tmp_path / "out", base)
    model = open_model(adapter, base=str(base), dtype="float32", device="cpu")
    wanted = model.generate([{"role": "user", "content": QUESTION}], max_new_tokens=64, temperature=0)
    assert ran(text, tmp_path / "out", base, monkeypatch) == wanted.strip() != ""


def patched_for_mlx(base: Path) -> None:
    """Its class for Qwen 2 wants a field that transformers 5 moved."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"rope_theta": config["rope_parameters"]["rope_theta"], **config}))


def test_the_code_for_plain_prompts_answers_as_deltaw_does(run: Path, tmp_path: Path, monkeypatch) -> None:
    text = shipped(run, "peft", tmp_path / "out")
    assert "apply_chat_template" not in text
    wanted = open_model(run).generate(QUESTION, max_new_tokens=64, temperature=0)
    assert ran(text, tmp_path / "out", run.parent / "base", monkeypatch) == wanted.strip()


def test_the_code_for_a_merged_model_runs(chat: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    """On the base itself, which is a merged model of nothing."""
    trained = open_trained(chat[0], base=str(chat[1]))
    text = transformers_usage(trained)
    model = open_model(chat[1], dtype="float32", device="cpu")
    wanted = model.generate([{"role": "user", "content": QUESTION}], max_new_tokens=64, temperature=0)
    assert ran(text, chat[1], chat[1], monkeypatch) == wanted.strip()


def test_code_in_a_card_survives_a_bases_name(chat: tuple[Path, Path], tmp_path: Path) -> None:
    """Quotes and blanks in the name of a folder broke the card's Python and its shell line."""
    adapter, base = chat
    named = tmp_path / 'my "base" é'
    shutil.copytree(base, named)
    for to in ("peft", "mlx"):
        text = shipped(adapter, to, tmp_path / to, named)
        (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
        assert named.name in {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    (lines,) = re.findall(r"```sh\n(.*?)curl", shipped(adapter, "vllm", tmp_path / "vllm", named), re.S)
    assert shlex.split(lines.replace("\\\n", ""))[:3] == ["vllm", "serve", named.name]


def test_it_tells_which_adapters_it_goes_back_to_and_the_folder_keeps_that(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    first = History(name="first", fingerprint="sha256:0123456789abcdef0123", steps=70, data="words.jsonl")
    second = History(name="second", steps=80, started_from=first)
    history = History(steps=20, extended_after=(12,), started_from=second)
    replace(Adapter.load(copy / "adapter"), history=history).save(copy / "adapter")
    text = shipped(copy, "peft", tmp_path / "out")
    for part in ("extended after step 12", "second (80 steps)", "first (sha256:0123456789ab, 70 steps on words.jsonl)"):
        assert part in text, part
    assert Adapter.load(tmp_path / "out").history == history
    assert "started from" not in shipped(run, "peft", tmp_path / "plain")
