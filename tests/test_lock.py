"""The lock: one owner, named; free again the moment its owner is gone."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deltaw.errors import InputError
from deltaw.lock import locked

ME = f"{os.getpid()} {socket.gethostname()}"


def test_it_names_its_owner_and_lets_go(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with locked(file, "output x"):
        assert file.read_text().strip() == ME
        with (
            pytest.raises(InputError, match=rf"output x is in use by process {os.getpid()} on "),
            locked(file, "output x"),
        ):
            pass
    with locked(file, "output x"):
        pass
    assert file.read_text() == ""


def test_an_error_inside_lets_go_and_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), locked(tmp_path / "lock", "x"):
        raise OSError("disk")
    with locked(tmp_path / "lock", "x"):
        pass


def test_a_killed_owner_leaves_nothing_to_recover(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from pathlib import Path; from deltaw.lock import locked\n"
        "with locked(Path(sys.argv[1]), 'x'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")])
    assert done.returncode == -9 and (tmp_path / "lock").read_text()
    with locked(tmp_path / "lock", "x"):
        assert (tmp_path / "lock").read_text().strip() == ME


def test_a_folder_that_takes_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x: can't be written to"), locked(tmp_path / "none" / "lock", "x"):
        pass


@pytest.mark.parametrize(
    ("owner", "free"),
    [("", True), ("no lock", True), ("999999999 {host}", True), ("{parent} {host}", False), ("5 elsewhere", False)],
)
def test_without_flock_what_the_file_says_decides(tmp_path: Path, monkeypatch, owner: str, free: bool) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "lock").write_text(owner.format(host=socket.gethostname(), parent=os.getppid()))
    if free:
        with locked(tmp_path / "lock", "x"):
            assert (tmp_path / "lock").read_text().strip() == ME
    else:
        with pytest.raises(InputError, match="in use"), locked(tmp_path / "lock", "x"):
            pass
