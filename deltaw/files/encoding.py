"""Text files that aren't UTF-8: read by the name of their encoding (`data.encoding`), and recognised for an error.

Every reader takes UTF-8. A file in another encoding is decoded and encoded anew on its way in, so that line numbers and
all else stay as they are. A file that begins with UTF-8's mark is UTF-8, whatever is set.

Nothing is guessed when rows are read: cp1252 and cp1251 both read any byte, and a wrong guess is a run on nonsense that
nobody sees. The error for a file that isn't UTF-8 names the encoding that it probably has, and a person decides.
"""

import codecs
import io
import re
from typing import BinaryIO

from deltaw.errors import InputError

UTF8 = "utf-8"
CHUNK = 2**16
STATEFUL = ("idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "utf-7")  # not of text files
HIGH = re.compile(rb"[\x80-\xff]")
# What a text in each encoding is mostly made of, of what isn't ASCII; the first that fits is named.
LIKELY = (
    ("shift_jis", r"[ぁ-ヿ]", 0.3),
    ("cp1251", r"[а-яё]", 0.6),
    ("koi8-r", r"[а-яё]", 0.6),
    ("euc-kr", r"[가-힣]", 0.8),
    ("gb18030", r"[一-鿿，。、？！：；“”（）《》]", 0.9),
    ("cp1252", r"[À-ÖØ-öø-ÿ‘’“”–—…€«»°£§]", 0.5),
)


def is_encoding(name: str) -> bool:
    """Whether text files can be in this encoding."""
    try:
        known = codecs.lookup(name)
    except (LookupError, ValueError):
        return False
    return bool(getattr(known, "_is_text_encoding", True)) and known.name.replace("_", "-") not in STATEFUL


def likely(data: bytes) -> str:
    """The encoding that bytes which aren't UTF-8 probably have."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0\0" in (data[:4:2], data[1:4:2]):
        return "utf-16"
    latin = len(re.findall(rb"[A-Za-z][\x80-\xff]|[\x80-\xff][A-Za-z]", data)) > len(HIGH.findall(data)) / 3
    for encoding, usual, share in LIKELY:
        if latin and encoding not in ("shift_jis", "cp1252"):
            continue  # letters beyond ASCII stand among those of ASCII
        try:
            text = re.sub(r"[\0-\x7f]", "", data.decode(encoding))
        except UnicodeDecodeError:
            continue
        if len(re.findall(usual, text)) >= share * len(text) and (encoding != "gb18030" or len(text) > 1):
            return encoding
    return "latin-1"


def setting(data: bytes) -> str:
    """What to set so that bytes which aren't UTF-8 can be read; empty for UTF-8."""
    try:
        data.decode(UTF8)
    except UnicodeDecodeError as error:
        around = data[max(0, error.start - 20_000) : error.start + 20_000]
        return f"it looks like {likely(around)}: set data.encoding: {likely(around)}"
    return ""


def without_setting(reason: str) -> str:
    """The same reason where there is no run file to set it in."""
    return re.sub(r"set data\.encoding: [\w-]+", "save it as UTF-8", reason)


def as_utf8(file: BinaryIO, encoding: str, name: str) -> BinaryIO:
    """`file`, which is in `encoding`, as UTF-8."""
    if codecs.lookup(encoding).name == UTF8:
        return file
    return io.BufferedReader(_Encoded(file, encoding, name), CHUNK)


class _Encoded(io.RawIOBase):
    """Reads as UTF-8. Raises InputError with the line that the encoding doesn't have."""

    def __init__(self, file: BinaryIO, encoding: str, name: str) -> None:
        self._file, self._encoding, self._name = file, encoding, name
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._lines, self._left, self._ended = 0, b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        while not self._left and not self._ended:
            data = self._file.read(CHUNK)
            self._ended = not data
            text = self._decoded(data)
            self._lines += text.count("\n")
            self._left = text.encode()
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def _decoded(self, data: bytes) -> str:
        try:
            return self._decoder.decode(data, final=not data)
        except UnicodeError as error:
            line, what = self._lines + 1, str(error)
            if isinstance(error, UnicodeDecodeError):
                line += error.object[: error.start].count(b"\n")
                what = f"byte {error.object[error.start]:#04x} has no meaning there"
            raise InputError(
                f"{self._name}:{line}: not {self._encoding}: {what}",
                fix="set data.encoding to the encoding that the file was saved in, or save it as UTF-8",
            ) from None
