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
from deltaw.files.lock import claimed_file, locked, new_folder

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
        "import sys, os, signal; from pathlib import Path; from deltaw.files.lock import locked\n"
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


CLAIM = """
import os, random, signal, sys, time
from pathlib import Path
from deltaw.errors import InputError
from deltaw.files.lock import new_folder
target, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "kill":
    with new_folder(target):
        (target / ".mine.0123456789abcdef.tmp").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
entered = turn = 0
until = time.monotonic() + 60
while turn < 150 or (not entered and time.monotonic() < until):  # each gets its turn, however busy the machine is
    turn += 1
    try:
        with new_folder(target) as folder:
            (folder / "mine").open("x").close()  # FileExistsError where another is inside
            entered += 1
            raise KeyboardInterrupt
    except (InputError, KeyboardInterrupt):
        pass
print(entered)
"""


def test_a_claimed_folder_is_refused_to_others_and_left_clean(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with new_folder(target) as folder:
        with pytest.raises(InputError, match="in use by process"), new_folder(target):
            pass
        (folder / "weights").write_text("w")
    assert [path.name for path in target.iterdir()] == ["weights"]
    with pytest.raises(InputError, match="exists already"), new_folder(target):
        pass
    assert (target / "weights").read_text() == "w"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("there", [False, True])
def test_a_claim_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException], there: bool) -> None:
    target = tmp_path / "a" / "out"
    if there:
        target.mkdir(parents=True)
    with pytest.raises(error), new_folder(target) as folder:
        (folder / "half").mkdir()
        (folder / "half" / "weights").write_text("w")
        raise error
    assert list(target.iterdir()) == [] if there else list(tmp_path.iterdir()) == []


def test_claims_never_overlap_and_those_of_the_dead_are_taken_over(tmp_path: Path) -> None:
    target = str(tmp_path / "out")
    assert subprocess.run([sys.executable, "-c", CLAIM, target, "kill"]).returncode == -9
    command = [sys.executable, "-c", CLAIM, target, "race"]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    entered = [int(racer.communicate()[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0] and all(entered)
    assert set(tmp_path.rglob("*")) <= {Path(target)}  # who takes over an empty folder leaves it


def test_a_page_has_one_writer(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with claimed_file(page), pytest.raises(InputError, match="in use by process"), claimed_file(page):
        pass
    assert list(tmp_path.iterdir()) == []
