"""CSV and TSV -> rows. The first record names the columns; a quote that never closes is an error, not one long field.

The separator is the comma, or the tab in a .tsv. Spreadsheets in half of the world write semicolons, so another one is
taken (and said) where the comma can't be meant: the first line has no comma outside quotes, and with the other
separator the first records all have as many fields as it has, two at least. `sep=;` in the first line says it, too.

In a .tsv quotes mean what they do in CSV where all of the file can be read so; otherwise they are characters, as most
programs write TSV without quoting.
"""

import csv
import io
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

from deltaw.data.row import MAX_LINE, Item, Note, Problem, Row
from deltaw.errors import InputError
from deltaw.files.encoding import setting

OTHERS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
LOOKED_AT = 50  # records, to tell the separator by


def read_csv(file: BinaryIO, name: str) -> Iterator[Item]:
    with _long_fields():
        text = _text(file)
        separator = _separator(text)
        if separator != ",":
            yield Note(f"{name}: {OTHERS.get(separator, repr(separator))} separate its columns")
        if text.startswith("sep="):
            text = text[text.find("\n") + 1 :]
        yield from _records(text, name, {"delimiter": separator, "strict": True})


def read_tsv(file: BinaryIO, name: str) -> Iterator[Item]:
    with _long_fields():
        text = _text(file)
        options: dict[str, Any] = {"delimiter": "\t", "strict": True}
        if '"' in text and not _quoted(text, options):
            options |= {"quoting": csv.QUOTE_NONE}
            yield Note(f"{name}: quotes in it are characters: they aren't written in pairs as in CSV")
        yield from _records(text, name, options)


class _long_fields:
    """Python's reader refuses fields over 128 KiB, by a setting of the whole process."""

    def __enter__(self) -> None:
        self._before = csv.field_size_limit(MAX_LINE)

    def __exit__(self, *_: Any) -> None:
        csv.field_size_limit(self._before)


def _text(file: BinaryIO) -> str:
    # A byte that isn't UTF-8 becomes a lone surrogate, which is refused later, in its row, if its column is used.
    # A line inside a field ends as the file's own lines do: that CR is the file's, not the text's.
    return file.read().decode("utf-8", errors="surrogateescape").replace("\r\n", "\n")


def _lines(text: str) -> io.StringIO:
    return io.StringIO(text, newline="")


def _separator(text: str) -> str:
    first = text[: text.find("\n") if "\n" in text else len(text)].rstrip("\r")
    if first.startswith("sep=") and len(first) == 5:
        return first[4]
    if len(_first_records(text, ",", 1)) != 1 or len(_first_records(text, ",", 1)[0]) != 1:
        return ","
    for separator in OTHERS:
        records = _first_records(text, separator, LOOKED_AT)
        if len(records) > 1 and len(records[0]) > 1 and len({len(record) for record in records}) == 1:
            return separator
    return ","


def _first_records(text: str, separator: str, count: int) -> list[list[str]]:
    """The first records that aren't empty; none where they can't be read so."""
    try:
        return list(islice(filter(None, csv.reader(_lines(text), delimiter=separator, strict=True)), count))
    except csv.Error:
        return []


def _quoted(text: str, options: dict[str, Any]) -> bool:
    """Whether all of the text can be read with CSV's quotes, every record as wide as the first."""
    try:
        return len({len(record) for record in csv.reader(_lines(text), **options) if record}) == 1
    except csv.Error:
        return False


def _records(text: str, name: str, options: dict[str, Any]) -> Iterator[Item]:
    number = 0
    try:
        reader = csv.DictReader(_lines(text), **options)
        names = reader.fieldnames
        if not names:
            return
        if len(set(names)) < len(names):
            raise InputError(f"{name}: two columns have the same name", fix="rename one in the first line")
        if wrong := setting(",".join(names).encode("utf-8", errors="surrogateescape")):
            raise InputError(f"{name}:1: the names of the columns aren't UTF-8", fix=wrong)
        for number, value in enumerate(reader, 1):
            origin = f"{name}:{number}"
            if None in value or None in value.values():
                yield Problem(origin, f"the row doesn't have {len(names)} fields as the first line has")
            else:
                yield Row(dict(value), origin)
    except csv.Error as error:
        fix = "fix the quotes there: a quote inside a quoted field is written twice"
        raise InputError(f"{name}:{number + 1}: not CSV: {error}", fix=fix) from None
