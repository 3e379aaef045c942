"""Every command line that deltaw prints can be pasted: run as a shell reads it, in folders with odd names."""

import ast
import json
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.cli.app import app
from deltaw.errors import command
from tests.test_cli import call
from tests.tiny import run_file, sums, tiny_base, words

ROOT = Path(__file__).parents[1] / "deltaw"
AWKWARD = 'it\'s (2) $HOME & "more"'
VERBS = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), max_size=3))
def test_a_shell_reads_the_words_back(given: list[str]) -> None:
    line = command("generate", *given, options=["--chat"])
    shown = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    read = shown.decode().split("\0")[:-1]
    assert read[:3] == ["deltaw", "generate", "--chat"] and [word for word in read[3:] if word != "--"] == [
        word for word in given if word != "--"
    ]


def test_no_command_line_is_put_together_by_hand() -> None:
    """An f-string that goes on after `deltaw VERB` with a value: `errors.command` is for that."""
    by_hand = re.compile(rf"\bdeltaw ({'|'.join(VERBS)})\b[^`]* $")
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for before, value in pairwise(parts):
                text = before.value if isinstance(before, ast.Constant) else ""
                if isinstance(value, ast.FormattedValue) and by_hand.search(str(text)):
                    wrong.append(f"{path.relative_to(ROOT)}:{value.lineno}")
    assert wrong == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("printed") / AWKWARD
    folder.mkdir()
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    (folder / "run.yaml").write_text(
        yaml.safe_dump({**run_file(folder, base="base"), "data": {"train": "train.jsonl", "eval": 8}})
    )
    return folder


def printed(text: str) -> list[list[str]]:
    """The arguments of each command line in `text`, as a shell would read them; what follows three blanks is prose."""
    lines = [match.split("   ")[0] for match in re.findall(rf"\bdeltaw (?:{'|'.join(VERBS)})\b.*", text)]
    return [shlex.split(line)[1:] for line in lines]


def test_what_is_printed_runs(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    code, out, err = call("train", "run.yaml", "output=-run (2)'s")  # a name that begins like an option
    assert code == 0, err
    assert [line[0] for line in printed(out)] == ["chat", "eval", "generate"]
    for line in printed(out):
        assert call(*line)[0] == 0, line
    sums(folder / "chats.jsonl")
    options = ("data.train=chats.jsonl", "data.eval=null", "train.eval_every=null", "evaluate.metrics=[]")
    code, out, err = call("train", "run.yaml", "output=chats", "train.steps=2", *options)
    assert code == 0, err
    assert [line[0] for line in printed(out)] == ["chat", "generate"]  # no row was held out to measure it on
    code, out, _ = call(*printed(out)[1], "--json")
    questions = [json.loads(line)["messages"][1]["content"] for line in Path("chats.jsonl").read_text().splitlines()]
    assert code == 0 and json.loads(out)["prompt"] in questions and json.loads(out)["form"] == "chat"

    code, _, err = call("train", "run.yaml", "output=-run (2)'s")  # finished: resume it, start over …
    (resume,) = printed(err)
    assert code == 2 and resume == ["train", "--", "-run (2)'s"]
    assert "is finished" in call(*resume)[2]  # the folder was found

    code, _, err = call("train", "run.yaml", "output=half done", "train.steps=2", "train.lr=1.0", "evaluate.metrics=[]")
    adapter = folder / "half done/adapter"
    (folder / "half done/result.json").unlink()
    for file in adapter.iterdir():
        file.unlink()
    code, _, err = call("resize", "half done", "--rank", 2, "-o", "small")
    (finish,) = printed(err)
    assert code == 2 and call(*finish)[0] == 0
