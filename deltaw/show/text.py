"""Values as people read them: a text on one line, a count, a share, a time."""

import re
from collections.abc import Sequence

LINE = 120  # characters that an error message or a log line may quote of the data
FRAME = 8  # characters that texts must share at an end before these are left out


def one_line(text: str, limit: int = LINE, *, end: bool = False) -> str:
    """`text` on one line of at most `limit` characters, safe to print whatever the data held. `end`: where it is too
    long its end is shown, not its beginning (the end of a prompt is what was asked)."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    if len(text) <= limit:
        return text
    return "…" + text[1 - limit :] if end else text[: limit - 1] + "…"


def counted(count: int, one: str, many: str | None = None) -> str:
    """ "1 row", "1,200 rows"; `many` where an s doesn't make the plural: counted(2, "row was", "rows were")."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def rounded(figure: float) -> str:
    """A loss, a metric: four decimals, fewer of a large one, no minus before a 0. "0.4689", "1,915.9"."""
    size = abs(figure)
    return f"{figure:z.4f}" if size < 100 else f"{figure:,.1f}" if size < 1e6 else f"{figure:.3g}"


def figure_name(name: str) -> str:
    """A metric's name as people read it: "exact match"; of `file.py:function` the function's."""
    return name.rpartition(":")[2].replace("_", " ")


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def percent(share: float, digits: int = 0, *, signed: bool = False) -> str:
    """A share with `digits` after the point: percent(0.268) is "27 %", percent(0.268, 1, signed=True) "+26.8 %"."""
    return f"{100 * share:{'+' if signed else ''}.{digits}f} %"


def framed(texts: Sequence[str]) -> tuple[str, list[str], str]:
    """(how all of them begin, what is each one's own, how all of them end): around what was asked stand a system prompt
    and a template's marks. Empty where that would be short, or where it would leave one nothing of its own.
    """
    start = end = ""
    if len(texts) > 1:
        start = _common(texts)
        start = start[: (start.rfind("\n") + 1) or (start.rfind(" ") + 1)]  # whole lines, in one line whole words
        start = start if len(start) >= FRAME else ""
        end = _common([text[len(start) :][::-1] for text in texts])[::-1]
        edge = re.search(r"[\s<\[]", end)  # where a word has ended, or a mark begins
        end = end[edge.start() :] if edge and len(end) - edge.start() >= FRAME else ""
    own = [text[len(start) : len(text) - len(end)] for text in texts]
    return (start, own, end) if all(own) else ("", list(texts), "")


def _common(texts: Sequence[str]) -> str:
    """How all of them begin."""
    first, last = min(texts), max(texts)
    length = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[:length]
