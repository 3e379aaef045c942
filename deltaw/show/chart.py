"""Charts in plain text: columns and bars out of block characters, eighths of a character high."""

from collections.abc import Sequence

BLOCKS = " ▁▂▃▄▅▆▇█"
EIGHTHS = len(BLOCKS) - 1


def columns(
    heights: Sequence[int], *, rows: int, top: str, bottom: str, first: str, last: str = "", width: int = 1
) -> str:
    """A column for each of `heights`, in eighths of a row, each `width` characters wide. `top` and `bottom` name the
    highest and the lowest row, `first` and `last` the ends of the axis below."""
    margin = max(len(top), len(bottom))
    names = {rows - 1: top, 0: bottom}
    lines = []
    for row in range(rows - 1, -1, -1):
        blocks = "".join(BLOCKS[min(EIGHTHS, max(0, height - EIGHTHS * row))] * width for height in heights)
        lines.append(f"{names.get(row, ''):>{margin}} │{blocks.rstrip()}")
    span = len(heights) * width
    axis = f"{first}{last:>{max(len(last) + 2, span - len(first))}}" if last else first
    return "\n".join([*lines, f"{'':{margin}} └{'─' * span}", f"{'':{margin}}  {axis}"])


def bar(share: float, width: int) -> str:
    """A bar of `share` in [0, 1] of `width` characters, one at least."""
    return BLOCKS[-1] * max(1, round(width * share))
