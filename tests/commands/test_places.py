"""A run is opened from any folder, and after it was moved: relative names lead where they led when it was started."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.config import load_config, parse_config
from deltaw.config.places import STARTED, placed, record, roots
from tests.test_cli import call
from tests.tiny import run_file

NAMES = {
    "base": "models/base",
    "data": {"train": "rows.jsonl", "eval": "more/held.jsonl", "template": "own.jinja"},
    "evaluate": {"general": "general.txt"},
}


def paths_of(config) -> list[str]:
    return [config.base, config.data.train, config.data.eval, config.data.template, config.evaluate.general]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with all that NAMES names, and a run of it (of which only what is read here exists)."""
    project = tmp_path / "project"
    (project / "models/base").mkdir(parents=True)
    (project / "more").mkdir()
    for name in ("rows.jsonl", "more/held.jsonl", "own.jinja", "general.txt"):
        (project / name).write_text("x")
    return project


def started(project: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    run = Path(output)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(parse_config({**NAMES, "output": output}).to_yaml())
    record(run)
    return run.absolute()


def local(run: Path) -> list[Path]:
    return [Path(path).resolve() for path in paths_of(placed(load_config(run / "config.yaml"), run))]


def wanted(project: Path) -> list[Path]:
    names = ("models/base", "rows.jsonl", "more/held.jsonl", "own.jinja", "general.txt")
    return [(project / name).resolve() for name in names]


@settings(max_examples=30)
@given(depth=st.integers(0, 3), absolute=st.booleans(), moved=st.sampled_from(["no", "project", "run"]))
def test_every_name_leads_to_its_file(tmp_path_factory, depth: int, absolute: bool, moved: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        top = tmp_path_factory.mktemp("places")
        project = top / "project"
        (project / "models/base").mkdir(parents=True)
        (project / "more").mkdir()
        for name in ("rows.jsonl", "more/held.jsonl", "own.jinja", "general.txt"):
            (project / name).write_text("x")
        output = "/".join(["deep"] * depth + ["run"])
        run = started(project, str(project / output) if absolute else output, monkeypatch)
        assert paths_of(placed(load_config(run / "config.yaml"), run)) == paths_of(load_config(run / "config.yaml"))
        if moved == "project":
            project = project.rename(top / "elsewhere")
            run = project / output
        elif moved == "run":
            run = run.rename(top / "taken away")
        monkeypatch.chdir("/")
        assert local(run) == wanted(project)
        monkeypatch.chdir(run)
        assert local(Path(".")) == wanted(project)


def test_a_run_taken_along_with_its_data(project: Path, tmp_path: Path, monkeypatch) -> None:
    run = started(project, "runs/first", monkeypatch)
    monkeypatch.chdir("/")
    new = tmp_path / "usb"
    new.mkdir()
    for path in (run, *(path for path in project.iterdir() if path.name != "runs")):
        shutil.move(path, new)
    shutil.rmtree(project)
    assert local(new / "first") == wanted(new)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"folder": 3}', '{"folder": "relative"}', "\0"])
def test_a_run_that_recorded_nothing_is_told_by_its_output(project: Path, monkeypatch, damage: str) -> None:
    run = started(project, "runs/first", monkeypatch)
    (run / STARTED).write_text(damage)
    monkeypatch.chdir("/")
    assert local(run) == wanted(project)
    (run / STARTED).unlink()
    assert local(run) == wanted(project)


def test_what_is_no_relative_path_stays(project: Path, monkeypatch) -> None:
    run = started(project, "runs/first", monkeypatch)
    monkeypatch.chdir("/")
    fields = {"base": "builtin:smollm2-135m", "data": {"train": "org/set", "eval": 5, "template": "chatml"}}
    config = parse_config({**fields, "output": "runs/first"})
    (project / "chatml").write_text("x")  # a word here, whatever lies there
    assert placed(config, run).model_copy(update={"output": config.output}) == config
    assert roots(config, run)[0] == project


def test_verbs_open_a_run_from_anywhere(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """A run by relative names is measured, asked, resumed and reported from another folder; then what it needs goes."""
    for name in ("base", "train.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    raw = run_file(tmp_path, base="base", data={"train": "train.jsonl", "eval": 4}, output="runs/first")
    raw["train"] |= {"steps": 2, "eval_every": None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(tmp_path)
    assert call("train", "run.yaml")[0] == 0
    run = tmp_path / "runs/first"
    written = (run / "config.yaml").read_bytes()
    here = json.loads(call("eval", "runs/first", "--json")[1])
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    there = json.loads(call("eval", run, "--json")[1])
    assert {**there, "model": ""} == {**here, "model": ""}
    for verb in (["generate", run, "say 3 ", "--max-tokens", 1], ["inspect", run], ["export", run, "--to", "peft"]):
        code, _, err = call(*verb, *(["-o", "out"] if verb[0] == "export" else []))
        assert code == 0, err
    assert call("generate", run / "adapter", "say 3 ", "--max-tokens", 1)[0] == 0  # its run knows where its base lies
    code, _, err = call("generate", "out", "x")  # an exported one names the base and no folder of this machine
    assert code == 2 and "'base'" in err and "--base" in err

    (run / "result.json").unlink()  # as if it had been stopped: it resumes from here, and stays a run of over there
    code, _, err = call("train", run)
    assert code == 0 and (run / "config.yaml").read_bytes() == written, err

    os.rename(tmp_path / "train.jsonl", tmp_path / "gone")
    code, _, err = call("eval", run)
    assert code == 2 and str(tmp_path) in err and "train.jsonl" in err
    os.rename(tmp_path / "base", tmp_path / "moved")
    for verb in (["generate", run, "x"], ["merge", run, "-o", "merged"]):
        code, _, err = call(*verb)
        assert code == 2 and str(tmp_path) in err and "--base" in err
    rich = (run / "report.html").read_bytes()
    code, _, err = call("inspect", run)
    assert code == 2 and "--base" in err and (run / "report.html").read_bytes() == rich
    for _ in range(2):  # a poor page is replaced by another one
        assert call("inspect", run, "-o", tmp_path / "poor.html")[0] == 0
    assert "measured without" in (tmp_path / "poor.html").read_text()
