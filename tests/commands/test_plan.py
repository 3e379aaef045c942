"""deltaw plan: a table for people, one JSON object for programs, exit codes."""

import json
from pathlib import Path

import pytest
import yaml

from tests.test_cli import call
from tests.tiny import run_file, tiny_base, words


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    (folder / "run.yaml").write_text(yaml.safe_dump(run_file(folder)))
    return folder / "run.yaml"


def test_a_plan_is_a_table(file: Path) -> None:
    code, out, err = call("plan", file)
    assert code == 0 and "rehearsing" in err
    for part in (
        "memory",
        "at its peak",
        "time",
        "tokens/s",
        "disk",
        "free",
        "52 to train on",
        "held-out loss",
        "128 tokens",
    ):
        assert part in out
    assert all(len(line) <= 120 for line in out.splitlines())


def test_json_and_overrides(file: Path) -> None:
    code, out, _ = call("plan", file, "--json")
    one = json.loads(out)
    assert code == 0 and one["steps"] == 6 and one["data"]["train_rows"] == 52
    assert {"peak_memory_bytes", "tokens_per_second", "seconds", "disk_needed", "fit", "what_if"} <= one.keys()
    code, out, _ = call("plan", file, "--json", "train.steps=3", "train.tokens_per_batch=32")
    assert json.loads(out)["steps"] == 3 and json.loads(out)["longest_batch"] <= 32 < one["longest_batch"]


def test_mistakes_exit_with_2(file: Path, tmp_path: Path) -> None:
    for arguments in ([tmp_path / "no.yaml"], [file, "train.stepz=3"], [file, "base=nothing/here/at/all"]):
        code, out, err = call("plan", *arguments)
        assert code == 2 and not out and "error:" in err and "Traceback" not in err
