"""A folder under its final name is whole or not there; nothing that deltaw didn't write is replaced."""

import json
from pathlib import Path

import pytest

from deltaw.errors import InputError, RunError
from deltaw.shipping.target import MARK, target

WHAT = {"kind": "test"}


def write(output: Path, text: str, *, replace: bool = False) -> None:
    with target(output, what=WHAT, needed=10, replace=replace) as folder:
        (folder / "file").write_text(text)


def test_it_is_whole_and_says_what_it_is(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out", "one")
    assert (tmp_path / "deep/out/file").read_text() == "one"
    assert json.loads((tmp_path / "deep/out" / MARK).read_text())["kind"] == "test"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_what_fails_leaves_nothing_and_what_was_there_stays(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    for output in ("new", "out"):
        with pytest.raises(KeyboardInterrupt), target(tmp_path / output, what=WHAT, needed=0, replace=True) as folder:
            (folder / "file").write_text("two")
            raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/file").read_text() == "one"


def test_an_existing_folder_is_replaced_only_if_asked_for_and_deltaws(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(InputError):
        write(tmp_path / "out", "two")
    write(tmp_path / "out", "three", replace=True)
    assert (tmp_path / "out/file").read_text() == "three"
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter").write_text("dear")
    with pytest.raises(InputError):
        write(tmp_path / "home", "four", replace=True)
    assert (tmp_path / "home/letter").read_text() == "dear"


def test_what_a_killed_process_moved_away_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    (tmp_path / "out").rename(tmp_path / ".out.old.tmp")
    with pytest.raises(InputError):
        write(tmp_path / "out", "two")
    assert (tmp_path / "out/file").read_text() == "one"


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunError), target(tmp_path / "out", what=WHAT, needed=1 << 60):
        raise AssertionError("not reached")
    assert not list(tmp_path.iterdir())
