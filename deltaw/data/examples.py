"""Many examples as a few flat arrays, which are kept once however often a row is seen.

    tokens   int32 [T]      all rows end to end            mask     bool [T]     True = trained
    starts   int64 [R+1]    row r is starts[r]:starts[r+1]
    file, number            its origin, `names[file]:number`; a number of -1: the name says it all
    piece, pieces           `… (piece 3 of 8)`; 0 of 0 where it is a whole row
    kind                    what else an `Example` says (`Kind`), of which few rows differ: one table of them

The arrays of a number per row have the narrowest type that holds it, so a row costs 13 bytes and a token five: an
object per row took 400 bytes and more. `Examples` is a choice of such rows, in any order, some perhaps several times (a
source's weight): numbers beside the same arrays. An `Example` is made when one is asked for; whoever walks all rows
asks for an array instead (`lengths`, `supervised`, `highest`). The arrays may lie in a mapped file (cache.py).

While they are built they grow in place: the kernel moves pages, not bytes, and those not yet written take no memory.
Rejected: bits for the mask (an eighth instead of one byte per token, but no row of it can be looked at in place), and
Arrow's tables (a copy wherever numpy or torch wants to write or to index).
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, overload

import numpy as np

from deltaw.base.parts import PLAIN, REJECTED
from deltaw.data.example import Example

ORIGIN = re.compile(r"(.*):(0|[1-9]\d{0,17})(?: \(piece ([1-9]\d{0,8}) of ([1-9]\d{0,8})\))?", re.DOTALL)
AT_ONCE = 2**22  # tokens looked at in one piece, so that what is computed on the way stays small


class Kind(NamedTuple):
    """What an `Example` says beside its tokens, its mask and its origin."""

    untrained_turns: int = 0
    unused: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    context: int = 0
    goes_on: bool = False
    glued: bool = False
    part: int = PLAIN

    @staticmethod
    def of_json(values: list[Any]) -> "Kind":
        """Of a list, as JSON has it."""
        return Kind._make(tuple(value) if isinstance(value, list) else value for value in values)


@dataclass(frozen=True, eq=False)
class Columns:
    """The arrays, and the tables that they point into."""

    tokens: np.ndarray
    mask: np.ndarray
    starts: np.ndarray
    file: np.ndarray
    number: np.ndarray
    piece: np.ndarray
    pieces: np.ndarray
    kind: np.ndarray
    names: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    keeps: Any = None  # an open file that they lie in, for as long as they are used

    def __len__(self) -> int:
        return len(self.starts) - 1

    @staticmethod
    def stored() -> list[str]:
        """The names of the arrays."""
        return [field.name for field in fields(Columns)[:8]]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Those that a file keeps, by name."""
        return {name: getattr(self, name) for name in self.stored()}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.starts).astype(np.int32)

    @cached_property
    def supervised(self) -> np.ndarray:
        """Trained tokens of each row."""
        return self._of_rows(lambda part, starts: np.add.reduceat(self.mask[part], starts, dtype=np.int64))

    @cached_property
    def highest(self) -> np.ndarray:
        """The largest token id of each row; 0 of one without any."""
        return self._of_rows(lambda part, starts: np.maximum.reduceat(self.tokens[part], starts))

    def trains_any(self, ids: Iterable[int], *, anywhere: bool = False) -> np.ndarray:
        """Whether one of `ids` is among each row's trained tokens (`anywhere`: among its tokens), bool [R]."""
        wanted = np.array(sorted(ids), np.int32)
        hits = self._of_rows(
            lambda part, starts: np.add.reduceat(
                np.isin(self.tokens[part], wanted) & (self.mask[part] | anywhere), starts, dtype=np.int64
            )
        )
        return hits > 0

    def origin(self, row: int) -> str:
        name, number, pieces = self.names[self.file[row]], int(self.number[row]), int(self.pieces[row])
        whole = name if number < 0 else f"{name}:{number}"
        return f"{whole} (piece {int(self.piece[row])} of {pieces})" if pieces else whole

    def example(self, row: int) -> Example:
        part = slice(int(self.starts[row]), int(self.starts[row + 1]))
        return Example(self.tokens[part], self.mask[part], self.origin(row), *self.kinds[self.kind[row]])

    def _of_rows(self, measure: Any) -> np.ndarray:
        """A number per row, some rows at a time. `measure` is given a slice of the tokens and the beginnings in it of
        rows that aren't empty."""
        result = np.zeros(len(self), np.int32)
        rows, begin = np.flatnonzero(np.diff(self.starts)), 0
        while begin < len(rows):
            first = int(self.starts[rows[begin]])
            end = max(begin + 1, int(np.searchsorted(self.starts[rows], first + AT_ONCE)))
            some = rows[begin:end]
            part = slice(first, int(self.starts[some[-1] + 1]))
            result[some] = measure(part, self.starts[some] - first)
            begin = end
        return result


class Examples(Sequence[Example]):
    """A frozen sequence over `columns`: all of its rows, or those of `rows` in that order."""

    def __init__(self, columns: Columns, rows: np.ndarray | None = None) -> None:
        self.columns = columns
        self.rows = np.arange(len(columns), dtype=np.uint32) if rows is None else rows.astype(np.uint32)
        """Their numbers in `columns`."""

    @staticmethod
    def of(examples: Iterable[Example]) -> "Examples":
        """The same rows, copied unless they are of this kind already."""
        if isinstance(examples, Examples):
            return examples
        builder = Builder()
        for example in examples:
            builder.append(example)
        return builder.finish()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> "Examples": ...
    def __getitem__(self, number: int | slice) -> "Example | Examples":
        if isinstance(number, slice):
            return Examples(self.columns, self.rows[number])
        return self.columns.example(int(self.rows[number]))

    def __iter__(self) -> Iterator[Example]:
        return (self.columns.example(row) for row in self.rows.tolist())

    def take(self, numbers: Any) -> "Examples":
        """The rows of these numbers."""
        return Examples(self.columns, self.rows[numbers])

    @property
    def distinct(self) -> "Examples":
        """Each row once, where it comes first."""
        _, first = np.unique(self.rows, return_index=True)
        return self if len(first) == len(self) else self.take(np.sort(first))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self.columns.lengths[self.rows]

    @property
    def supervised(self) -> np.ndarray:
        """Trained tokens of each row."""
        return self.columns.supervised[self.rows]

    @property
    def highest(self) -> np.ndarray:
        """The largest token id of each row."""
        return self.columns.highest[self.rows]

    def train_any(self, ids: Iterable[int], *, anywhere: bool = False) -> np.ndarray:
        """Whether one of `ids` is among each row's trained tokens (`anywhere`: among its tokens), bool."""
        return self.columns.trains_any(ids, anywhere=anywhere)[self.rows]

    def origin(self, number: int) -> str:
        """Where a row comes from."""
        return self.columns.origin(int(self.rows[number]))

    def digests(self) -> np.ndarray:
        """16 bytes for each unit, that tell those of other tokens or masks apart."""
        digests = (tokens.tobytes() + np.packbits(mask).tobytes() for tokens, mask in self.pairs())
        starts = self.units.tolist()
        if len(starts) < len(self):  # the two answers of a pair are one
            every = list(digests)
            digests = (b"".join(every[a:b]) for a, b in pairwise([*starts, len(self)]))
        return np.frombuffer(b"".join(hashlib.blake2b(one, digest_size=16).digest() for one in digests), "S16")

    @cached_property
    def units(self) -> np.ndarray:
        """The numbers of the examples with which a row begins that is to stay in one batch: all but rejected ones,
        which follow the chosen one of their pair."""
        return units_of(self)

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The tokens and the mask of each row, without an object around them."""
        tokens, mask, starts = self.columns.tokens, self.columns.mask, self.columns.starts
        for begin in range(0, len(self), 2**16):
            rows = self.rows[begin : begin + 2**16].astype(np.int64)
            for start, end in zip(starts[rows].tolist(), starts[rows + 1].tolist(), strict=True):
                yield tokens[start:end], mask[start:end]

    def kinds(self) -> list[tuple[Kind, int, int]]:
        """(a kind, how many rows are of it, the number of the first), in the order of these."""
        numbers, first, counts = np.unique(self.columns.kind[self.rows], return_index=True, return_counts=True)
        order = np.argsort(first)
        table = self.columns.kinds
        return [(table[numbers[n]], int(counts[n]), int(first[n])) for n in order]

    def is_kind(self, wanted: Any) -> np.ndarray:
        """For which rows `wanted(kind)` holds, bool."""
        table = np.array([bool(wanted(kind)) for kind in self.columns.kinds], bool)
        return table[self.columns.kind[self.rows]] if len(table) else np.zeros(len(self), bool)


def units_of(examples: Sequence[Example]) -> np.ndarray:
    """`Examples.units`, whatever holds them."""
    return np.flatnonzero(parts_of(examples) != REJECTED)


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each example, whatever holds them."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([len(example.tokens) for example in examples], np.int64)


def supervised_of(examples: Sequence[Example]) -> np.ndarray:
    """Trained tokens of each example, whatever holds them."""
    if isinstance(examples, Examples):
        return examples.supervised
    return np.array([np.count_nonzero(example.loss_mask) for example in examples], np.int64)


def parts_of(examples: Sequence[Example]) -> np.ndarray:
    """Which part each example is, whatever holds them."""
    if isinstance(examples, Examples):
        table = np.array([kind.part for kind in examples.columns.kinds], np.int8)
        return table[examples.columns.kind[examples.rows]] if len(table) else np.zeros(len(examples), np.int8)
    return np.array([example.part for example in examples], np.int8)


def joined(parts: Sequence[Examples]) -> Examples:
    """All rows of choices among the same columns."""
    columns = parts[0].columns
    assert all(part.columns is columns for part in parts)
    return Examples(columns, np.concatenate([part.rows for part in parts]))


def fingerprint(*parts: Sequence[Example]) -> str:
    """sha256 over every token and mask of each part, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        for tokens, mask in _pairs(part):
            digest.update(len(tokens).to_bytes(8, "little"))
            digest.update(tokens.data)
            digest.update(mask.data)
    return digest.hexdigest()


def _pairs(examples: Sequence[Example]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if isinstance(examples, Examples):
        return examples.pairs()
    arrays = ((example.tokens, example.loss_mask) for example in examples)
    return ((np.ascontiguousarray(tokens), np.ascontiguousarray(mask)) for tokens, mask in arrays)


class Builder:
    """Examples, one after the other or a chunk at a time, into arrays that grow. `finish` ends it."""

    def __init__(self) -> None:
        kinds: dict[str, Any] = {"tokens": np.int32, "mask": bool}
        self._columns = {name: _Growing(kinds.get(name, np.int64)) for name in Columns.stored()}
        self._names: dict[str, int] = {}
        self._kinds: dict[Kind, int] = {}
        self._columns["starts"].add(np.zeros(1, np.int64))

    def __len__(self) -> int:
        return self._columns["starts"].count - 1

    def append(self, example: Example) -> None:
        """One more row."""
        stands = ORIGIN.fullmatch(example.origin)
        name, number, piece, pieces = stands.groups() if stands else (example.origin, -1, None, None)
        kind = Kind(*(getattr(example, field) for field in Kind._fields))
        row = {
            "file": self._names.setdefault(name, len(self._names)),
            "number": int(number),
            "piece": int(piece or 0),
            "pieces": int(pieces or 0),
            "kind": self._kinds.setdefault(kind, len(self._kinds)),
            "starts": self._columns["tokens"].count + len(example.tokens),
        }
        self._columns["tokens"].add(example.tokens)
        self._columns["mask"].add(example.loss_mask)
        for field, value in row.items():
            self._columns[field].add_one(value)

    def extend(self, columns: Columns) -> None:
        """All rows of `columns`, which another process may have built."""
        names = np.array([self._names.setdefault(name, len(self._names)) for name in columns.names], np.int64)
        kinds = np.array([self._kinds.setdefault(kind, len(self._kinds)) for kind in columns.kinds], np.int64)
        changed = {
            "file": names[columns.file] if len(columns) else columns.file,
            "kind": kinds[columns.kind] if len(columns) else columns.kind,
            "starts": columns.starts[1:] - columns.starts[0] + self._columns["tokens"].count,
        }
        for field, array in (columns.arrays | changed).items():
            self._columns[field].add(array)

    def finish(self) -> Examples:
        """All rows in the order in which they came."""
        arrays = {name: column.finish() for name, column in self._columns.items()}
        for name in ("file", "number", "piece", "pieces", "kind"):
            arrays[name] = _narrow(arrays[name])
        return Examples(Columns(**arrays, names=tuple(self._names), kinds=tuple(self._kinds)))


class _Growing:
    """An array at whose end there is room."""

    def __init__(self, dtype: Any) -> None:
        self._array, self.count = np.empty(1024, dtype), 0

    def add(self, values: np.ndarray) -> None:
        end = self.count + len(values)
        self._room(end)
        self._array[self.count : end] = values
        self.count = end

    def add_one(self, value: int) -> None:
        self._room(self.count + 1)
        self._array[self.count] = value
        self.count += 1

    def finish(self) -> np.ndarray:
        self._array.resize(self.count, refcheck=False)
        self._array.flags.writeable = False
        return self._array

    def _room(self, end: int) -> None:
        if end > len(self._array):
            self._array.resize(max(end, len(self._array) * 3 // 2), refcheck=False)


def _narrow(array: np.ndarray) -> np.ndarray:
    """The same whole numbers in the narrowest type that holds them."""
    if not len(array):
        return array.astype(np.int8)
    low, high = int(array.min()), int(array.max())
    kinds = (np.int8, np.int16, np.int32, np.int64)
    return array.astype(next(one for one in kinds if np.iinfo(one).min <= low and high <= np.iinfo(one).max))
