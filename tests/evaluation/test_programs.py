"""pass@1: what an answer becomes, and what a program can't do."""

import json

import pytest

from deltaw.errors import Rejected
from deltaw.evaluation.programs import Checks, checks_of, program_of
from deltaw.files.program import run_program

PROMPT = 'def add(a, b):\n    """The sum."""\n'
HUMAN = Checks(PROMPT, "def check(f):\n    assert f(1, 2) == 3\n", "add")
ASSERTS = Checks("Write add.", "assert add(1, 2) == 3")
RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    ("answer", "tests", "code"),
    [
        ("    return a + b\n\ndef other():\n    pass\n", HUMAN, PROMPT + "    return a + b\n\n"),
        (
            "    x = (a +\n         b\n    )\n    return x",
            HUMAN,
            PROMPT + "    x = (a +\n         b\n    )\n    return x",
        ),
        (f"Here it is:\n```python\n{RIGHT}```\nIt adds.", HUMAN, RIGHT),
        (f"```\nwrong\n```\nor rather\n```py\n{RIGHT}", ASSERTS, RIGHT),
        (RIGHT, ASSERTS, RIGHT),
    ],
)
def test_what_an_answer_becomes(answer: str, tests: Checks, code: str) -> None:
    program = program_of(answer, tests)
    assert program.startswith(code + "\n\n" + tests.test) and ("check(add)" in program) == bool(tests.entry_point)
    exec(compile(program, "program", "exec"), {})


def test_where_the_tests_stand() -> None:
    human = {"prompt": PROMPT, "test": HUMAN.test, "entry_point": "add"}
    assert checks_of(human, PROMPT) == HUMAN
    mbpp = {"text": "?", "test_list": ["assert a", "assert b"], "test_setup_code": "import re"}
    assert checks_of(mbpp, "?").test == "import re\nassert a\nassert b"
    for cell in (json.dumps(mbpp["test_list"]), repr(mbpp["test_list"])):  # by itself a text that asserts nothing
        assert checks_of({**mbpp, "test_list": cell}, "?") == checks_of(mbpp, "?")
    assert checks_of({"test": "[f() for _ in '12']"}, "?").test == "[f() for _ in '12']"
    for wrong in ({}, {"test": 3}, {"test": "x", "entry_point": "os; 1"}):
        with pytest.raises(Rejected):
            checks_of(wrong, "")


CANNOT = """
import os
def refused(call, *arguments):
    try:
        call(*arguments)
    except (OSError, RuntimeError, ImportError):
        return
    raise SystemError(call.__name__)
os.close(0)  # its place is free for another descriptor, and still none is given
for call, *arguments in (
    (open, "/etc/passwd"), (open, FILE, "w"), (os.listdir, "/"), (os.remove, FILE), (os.rename, FILE, FILE + "2"),
    (os.mkdir, FILE + "d"), (os.stat, FILE), (os.chmod, FILE, 0), (os.symlink, FILE, FILE + "l"), (os.chdir, "/tmp"),
    (os.fork,), (os.kill, 1, 0), (os.kill, os.getpid(), 0), (os.execv, "/bin/sh", ["sh"]), (os.dup, 1), (os.pipe,),
    (__import__, "socket"), (__import__, "subprocess"), (__import__, "torch"), (os.setuid, 0),
):
    refused(call, *arguments)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.socket(2, 1, 0) == -1 and libc.open(b"/etc/passwd", 0) == -1 and libc.ptrace(0, 0, 0, 0) == -1
"""


def test_a_program_can_only_compute(tmp_path) -> None:
    file = tmp_path / "victim"
    file.write_text("whole")
    tmp_path.chmod(0o777)
    outcome = run_program(CANNOT.replace("FILE", repr(str(file))))
    assert outcome.passed, outcome.why
    assert [path.name for path in tmp_path.iterdir()] == ["victim"] and file.read_text() == "whole"


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        (program_of("    import math, re, collections\n    return a + b", HUMAN), True),
        (program_of("    return a - b", HUMAN), False),
        ("import os; os._exit(0)", False),
        ("import sys; sys.exit(0)", False),
        ("while True: pass", False),
        ("x = 'a' * 10**10", False),
        ("import os\nwhile True: os.write(1, b'x' * 4096)", False),
    ],
)
def test_what_comes_to_its_end(program: str, passes: bool) -> None:
    outcome = run_program(program, 0.5 if program.startswith("while") else 10.0)
    assert outcome.passed == passes and bool(outcome.why) != passes
