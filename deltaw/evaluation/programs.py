"""pass@1: does the program that a model wrote pass its row's tests? (Chen et al. 2021, one greedy answer per row.)

A row has `prompt` (or any other column that asks) and `test` (`tests`, `test_list`): Python that raises where the
program is wrong, a text or a list of asserts; HumanEval's and MBPP's rows are such. Where it has `entry_point`, as
HumanEval's do, the test defines `check`, which is called with that function.

What an answer becomes (`program_of`): the last block between ``` marks, where there is one, else all of it. With an
entry point that it doesn't define, it goes on where the prompt stopped, and ends where something new begins at the
left margin, since a base model writes on for ever.

It is run by files/program.py, which has no files, no network and little memory, and only where the user says so
(`--allow-code`): the tests are a stranger's program, and what the model writes is nobody's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.data.document import held_in_cell
from deltaw.errors import Rejected

TESTS = ("test", "tests", "test_list")
BLOCK = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
TOP_LEVEL = re.compile(r"^(?=[^\s)\]}])", re.MULTILINE)


@dataclass(frozen=True)
class Checks:
    """`asked`: the program's beginning, or a question; `test`: Python that raises where a program is wrong."""

    asked: str
    test: str
    entry_point: str = ""


def checks_of(value: Mapping[str, Any], asked: str) -> Checks:
    """Of a row, its columns under the names that are known. Raises Rejected."""
    name = next((name for name in TESTS if value.get(name)), None)
    if name is None:
        raise Rejected(f"it has no tests: a column called {', '.join(TESTS)}")
    cell = held_in_cell(value[name])  # a list as a text would be a program that asserts nothing
    lines = cell if isinstance(cell, list) else [value[name]]
    lines = [*([value["test_setup_code"]] if value.get("test_setup_code") else []), *lines]
    if not all(isinstance(line, str) for line in lines):
        raise Rejected(f"{name} isn't a text, or a list of texts")
    entry = value.get("entry_point") or ""
    if not isinstance(entry, str) or (entry and not entry.isidentifier()):
        raise Rejected(f"entry_point {entry!r:.40} isn't the name of a function")
    return Checks(asked, "\n".join(lines), entry)


def program_of(answer: str, tests: Checks) -> str:
    """The whole program: what was written, and the tests."""
    blocks = BLOCK.findall(answer)
    code = blocks[-1] if blocks else answer
    if tests.entry_point and not re.search(rf"^(async )?def {tests.entry_point}\b", code, re.MULTILINE):
        code = tests.asked + _body(code)
    check = f"check({tests.entry_point})\n" if tests.entry_point and "def check" in tests.test else ""
    return f"{code}\n\n{tests.test}\n\n{check}"


def _body(code: str) -> str:
    """What goes on with a function, up to the next thing that isn't a part of it."""
    first, newline, rest = code.partition("\n")
    end = TOP_LEVEL.search(rest)
    return first + newline + (rest[: end.start()] if end else rest)
