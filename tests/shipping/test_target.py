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


def test_what_a_user_put_beside_what_was_written_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    (tmp_path / "out/notes").mkdir()
    (letter := tmp_path / "out/notes/letter").write_text("dear")
    with pytest.raises(InputError, match="notes/letter, which deltaw didn't write"):
        write(tmp_path / "out", "two", replace=True)
    assert letter.read_text() == "dear"
    letter.unlink()
    write(tmp_path / "out", "three", replace=True)
    assert (tmp_path / "out/file").read_text() == "three"


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


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    for text in ("two", "three"):
        write(tmp_path / "link", text, replace=True)
        assert (tmp_path / "real/file").read_text() == text
    (tmp_path / "ahead").symlink_to("later")
    write(tmp_path / "ahead", "four")
    assert (tmp_path / "later/file").read_text() == "four"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ahead", "later", "link", "real"]


def test_links_in_a_circle_and_no_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for output in (str(tmp_path / "a"), ""):
        with pytest.raises(InputError), target(output, what=WHAT, needed=0):
            raise AssertionError("not reached")


def test_what_it_is_made_of_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "base", "one")
    (tmp_path / "link").symlink_to("base")
    for source in (tmp_path / "base", tmp_path / "link", tmp_path / "base/file"):
        with (
            pytest.raises(InputError, match="made from"),
            target(tmp_path / "base", what=WHAT, needed=0, replace=True, sources=[source]),
        ):
            raise AssertionError("not reached")
    assert (tmp_path / "base/file").read_text() == "one"
