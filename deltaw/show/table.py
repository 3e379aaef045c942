"""A table in plain text, the same on a terminal, in a file and in a test. rich lays it out: it knows how wide 漢 is."""

import io
import os
import shutil
import sys
from collections.abc import Iterable, Sequence

SIDES = {"l": "left", "r": "right"}
RULED = "    \n    \n ── \n    \n    \n    \n    \n    \n"  # as rich describes a box: nothing but a line below the head


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), *, align: str = "", rule: bool = False) -> str:
    """Columns two blanks apart. `align`: "l" or "r" for each column; one of which it says nothing is as the last of
    which it does. `rule`: a line below the head."""
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    count = max((len(row) for row in [head, *cells]), default=0)
    align = (align or "l").ljust(count, (align or "l")[-1])
    grid = Table(
        box=Box(RULED) if rule else None,
        show_header=bool(head),
        show_edge=False,
        pad_edge=False,
        header_style="",
        padding=(0, 1 if rule else 2, 0, 0),
    )
    for name, side in zip([*head, *[""] * (count - len(head))], align, strict=False):
        grid.add_column(Text(name), justify=SIDES[side], no_wrap=True)  # type: ignore[arg-type]
    for row in cells:
        grid.add_row(*map(Text, row))  # as texts: what looks like rich's markup in them is none
    console = Console(file=io.StringIO(), width=100_000, color_system=None)
    console.print(grid)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def fitted(
    rows: Sequence[Sequence[str]], head: Sequence[str], *, align: str, drop: Sequence[str], width: int
) -> tuple[str, list[str]]:
    """The table with a rule, and the columns that were left out so that it fits in `width`: those of `drop`, in that
    order, as few as need be."""
    from rich.cells import cell_len

    for count in range(len(drop) + 1):
        kept = [n for n, name in enumerate(head) if name not in drop[:count]]
        text = table(
            [[row[n] for n in kept] for row in rows],
            [head[n] for n in kept],
            align="".join(align[n] for n in kept),
            rule=True,
        )
        if max(map(cell_len, text.splitlines())) <= width:
            break
    return text, list(drop[:count])


def ending(text: str, width: int) -> str:
    """The text, or as much of its end as fits in `width` (漢 takes two): the end is what tells paths apart."""
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return text
    while cell_len(text) > width - 1:
        text = text[1:]
    return f"…{text}"


def terminal_width() -> int:
    """Characters of a line on the terminal; without end in a file or a pipe, unless $COLUMNS says otherwise."""
    if os.environ.get("COLUMNS") or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return sys.maxsize
