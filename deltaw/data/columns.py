"""A row's columns under the names that the forms know.

A column is known by its name without capitals and without blanks around it, and a blank inside is an underscore:
` System Prompt ` is `system_prompt`. `data.columns` names others: {prompt: frage} makes `frage` the prompt, and a
column that is called `prompt` beside it is nobody's. Of two columns with one name the one that is written exactly so
counts, so that a table which has `text` and `Text` is read as it always was. Names are looked up row by row: files of a
folder may write them differently.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaw.data.row import Row, says_something
from deltaw.errors import InputError
from deltaw.show.text import one_line


def plain(column: Any) -> str:
    """A column's name as the forms write it."""
    return "_".join(str(column).casefold().split())


@dataclass(frozen=True)
class Columns:
    """The names that were given with `data.columns`: known name -> column."""

    given: Mapping[str, str] = field(default_factory=dict)

    def of(self, value: Mapping[Any, Any]) -> dict[str, Any]:
        """Known name -> the row's column of that name."""
        names: dict[str, Any] = {}
        for column in value:
            known = plain(column)
            if known not in names or column == known:
                names[known] = column
        if not self.given:
            return names
        mapped = {}
        for known, column in self.given.items():
            place = column if column in value else names.get(plain(column))
            if place is not None:
                mapped[known] = place
        return {known: place for known, place in names.items() if place not in mapped.values()} | mapped

    def renames(self, *names: str) -> bool:
        """Whether one of these is the name of a column that is called otherwise."""
        return any(plain(self.given.get(name, name)) != name for name in names)

    def check(self, rows: Sequence[Row]) -> None:
        """Raises InputError for a column that no row has, unless all are there under the known names instead."""
        if not self.given:
            return
        there = list(dict.fromkeys(str(column) for row in rows for column in row.value))
        known = {plain(column): column for column in there}
        absent = {name: column for name, column in self.given.items() if column not in there}
        absent = {name: column for name, column in absent.items() if plain(column) not in known}
        if not absent or (len(absent) == len(self.given) and all(name in known for name in absent)):
            return
        name, column = next(iter(absent.items()))
        near = difflib.get_close_matches(plain(column), known, n=1)
        hint = f"did you mean {known[near[0]]!r}? " if near else ""
        place = rows[0].origin.rpartition(":")[0]
        raise InputError(
            f"data.columns.{name}: {place} has no column {column!r:.80}",
            fix=f"{hint}its columns are {one_line(', '.join(there), 200) or 'none'}",
        )


UNNAMED = Columns()


class Fields:
    """A row's columns, to be taken one by one by their known names; `rest` names those that nobody took."""

    def __init__(self, value: Mapping[Any, Any], columns: Columns = UNNAMED) -> None:
        self._left = dict(value)
        self._names = columns.of(value)
        self._more: list[str] = []

    def take(self, name: str) -> Any:
        """The column's value, which is thereby used; None where there is none."""
        return self._left.pop(self._names[name], None) if name in self._names else None

    def peek(self, name: str) -> Any:
        """The column's value, which isn't thereby used."""
        return self._left.get(self._names[name]) if name in self._names else None

    def take_text(self, *names: str) -> str | None:
        """The first of these columns that is a text, not blank; anything else stays where it is."""
        for name in names:
            value = self.peek(name)
            if isinstance(value, str) and value.strip():
                return str(self.take(name))
        return None

    def take_all(self) -> dict[str, Any]:
        """What is left, under the names that are known here; all of it is thereby used."""
        known = {column: name for name, column in self._names.items()}
        values = {known.get(column, str(column)): value for column, value in self._left.items()}
        self._left = {}
        return values

    def leave(self, name: str) -> None:
        """A part of a column that was taken isn't used."""
        self._more.append(name)

    def rest(self) -> tuple[str, ...]:
        """What is left and says something."""
        return (*(str(name) for name, value in self._left.items() if says_something(value)), *self._more)
