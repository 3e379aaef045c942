"""`deltaw merge` from the command line, on a tiny run."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.test_cli import call
from tests.tiny import run_file, tiny_base, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    evaluate = {"general": None, "report": False, "samples": 0}
    raw = run_file(folder, train={**run_file(folder)["train"], "steps": 3}, evaluate=evaluate)
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    assert call("train", folder / "run.yaml", "--json")[0] == 0
    return folder


def test_help_has_an_example() -> None:
    assert call("merge", "-h") == call("merge", "--help")
    code, out, _ = call("merge", "--help")
    assert code == 0 and "deltaw merge" in out.split("Example")[-1]


def test_a_run_becomes_a_model_that_transformers_loads(folder: Path) -> None:
    code, out, err = call("merge", folder / "run", "-o", folder / "merged")
    assert code == 0 and str(folder / "merged") in out
    assert "14 changed" in err and "cosine" in err  # said before the folder is there
    assert AutoModelForCausalLM.from_pretrained(folder / "merged") and AutoTokenizer.from_pretrained(folder / "merged")
    assert (folder / "merged/README.md").is_file()
    code, _, err = call("merge", folder / "run", "-o", folder / "merged")
    assert code == 2 and "--replace" in err
    again = ["merge", folder / "run/adapter", "--base", folder / "base", "-o", folder / "merged", "--replace"]
    code, out, err = call(*again, "--json")
    result = json.loads(out)
    assert code == 0 and err == "" and result["fates"]["changed"] == 14
    assert {row["fate"] for row in result["tensors"]} == {"changed", "copied"}
    assert len(result["survival"]["modules"]) == 14 and 0 < result["survival"]["cosine"] <= 1


def test_what_is_refused(folder: Path) -> None:
    assert call("merge", folder / "run", "-o", folder / "x", "--dtype", "int3")[0] == 2
    assert call("merge", folder / "nothing", "-o", folder / "x")[0] == 2
    assert call("merge", folder / "run", "-o", folder / "x", "--base", folder / "train.jsonl")[0] == 2
    assert not (folder / "x").exists()
