"""What can go wrong that the user can fix.

One root, two kinds: `InputError` (exit code 2: what was asked for is wrong) and `RunError` (exit code 1: it went
wrong while running). Each says what is wrong, then what to do next; the CLI prints that in at most five lines and
keeps the traceback for `--debug`. Anything else that escapes is a defect of deltaw.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

MAX_LISTED = 3  # problems shown in full, so that the message keeps within five lines


class DeltawError(Exception):
    """Root of every error that a user can fix. `what` states the problem, `fix` the next action."""

    exit_code = 1

    def __init__(self, what: str, fix: str | None = None) -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what}\n{fix}" if fix else what)


class InputError(DeltawError):
    """The input is wrong: a run file, a data file, an adapter, a name. Exit code 2."""

    exit_code = 2


class RunError(DeltawError):
    """It failed while running: NaN in the loss, a full disk, out of memory. Exit code 1."""


class Rejected(Exception):
    """This row can't be used. The only way a stage refuses a row; it becomes a `Problem`, never a crash."""


def listed(problems: Sequence[str], limit: int = MAX_LISTED) -> str:
    """One problem per line, indented: the first `limit` of them and a count of the rest."""
    more = len(problems) - limit
    shown = [f"  {problem}" for problem in problems[: limit if more > 0 else None]]
    if more > 0:
        shown[-1] += f"  (and {more} more)"
    return "\n".join(shown)


def first_line(error: BaseException) -> str:
    """What somebody else's error says, on one line; its kind, where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def with_kind(error: BaseException) -> str:
    """Its kind and what it says, on one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def command(verb: str, *words: object, options: Sequence[str] = ()) -> str:
    """A command line of deltaw that can be pasted into a shell, whatever its folders are called."""
    # A folder called ~ isn't home: str(Path("./~")) has lost what says so.
    given = [f"./{word}" if isinstance(word, Path) and str(word).startswith("~") else str(word) for word in words]
    dashes = ["--"] if any(word.startswith("-") for word in given) else []  # else taken for options
    return shlex.join(["deltaw", verb, *options, *dashes, *given])
