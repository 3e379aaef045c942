"""What a person sees: lines off a terminal, a bar on one, nothing when quiet."""

import sys

from deltaw.show import progress as module
from deltaw.show.progress import Display


def test_lines_begin_and_end_and_keep_quiet_between(capsys) -> None:
    with Display().task("work", 100) as progress:
        for done in range(101):
            progress(done, "note")
    assert capsys.readouterr().err.splitlines() == [
        "work: 0 of 100 (0%), note",
        "work: 100 of 100 (100%), note",
    ]


def test_time_left_is_told(capsys, monkeypatch) -> None:
    now = iter([0.0, 10.0, 20.0, 40.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    with Display().task("work", 6) as progress:
        for done in (0, 1, 3):
            progress(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["work: 0 of 6 (0%)", "work: 1 of 6 (16%), 0:50 left", "work: 3 of 6 (50%), 0:30 left"]


def test_a_terminal_gets_a_bar_and_lines_stand_above_it(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    display = Display()
    with display.task("work", 2) as progress:
        progress(1, "half")
        display.say("[a line]")
        progress(2)
    err = capsys.readouterr().err
    assert "work" in err and "2 of 2 (100%)" in err and "[a line]" in err


def test_quiet_is_quiet(capsys) -> None:
    display = Display(quiet=True)
    display.say("x")
    with display.task("work", 1) as progress:
        progress(1, "y")
    captured = capsys.readouterr()
    assert not captured.err and not captured.out


def test_the_end_is_told_once_though_a_task_gets_there_twice(capsys) -> None:
    with Display().task("work", 2) as progress:
        for done in (1, 2, 2):
            progress(done)
    assert capsys.readouterr().err.splitlines() == ["work: 1 of 2 (50%)", "work: 2 of 2 (100%)"]
