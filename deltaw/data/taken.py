"""Which rows of the sources were taken, in the order of the choice, as numbers; the rows themselves: `Builder`.

A unit is what is taken at once: a row with all its pieces, or one piece of a single document. Its pieces follow each
other, so that a unit begins wherever the numbers change.
"""

from array import array
from collections.abc import Iterator
from itertools import islice

import numpy as np

from deltaw.base.parts import REJECTED
from deltaw.data.example import Example
from deltaw.data.examples import Builder
from deltaw.data.sources import visits

Placed = tuple[int, int, int, Example]  # source, row in it, piece of the row


class Taken:
    """The first `count` of `units`, or all of them, appended to `builder`."""

    def __init__(self, builder: Builder, units: Iterator[list[Placed]], count: int | None = None) -> None:
        self._first, self.units, places = len(builder), 0, array("q")
        self._paired = False
        for unit in islice(units, count):
            for *place, example in unit:
                builder.append(example)
                self._paired |= example.part == REJECTED
                places.extend(place)
            self.units += 1
        self.places = np.frombuffer(places, np.int64).reshape(-1, 3)
        """[n, 3]: source, row in it, piece of the row."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def in_file_order(self) -> np.ndarray:
        """The rows' numbers in the builder."""
        return self._first + np.lexsort(self.places.T[::-1])

    def of_source(self, source: int, weight: float = 1.0, *, by_piece: bool = False) -> np.ndarray:
        """The numbers of one source's rows in file order, each as often as an epoch sees it (`visits`)."""
        own = np.flatnonzero(self.places[:, 0] == source)
        places = self.places[own]
        new = self._begins(places, 3 if by_piece else 2)
        counts = np.array(visits(int(new.sum()), weight), np.int64)[np.cumsum(new) - 1]
        order = np.lexsort(places.T[::-1])
        numbers = np.repeat(self._first + own[order], counts[order])
        if not self._paired:
            return numbers
        # Answers to one prompt stay together: visit by visit, not answer by answer.
        unit = np.repeat(np.cumsum(self._begins(places[order], 2)), counts[order])
        visit = np.arange(len(numbers)) - np.repeat(np.cumsum(counts[order]) - counts[order], counts[order])
        return numbers[np.lexsort((visit, unit))]

    def whole_rows(self) -> Iterator[tuple[int, int]]:
        """(source, row) of each, once."""
        for source, row, _ in self.places[self._begins(self.places, 2)]:
            yield int(source), int(row)

    @staticmethod
    def _begins(places: np.ndarray, columns: int) -> np.ndarray:
        """Where another unit begins, bool."""
        changes = (places[1:, :columns] != places[:-1, :columns]).any(1)
        return np.concatenate([np.ones(min(1, len(places)), bool), changes])
