"""Every verb that writes, at every place where nothing can be written: exit 2, the reason, no work, nothing left."""

import os
from pathlib import Path
from typing import Any

import pytest

from deltaw.cli.app import app
from deltaw.errors import RunError
from deltaw.files.atomic import replacing
from deltaw.files.output import check_writable, gib
from tests.faults.disk import can_mount, read_only, small_disk, with_mounts
from tests.test_cli import call

FOLDERS: dict[str, list[Any]] = {
    "resize": ["one", "--rank", 2],
    "scale": ["one", "--to", 0.5],
    "combine": ["one", "two"],
    "extract": ["full", "--rank", 2],
    "merge": ["one"],
    "export": ["one", "--to", "peft"],
    "study": ["rank"],
    "train": ["run.yaml"],
    "sweep": ["run.yaml", "train.lr=1e-3,2e-3"],
    "plan": ["run.yaml"],
}
FILES: dict[str, list[Any]] = {
    "inspect": ["one"],
    "compare": ["one", "two"],
    "verify": ["one", "two", "--prompts", 1],
}
WRITES_NOTHING = {"cache", "chat", "decompose", "doctor", "eval", "lint", "preview", "runs", "serve", "verify-resume"}
ELSEWHERE = {"demo", "generate"}  # a run like train's; a file with answers, held in its own tests


def refused(folder: Path, verb: str, output: Path) -> None:
    words = [
        folder / word if str(word) in ("one", "two", "full", "run.yaml") else word
        for word in {**FOLDERS, **FILES}[verb]
    ]
    option = [f"output={output}"] if verb in ("train", "plan") else ["-o", output]
    code, out, err = call(verb, *words, *option)
    assert code == 2 and not out and err.startswith("error:"), (
        verb,
        output,
        code,
        err,
    )  # nothing before it: no progress
    assert len(err.splitlines()) <= 5 and "defect" not in err


def test_every_verb_is_held_to_this() -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    verbs = {"eval" if verb == "evaluate" else verb for verb in verbs}
    assert verbs == {*FOLDERS, *FILES, *WRITES_NOTHING, *ELSEWHERE} & verbs


@pytest.mark.parametrize("verb", [*FOLDERS, *FILES])
def test_a_place_that_takes_nothing_is_refused_first(folder: Path, tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    places = [tmp_path / "file/x", tmp_path / ("x" * 300)]
    places += [tmp_path / "file", tmp_path / "full"] if verb in FOLDERS else [tmp_path / "full", tmp_path / "no/x.html"]
    if verb in ("plan", "study"):  # a run may be planned again, a study's page goes beside the others
        places = places[:2] if verb == "plan" else places[:3]
    before = sorted(tmp_path.rglob("*"))
    for place in places:
        refused(folder, verb, place)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not can_mount(), reason="this user may not mount")
def test_on_a_disk_that_can_only_be_read(folder: Path, tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "old").mkdir()
        read_only(tmp_path)
        for verb in (*FOLDERS, *FILES):
            refused(folder, verb, tmp_path / "new")
        for verb in FOLDERS:
            refused(folder, verb, tmp_path / "old")

    ended = with_mounts(work)
    assert ended.code == 0, ended.output


@pytest.mark.skipif(not can_mount(), reason="this user may not mount")
def test_a_full_disk_is_told_in_sizes_that_a_person_reads(folder: Path, tmp_path: Path) -> None:
    def work() -> None:
        disk = small_disk(tmp_path / "disk", "size=16k")
        code, _, err = call("resize", folder / "one", "-o", disk / "small", "--rank", 2)
        assert code == 1 and "are free" in err and "defect" not in err, err
        assert not list(disk.iterdir())  # nothing half-written

    ended = with_mounts(work)
    assert ended.code == 0, ended.output


def test_no_permission_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root, too
    with pytest.raises(Exception, match="permission") as refusal:
        check_writable(tmp_path / "new", "output new")
    assert refusal.value.exit_code == 2  # type: ignore[attr-defined]


def test_an_error_of_the_system_is_told_without_its_number(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="Is a directory") as refusal, replacing(tmp_path, 5) as temporary:
        temporary.write_bytes(b"12345")
    assert "Errno" not in str(refusal.value)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (900, "900 bytes"), (12_288, "12 KiB"), (20 << 20, "20 MiB"), (3 << 29, "1.5 GiB")],
)
def test_sizes(count: int, shown: str) -> None:
    assert gib(count) == shown


def test_a_pipe_or_a_device_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for verb in FILES:
        refused(folder, verb, pipe)
    with pytest.raises(RunError), replacing(pipe):
        pass
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
