"""Values as people read them: a text on one line, a count, bytes, a time."""

from deltaw.files.output import size

LINE = 120  # characters that an error message or a log line may quote of the data


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


def gib(count: float) -> str:
    """Bytes: "1.5 GiB", "20 MiB"."""
    return size(count)


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
