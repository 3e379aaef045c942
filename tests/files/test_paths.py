"""`~` and variables in paths: expanded in every field and option that names a file, never a folder of that name."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import assume
from hypothesis import given as examples
from hypothesis import strategies as st

from deltaw.config import RunConfig, load_config, parse_config
from deltaw.errors import InputError, command
from deltaw.files.paths import expand, given, written
from tests.test_cli import call
from tests.tiny import run_file, tiny_base, words

FIELDS = [("base",), ("output",), ("data", "train"), ("data", "eval"), ("data", "template"), ("evaluate", "general")]


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home$X"))  # a dollar sign in a value is only itself
    monkeypatch.setenv("PLACE", "/some/place")
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.setenv("EMPTY", "")


def config(field: tuple[str, ...], value: str) -> RunConfig:
    raw: dict = {"base": "b", "data": {"train": "t"}, "output": "o"}
    section = raw.setdefault(field[0], {}) if len(field) == 2 else raw
    section[field[-1]] = value
    return parse_config(raw)


def value(run: RunConfig, field: tuple[str, ...]) -> object:
    found: object = run
    for name in field:
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("field", FIELDS, ids=".".join)
def test_every_field_that_names_a_file_is_expanded(field: tuple[str, ...]) -> None:
    home = os.environ["HOME"]
    for text, meant in {
        "~/x": f"{home}/x", "~": home, "$HOME/x": f"{home}/x", "${PLACE}/x": "/some/place/x",
        "a/$PLACE": "a//some/place",
        "$$PLACE/x": "$PLACE/x", "5$": "5$", "a~b/~": "a~b/~", "./~": "./~", "builtin:general": "builtin:general",
        "org/name": "org/name",
    }.items():  # fmt: skip
        run = config(field, text)
        assert value(run, field) == meant
        assert parse_config(yaml.safe_load(run.to_yaml())) == run  # what is recorded means the same again
    for text, name in {
        "$UNSET/x": "UNSET",
        "${UNSET}": "UNSET",
        "$EMPTY": "EMPTY",
        "~nobody_here/x": "~nobody_here",
    }.items():
        with pytest.raises(InputError, match=f"{'.'.join(field)}: .*{name}"):
            config(field, text)


@examples(st.text())
def test_what_is_written_reads_as_itself(path: str) -> None:
    assume(not path.startswith("~"))  # which stands for a home, or is nobody's and refused
    assert expand(written(path)) == path


def test_on_the_command_line_what_exists_is_meant(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$UNSET").mkdir()
    assert given("$UNSET") == "$UNSET" and given(Path("~/a")) == Path(os.environ["HOME"], "a")
    assert given(["~", "b"]) == [os.environ["HOME"], "b"] and given(None) is None
    with pytest.raises(ValueError, match="UNSET"):
        given("$UNSET/none")
    assert command("eval", Path("./~/run")) == "deltaw eval './~/run'"


def test_no_verb_makes_a_folder_of_that_name(tmp_path: Path, monkeypatch) -> None:
    home = Path(os.environ["HOME"])
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    tiny_base(home / "base")
    words(home / "rows.jsonl")
    file = run_file(tmp_path, base="~/base", data={"train": "$HOME/rows.jsonl", "eval": 2}, output="~/runs/one")
    (home / "run.yaml").write_text(yaml.safe_dump(file))
    code, _, err = call("train", "~/run.yaml", "train.steps=2")
    assert code == 0, err
    recorded = load_config(home / "runs/one/config.yaml")
    assert (recorded.output, recorded.data.train) == (str(home / "runs/one"), str(home / "rows.jsonl"))
    for verb in (
        ["inspect", "~/runs/one", "--output=~/page.html"],
        ["resize", "~/runs/one", "--rank", 2, "--output=$HOME/small"],
        ["combine", "~/runs/one", "~/small", "--output=~/both"],
        ["scale", "~/runs/one", "--to", 0.5, "--output=~/half"],
        ["compare", "~/runs/one", "~/small", "--output=~/c.html"],
        ["eval", "~/runs/one", "~/rows.jsonl", "--rows", 2, "--base=~/base"],
    ):
        code, _, err = call(*verb)
        assert code == 0, (verb, err)
    assert {path.name for path in tmp_path.iterdir()} == {home.name}
    assert {path.name for path in home.iterdir()} >= {"page.html", "small", "both", "half", "c.html"}
    code, _, err = call("resize", "~/runs/one", "--rank", 2, "--output=$UNSET/small")
    assert code == 2 and "UNSET" in err
