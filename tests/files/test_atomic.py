"""Files and folders written whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from deltaw.errors import RunError
from deltaw.files import atomic
from deltaw.files.atomic import recover, replacing, replacing_folder, sweep, temporary_name, write_text_atomic


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_text_atomic(path, "old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    with pytest.raises(RunError, match="needs 7 bytes"), replacing(path, 7):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RunError, match="absent"):
        write_text_atomic(tmp_path / "absent" / "t", "x")


def filled(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


@pytest.mark.parametrize("earlier", [False, True])
def test_a_folder_takes_its_place_whole(tmp_path: Path, earlier: bool) -> None:
    final = tmp_path / "out"
    if earlier:
        filled(final, "old")
    with replacing_folder(final, fix="") as hidden:
        (hidden / "sub").mkdir()
        (hidden / "sub" / "file").write_text("new")
        (hidden / "sub" / "file").chmod(0o600)  # as the safetensors library leaves it
        assert final.exists() is earlier
    assert [path.relative_to(final).as_posix() for path in sorted(final.rglob("*"))] == ["sub", "sub/file"]
    assert stat.S_IMODE((final / "sub" / "file").stat().st_mode) == final.stat().st_mode & 0o666
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("failing", ["block", "settle", "rename"])
def test_a_folder_that_fails_leaves_what_was_there(tmp_path: Path, earlier: bool, failing: str, monkeypatch) -> None:
    final = tmp_path / "out"
    if earlier:
        filled(final, "old")
    renamed = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if to == final and path.name.endswith(".new.tmp"):
            raise OSError(28, "No space left on device")
        return renamed(path, to)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    if failing == "rename":
        monkeypatch.setattr(Path, "rename", refuse)
    if failing == "settle":
        monkeypatch.setattr(atomic, "fsync", full)
    with pytest.raises(KeyError if failing == "block" else RunError), replacing_folder(final, fix="") as hidden:
        (hidden / "file").write_text("new")
        if failing == "block":
            raise KeyError
    assert list(tmp_path.iterdir()) == ([final] if earlier else [])
    assert not earlier or (final / "file").read_text() == "old"


def test_what_a_kill_left_between_two_renames_is_put_back(tmp_path: Path) -> None:
    final, old, new = tmp_path / "out", tmp_path / ".out.old.tmp", tmp_path / ".out.new.tmp"
    filled(old, "old"), filled(new, "half")
    recover(final)
    assert list(tmp_path.iterdir()) == [final] and (final / "file").read_text() == "old"
    filled(old, "older")  # a kill after the second rename: the new one is there
    recover(final)
    assert list(tmp_path.iterdir()) == [final] and (final / "file").read_text() == "old"


def test_a_sweep_takes_temporaries_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    folder = filled(tmp_path / "folder", "x")
    temporary_name(folder / "weights").write_text("half")
    filled(temporary_name(folder / "step-1"), "half")
    os.symlink(tmp_path / "outside", temporary_name(folder / "link"))
    (folder / ".lock").write_text("1 here")
    (folder / "my.tmp").write_text("not ours")
    sweep(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "file", "my.tmp"]
    assert (tmp_path / "outside").exists()
    sweep(tmp_path / "none")
