"""A run folder: claimed before it is touched, whole or replaced, and nothing left where nothing was begun."""

from pathlib import Path

import pytest

from deltaw.config import RunConfig, parse_config
from deltaw.errors import InputError
from deltaw.run import Run


def config(output: Path) -> RunConfig:
    return parse_config({"base": "b", "data": {"train": "t.jsonl"}, "output": str(output)})


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    Run.check(config(tmp_path / "a/b/run"))
    assert not any(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    Run.check(config(tmp_path / "a/b/run"))
    assert not any((tmp_path / "a").iterdir())


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    Run.check(config(tmp_path / "run"))
    assert (tmp_path / "run").is_dir()


def test_what_a_killed_process_was_writing_is_no_run_and_no_stranger(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / ".config.yaml.0123456789abcdef.tmp").write_text("half a con")
    (run.folder / ".lock").write_text("1 elsewhere")
    (run.folder / ".earlier.0123456789abcdef.tmp").mkdir()
    (run.folder / ".earlier.0123456789abcdef.tmp/result.json").write_text("{}")
    with run.claimed(new=True):
        assert {path.name for path in run.folder.iterdir()} == {".lock"}
        run.create(config(run.folder))
    assert {path.name for path in run.folder.iterdir()} == {"config.yaml", "started.json", ".lock"}


def test_replacing_takes_all_that_was_there(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.claimed(new=True):
        run.create(config(run.folder))
    for name in ("adapter", "checkpoints/step-000001"):
        (run.folder / name).mkdir(parents=True)
    run.result.write_text("{}")
    with pytest.raises(InputError, match="already holds a run"):
        Run.check(config(run.folder))
    with run.claimed(new=True, replace=True):
        run.create(config(run.folder))
    assert {path.name for path in run.folder.iterdir()} == {"config.yaml", "started.json", ".lock"}


@pytest.mark.parametrize("new", [True, False], ids=["new", "begun"])
@pytest.mark.parametrize("there", [["notes.md"], [".bashrc"], ["data/rows.jsonl"], ["started.json", "notes.md"]])
def test_a_folder_that_is_not_a_run_is_never_touched(tmp_path: Path, there: list[str], new: bool) -> None:
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="isn't a run"), Run(tmp_path).claimed(new=new, replace=True):
        pass
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / name for name in there}


def test_a_folder_with_a_config_of_somebody_elses_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(InputError, match="nothing says that deltaw wrote it"):
        Run.check(config(tmp_path), replace=True)
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_replacing_a_run_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.claimed(new=True):
        run.create(config(run.folder), {"data/train.jsonl": "{}"})
    own = [*run.folder.glob("[!.]*"), run.folder / "result.step-000120.json", run.report, run.lineage]
    for path in (*own[3:], run.folder / "notes.md", run.folder / ".backup.tmp", run.folder / "result.step-x.json"):
        path.write_text("mine")
    with run.claimed(new=True, replace=True):
        run.create(config(run.folder))
    left = {"config.yaml", "started.json", ".lock", "notes.md", ".backup.tmp", "result.step-x.json"}
    assert {path.name for path in run.folder.iterdir()} == left


def test_a_run_that_was_killed_at_its_birth_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "run")
    with monkeypatch.context() as patch, run.claimed(new=True):
        patch.setattr(Run, "write_config", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.create(config(run.folder), {"data/train.jsonl": "{}"})
    for new in (True, False):
        with run.claimed(new=new):
            pass
    with run.claimed(new=True):
        run.create(config(run.folder))
    assert run.config.is_file()


def test_only_what_can_go_on_is_resumable(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(InputError, match=r"config\.yaml"):
        run.check_resumable()
    with run.claimed(new=True):
        run.create(config(run.folder))
        with pytest.raises(InputError, match="in use by process"):
            run.check_resumable()
    run.check_resumable()
    run.result.write_text("{}")
    with pytest.raises(InputError, match="finished"):
        run.check_resumable()


def test_metrics_are_cut_by_the_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in range(5):
        run.append_metrics({"step": step})
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    assert run.cut_metrics(3) == 0
    assert [line["step"] for line in run.read_metrics()] == [0, 1, 2]
    assert run.cut_metrics(7) == 4
    assert [line["step"] for line in run.read_metrics()] == [0, 1, 2]
