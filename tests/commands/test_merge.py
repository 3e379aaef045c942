"""`deltaw merge` from the command line, on a tiny run."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.test_cli import call


def test_a_run_becomes_a_model_that_transformers_loads(folder: Path, tmp_path: Path) -> None:
    code, out, err = call("merge", folder / "one", "-o", tmp_path / "merged")
    assert code == 0 and str(tmp_path / "merged") in out
    assert "14 changed" in err and "cosine" in err  # said before the folder is there
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged") and AutoTokenizer.from_pretrained(
        tmp_path / "merged"
    )
    assert (tmp_path / "merged/README.md").is_file()
    code, _, err = call("merge", folder / "one", "-o", tmp_path / "merged")
    assert code == 2 and "--replace" in err
    again = ["merge", folder / "one/adapter", "--base", folder / "base", "-o", tmp_path / "merged", "--replace"]
    code, out, err = call(*again, "--json")
    result = json.loads(out)
    assert code == 0 and err == "" and result["fates"]["changed"] == 14
    assert {row["fate"] for row in result["tensors"]} == {"changed", "copied"}
    assert len(result["survival"]["modules"]) == 14 and 0 < result["survival"]["cosine"] <= 1


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    assert call("merge", folder / "one", "-o", tmp_path / "x", "--dtype", "int3")[0] == 2
    assert call("merge", folder / "nothing", "-o", tmp_path / "x")[0] == 2
    assert call("merge", folder / "one", "-o", tmp_path / "x", "--base", folder / "train.jsonl")[0] == 2
    assert not (tmp_path / "x").exists()
