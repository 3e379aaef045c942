"""A source's rows. Those that are lines of JSON stay lines, one after the other, until somebody wants one.

As dictionaries they would take four times the memory, and once more in each process that renders them: to look at an
object of Python's is to write into it (its count of references), and what is written is copied in a fork. Whoever takes
a row parses its line again, in some microseconds.

    lines    | {"messages": …}\\n | {"messages": …}\\n | …       one array of bytes, and where each line ends in it
    files    train.jsonl from row 0 on, more.jsonl from row 1000 on; with each row's line number that is its origin
"""

from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import overload

from deltaw.data.row import Row
from deltaw.files.strict_json import parse


class Rows(Sequence[Row]):
    """Rows in order, to be appended to."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._lines, self._ends = bytearray(), array("q")
        self._files: list[str] = []
        self._first: list[int] = []  # the number of each file's first row
        self._numbers = array("q")  # of lines in their file
        self._others: dict[int, Row] = {}  # those that aren't lines
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        file, _, number = row.origin.rpartition(":")
        if not row.line:
            self._others[len(self)] = Row(row.value, row.origin)
        elif not self._files or file != self._files[-1]:
            self._files.append(file)
            self._first.append(len(self))
        self._numbers.append(int(number) if row.line else 0)
        self._lines += row.line
        self._ends.append(len(self._lines))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        number = range(len(self))[number]
        if number in self._others:
            return self._others[number]
        begin = self._ends[number - 1] if number else 0
        return Row(parse(bytes(memoryview(self._lines)[begin : self._ends[number]])), self.origin(number))

    def origin(self, number: int) -> str:
        """A row's origin, without the row."""
        if number in self._others:
            return self._others[number].origin
        return f"{self._files[bisect_right(self._first, number) - 1]}:{self._numbers[number]}"

    def origins(self) -> Iterator[str]:
        return map(self.origin, range(len(self)))

    def files(self) -> set[str]:
        """What the rows' origins name besides the line."""
        return {*self._files, *(row.origin.rpartition(":")[0] for row in self._others.values())}

    def rename(self, folder: str, files: Collection[str]) -> None:
        """These files are called by their folder, too, from now on."""
        self._files = [f"{folder}/{file}" if file in files else file for file in self._files]
        for number, row in self._others.items():
            if row.origin.rpartition(":")[0] in files:
                self._others[number] = replace(row, origin=f"{folder}/{row.origin}")
