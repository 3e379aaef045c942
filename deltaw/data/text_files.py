"""The documents of a text file, where it holds several: `data.split_text`.

A .txt file is read as one document, since most are (a book, a log, a report), and blank lines stand between its
paragraphs. A collection has something between its documents, and only whoever made it knows what: blank lines, or the
end of each line. Markdown is one document always: blank lines are a part of its syntax.
"""

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Literal

from deltaw.data.row import Row

WHITE = " \t\r\v\f"


def documents(rows: Sequence[Row], between: Literal["blank_lines", "lines"]) -> list[Row]:
    """The rows, with each .txt file's row in its documents; the origin has the line where one begins."""
    split: list[Row] = []
    for row in rows:
        name, _, number = row.origin.rpartition(":")
        if ".txt" in (suffix.lower() for suffix in PurePath(name).suffixes):
            blocks = _blocks(row.value["text"], between == "lines")
            split += (Row({"text": text}, f"{name}:{int(number) + line}") for line, text in blocks)
        else:
            split.append(row)
    return split


def _blocks(text: str, each_line: bool) -> Iterator[tuple[int, str]]:
    """(line from 0, text) of each document."""
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""]):
        if line.strip(WHITE):
            block.append(line)
        if block and (each_line or not line.strip(WHITE)):
            yield number - len(block) + (line.strip(WHITE) != ""), "\n".join(block)
            block = []
