"""A file that is made item by item: whatever is cut off of its part, what comes of it is the same in the end."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import InputError, RunError
from deltaw.files.journal import Journal

HEADER = {"prompts": "é", "sampling": {"seed": None}}
VALUES = ["a", "b\nc", "\u2028", ""]


def made(path: Path, header: dict = HEADER, replace: bool = False) -> tuple[list[str], list[int]]:
    """The lines of the finished file, and the numbers of the items that had to be made."""
    journal, new = Journal(path, header, replace=replace), []
    for number in (2, 0, 3, 1):  # as they end
        if not journal.complete and number not in journal.done:
            journal.add(number, VALUES[number])
            new.append(number)
    if not journal.complete:
        journal.finish(f"{journal.done[number]!r}\n" for number in range(len(VALUES)))
    return path.read_text(encoding="utf-8").splitlines(), new


WHOLE = [repr(value) for value in VALUES]


@settings(max_examples=40)
@given(st.data())
def test_a_part_that_is_cut_anywhere_is_gone_on_with(tmp_path_factory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.jsonl"
    journal = Journal(path, HEADER)
    for number in (2, 0, 3, 1):
        journal.add(number, VALUES[number])
    journal.close()
    assert not path.exists()
    whole = journal.part.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    journal.part.write_bytes(whole[:cut] + data.draw(st.sampled_from([b"", b"\0\0", b"[7", b"\0\n"])))
    lines, new = made(path)
    assert lines == WHOLE and len(new) >= (cut < len(whole))
    finished = whole[:cut].count(b"\n") - 1  # the header's
    assert len(new) == len(VALUES) - max(0, finished)
    assert sorted(file.name for file in path.parent.iterdir()) == ["x.jsonl", "x.jsonl.record.json"]
    assert made(path) == (WHOLE, [])  # finished: nothing is made again


def test_what_was_made_otherwise_is_only_replaced_when_asked(tmp_path: Path) -> None:
    path, other = tmp_path / "x.jsonl", {**HEADER, "sampling": {"seed": 1}}
    made(path)
    with pytest.raises(InputError, match="sampling"):
        Journal(path, other)
    journal = Journal(path, other, replace=True)
    journal.add(0, "new")
    journal.close()
    assert path.read_text().splitlines() == WHOLE  # until the new one is whole
    with pytest.raises(InputError, match="sampling"):
        Journal(path, HEADER)  # the part is another's by now
    assert Journal(path, other).done == {0: "new"}  # and is gone on with, asked or not
    assert made(path, other, replace=True)[1] == [2, 3, 1] and made(path, other)[1] == []
    assert len(made(path, other, replace=True)[1]) == 4


def test_a_file_of_unknown_making_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("mine\n")
    with pytest.raises(InputError):
        Journal(path, HEADER)
    assert path.read_text() == "mine\n" and made(path, replace=True)[0] == WHOLE


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        Journal(tmp_path / "no folder" / "x.jsonl", HEADER).add(0, "a")
