"""A file that is made item by item, in any order, and lost never: `FILE.part` while it is being made.

    answers.jsonl.part          a header, then a line per finished item: [number, value], or [name, value]
    answers.jsonl               the whole, in order, written at once when the last item is there
    answers.jsonl.record.json   the header: what it was made of

The header says what the items depend on. A part with the same header is gone on with, whatever happened to the process
that wrote it: a line that a kill or a full disk cut off is dropped, and its item made again. A finished file with the
same header needs nothing. Anything else that lies there is refused unless it may be replaced, and is only replaced when
the new one is whole.

Rejected: appending to the file itself in order (what ended early has to wait for what ends late, and is lost with it).
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from deltaw.errors import InputError, RunError
from deltaw.files.atomic import fsync, replacing, write_text_atomic
from deltaw.files.strict_json import NotJSON, parse

ANOTHER = "name another file with -o, or replace it: --replace"
AGAIN = "nothing that was finished is lost: free some space and give the same command again"


class Journal:
    """What of `path` is there. `done`: the finished items by number or name; `complete`: the file is whole."""

    def __init__(self, path: Path, header: Mapping[str, Any], *, replace: bool = False) -> None:
        """Read what lies there. Raises InputError where that is something else, and mustn't be replaced."""
        self.path, self.header = path, dict(header)
        self.done: dict[Any, Any] = {}
        self._file: BinaryIO | None = None
        self._whole = 0  # bytes of the part that can be gone on with
        self._read(replace)
        self.complete = not self._whole and not replace and path.exists()
        if self.complete:
            self._must_match(_record(self.record), path)

    @property
    def part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def record(self) -> Path:
        return self.path.with_name(f"{self.path.name}.record.json")

    def add(self, number: int | str, value: Any) -> None:
        """An item is finished. Raises RunError when the disk refuses."""
        try:
            if self._file is None:
                self._file = self._begun()
            self._file.write(_line([number, value]))
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self.part}: {error.strerror}", fix=AGAIN) from None
        self.done[number] = value

    def finish(self, lines: Iterable[str]) -> None:
        """Write the file itself. Raises RunError when the disk refuses."""
        self.close()
        write_text_atomic(self.record, json.dumps(self.header, indent=2, ensure_ascii=False) + "\n")
        with replacing(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
        self.part.unlink(missing_ok=True)

    def close(self) -> None:
        """Make what is finished survive a power cut."""
        if self._file is not None:
            self._file.close()
            self._file = None
            fsync(self.part)

    def _read(self, replace: bool) -> None:
        data = self.part.read_bytes() if self.part.is_file() else b""
        head, _, rest = data[: data.rfind(b"\n") + 1].partition(b"\n")
        try:
            header = parse(head) if head else None
        except NotJSON:
            header = None  # cut off before its first item
        if header is None or (header != self.header and replace):
            return
        self._must_match(header, self.part)
        for line in rest.splitlines():
            try:
                number, value = parse(line)
            except (NotJSON, ValueError, TypeError):
                continue
            self.done[number] = value
        self._whole = len(head) + 1 + len(rest)

    def _must_match(self, header: Any, path: Path) -> None:
        if isinstance(header, dict) and all(header.get(name) == value for name, value in self.header.items()):
            return
        if not isinstance(header, dict):
            raise InputError(f"{path} exists already, and nothing says how it was made", fix=ANOTHER)
        names = [name for name in self.header if header.get(name) != self.header[name]]
        raise InputError(f"{path} exists already, and was made otherwise: by its {', '.join(names)}", fix=ANOTHER)

    def _begun(self) -> BinaryIO:
        """The part, up to where it is whole, opened to go on."""
        if not self._whole:
            self.part.write_bytes(_line(self.header))
        else:
            os.truncate(self.part, self._whole)
        return self.part.open("ab")


def _record(path: Path) -> Any:
    try:
        return parse(path.read_bytes())
    except (OSError, NotJSON):
        return None


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"
