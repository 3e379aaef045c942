"""What a command came to, once for every reader: programs, people, the shell.

Each verb (commands/) returns one of these and prints nothing; the command line shows it (cli/app.py). `data` is what
`--json` prints, plain JSON values. `text` is what a person reads, and is made even where nobody will: it costs
milliseconds, and a second way through every verb would have to be tested. A refusal or a failure isn't a result but an
exception (errors.py); `exit_code` is for verbs whose answer may be "no".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """One JSON object for machines, the same as text for people, and the exit code that says which it was."""

    data: Mapping[str, Any]
    text: str
    exit_code: int = 0
