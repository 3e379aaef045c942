"""A row, and what is said of one that can't be used.

Every stage (reading, recognising, rendering) meets rows that it must refuse. It never crashes on one and
never drops one silently: it says which row and why, and `prepare.prepare` decides how many of those are too
many.

`origin` is what a person needs to find the row again: `train.jsonl:118`, the file's name and the line (for
CSV, Parquet and JSON arrays the row, counted from 1).
"""

from dataclasses import dataclass, field
from typing import Any

from deltaw.show.text import one_line

MAX_LINE = 32 * 2**20  # bytes of a line or a field; a longer one is a fault of the file, not a document


@dataclass(frozen=True, slots=True)
class Row:
    """One object as it stood in the file, before anything is known about its form. `line`: its JSON, if it is one."""

    value: dict[str, Any]
    origin: str
    line: bytes = field(default=b"", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that can't be used, and why."""

    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {one_line(self.reason)}"


def says_something(value: Any) -> bool:
    """Whether a column of a row is more than a gap in its table: not null, not blank, not an empty list or object."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(item is not None for item in value)
    return value is not None


@dataclass(frozen=True, slots=True)
class Note:
    """What was decided about a source as a whole, which the preview shows."""

    text: str


Item = Row | Problem | Note  # what reading gives
