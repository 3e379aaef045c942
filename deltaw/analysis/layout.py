"""Where the parts of a picture stand, in CSS pixels from its top left corner: texts, legends, the cells of a heat map.

The reader's font is unknown, so that a text's width is an estimate that rarely is too small (the letters of a wide
sans-serif, 1 em for those of East Asia). A legend is set like a paragraph, since beside or
inside the plot it would narrow or hide it. The cells of a heat map are as large as leaves labels of their row or column
readable, until there are so many that only every second, fifth or tenth is labelled.
"""

import unicodedata
from collections.abc import Sequence
from textwrap import wrap
from typing import Any, Literal, NamedTuple

from deltaw.analysis.page import visible

SIZE = 12.0  # of text
LINE = 18.0  # from one line of a legend to the next
MAX_ENTRIES = 24  # of a legend

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Entry(NamedTuple):
    """One series in a legend."""

    name: str
    kind: Literal["line", "dot", "ring", "box"]
    colour: str
    dash: Any = "-"  # matplotlib's line style


class Grid(NamedTuple):
    """Where a heat map's cells and labels stand."""

    left: float
    top: float
    width: float  # of the whole picture
    height: float
    cell_w: float
    cell_h: float
    row_stride: int  # every so many rows have a label
    column_stride: int
    turned: bool  # column labels stand slanted

    def cell(self, row: int, column: int) -> Box:
        """A hair's breadth is left between cells, unless they are that small themselves."""
        gap = 0.75 if min(self.cell_w, self.cell_h) >= 8 else 0.0
        left, top = self.left + column * self.cell_w, self.top + row * self.cell_h
        return left + gap, top + gap, left + self.cell_w - gap, top + self.cell_h - gap


def width(text: str, size: float = SIZE) -> float:
    """What a line of text takes, about."""
    return sum(map(_letter, text)) * size


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _letter(letter: str) -> float:
    if letter in "fijlrtI.,:;'|!()[]/- ":
        return 0.38
    if unicodedata.east_asian_width(letter) in "WF" or letter in "mwMW%@—−":
        return 1.0
    return 0.68 if letter.isupper() else 0.6


def shortened(text: str, most: int) -> str:
    """One line of at most `most` characters; the middle gives way, since paths differ at both ends."""
    line = " ".join(visible(text[:10_000]).split())
    if len(line) <= most:
        return line
    head = (most - 1) // 3
    return f"{line[:head]}…{line[len(line) - (most - 1 - head) :]}"


def told_apart(names: Sequence[str], most: int) -> list[str]:
    """The names shortened; where they are too long, first by the beginning that all have in common."""
    cut = 0
    if max(map(len, names), default=0) > most:
        first, last = min(names), max(names)
        same = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), 0)
        cut = max(first.rfind(".", 0, same), first.rfind("/", 0, same)) + 1
    return [shortened(f"…{name[cut:]}" if cut else name, most) for name in names]


def beside(spot: tuple[float, float], text: str, wide: float, taken: list[Box]) -> int:
    """1 or -1: the side of a point where its label has room (and takes it); 0 where there is none."""
    for side in (1, -1):
        near, far = spot[0] + 6 * side, spot[0] + (8 + width(text, 11)) * side
        box = (min(near, far), spot[1] - 6, max(near, far), spot[1] + 6)
        if box[0] > 0 and box[2] < wide and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return side
    return 0


def legend_of(entries: Sequence[Entry], wide: float) -> tuple[list[tuple[float, float, Entry]], float]:
    """(left, baseline, entry) of each, in lines of at most `wide`, and where the plot may begin."""
    shown = list(entries[:MAX_ENTRIES])
    if len(entries) > MAX_ENTRIES:
        shown[-1] = Entry(f"and {len(entries) - MAX_ENTRIES + 1} more", "dot", "none")
    placed, left, baseline = [], 0.0, 14 + LINE
    for entry in shown:
        needed = 24 + width(shortened(entry.name, 36))
        if left and left + needed > wide:
            left, baseline = 0.0, baseline + LINE
        placed.append((left, baseline, entry))
        left += needed + 14
    return placed, baseline + 14


class Slots(NamedTuple):
    """Where bars stand."""

    width: float  # of the whole picture
    left: float  # room beside them
    below: float  # and under them, for the groups' labels
    bar: float  # a bar's share of its group's slot
    labels: list[list[str]]  # the lines of each
    turned: bool  # or slanted, in one line


def slots_of(groups: Sequence[str], series: int) -> Slots:
    """Bars of so many series in groups with these labels: broken into lines, or slanted where that doesn't help."""
    count, each = max(1, len(groups)), max(1, series)
    slot = min(max(each * 26 + 24, 84.0, 280 / count), max(600 / count, each * 4 + 4))
    labels = [wrap(shortened(group, 60), max(1, int(slot / SIZE / 0.6)), break_long_words=False) for group in groups]
    bar = min(34.0, slot * 0.8 / each) / slot
    if all(len(lines) <= 3 and width(line) < slot for lines in labels for line in lines):
        below = LINE + 16 * max(map(len, labels), default=0)
        return Slots(slot * count + 50, 0.0, below - 10, bar, labels, False)
    short = told_apart(groups, 18)
    reach = max(map(width, short))
    left = max(0.0, reach * 0.82 - slot / 2)
    return Slots(slot * count + left + 20, left, 22 + reach * 0.6, bar, [[name] for name in short], True)


def grid_of(rows: Sequence[str], columns: Sequence[str]) -> Grid:
    """The cells of a heat map with these labels."""
    widest = max(map(width, columns), default=0.0)
    few = len(columns) <= 12
    cell_w = min(max(widest + 10, 44.0), 78.0) if few else max(4.0, min(28.0, 620 / len(columns)))
    heights = ((8, 30.0), (16, 24.0), (40, 17.0))
    cell_h = next((height for most, height in heights if len(rows) <= most), max(3.0, 680 / max(1, len(rows))))
    numbers = widest <= width("000")  # so short that every second or fifth will do
    turned = widest > cell_w - 4 and not numbers
    left = max(map(width, rows), default=0.0) + 12
    top = 46 + (widest * 0.72 + 10 if turned else 18)
    whole = left + cell_w * len(columns) + (widest * 0.72 if turned else 0) + 2, top + cell_h * len(rows) + 4
    strides = _stride(14 / cell_h), _stride((widest + 6 if numbers else 15) / cell_w)
    return Grid(left, top, *whole, cell_w, cell_h, *strides, turned)


def _stride(needed: float) -> int:
    return next((step for step in (1, 2, 5, 10, 20, 50, 100) if step >= needed), 200)
