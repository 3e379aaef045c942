"""A table in plain text, the same on a terminal, in a file and in a test. rich lays it out: it knows how wide 漢 is."""

import io
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
