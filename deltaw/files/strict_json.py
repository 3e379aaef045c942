"""JSON, read strictly: UTF-8, no key twice, no NaN where it isn't allowed. The one reader of configs, headers and rows.

Python's own lets the last of two keys win, takes NaN, and raises four kinds of error. Here whatever is wrong is one
`NotJSON`, which says where.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from deltaw.errors import InputError

MARK = b"\xef\xbb\xbf"  # that some editors put before UTF-8


class NotJSON(ValueError):
    """Why a text isn't JSON, and where that shows, counted from 1. `more`: a whole value, and something behind it."""

    def __init__(self, reason: str, line: int = 0, column: int = 0, *, more: bool = False) -> None:
        self.line, self.more = line, more
        super().__init__(f"{reason} at column {column}" if column else reason)


def parse(text: bytes | str, *, allow_nan: bool = False) -> Any:
    """The JSON value that `text` is. Raises NotJSON."""

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        if decoded.startswith("\ufeff"):
            raise json.JSONDecodeError("Unexpected UTF-8 BOM", decoded, 0)
        return (_LENIENT if allow_nan else _STRICT).decode(decoded)
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        column = len(before) - (before.rfind(b"\n") + 1) + 1
        reason = f"not UTF-8: byte {error.object[error.start]:#04x}"
        raise NotJSON(reason, before.count(b"\n") + 1, column) from None
    except json.JSONDecodeError as error:
        more = error.msg == "Extra data"
        raise NotJSON(f"not JSON: {error.msg}", error.lineno, error.colno, more=more) from None
    except RecursionError:
        raise NotJSON("nested too deeply") from None
    except NotJSON:
        raise
    except ValueError:  # Python refuses to convert integers of thousands of digits
        raise NotJSON("a number with too many digits") from None


def parse_object(path: Path, data: bytes, *, allow_nan: bool = False) -> dict[str, Any]:
    """The JSON object that a file, or a part of it, holds. Raises InputError naming the file."""
    try:
        value = parse(data.removeprefix(MARK), allow_nan=allow_nan)
    except NotJSON as error:
        where = f"{path}:{error.line}" if error.line else path
        fix = "fix it, or download the file again"
        raise InputError(f"{where}: not valid JSON: {error}", fix=fix) from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object, not {json_kind(value)}")
    return value


def read_json(path: Path, *, max_bytes: int = 10_000_000, allow_nan: bool = False) -> dict[str, Any]:
    """The JSON object in a small file. Raises InputError naming the file."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    if len(data) > max_bytes:
        raise InputError(f"{path}: more than {max_bytes:,} bytes, too large for its kind")
    return parse_object(path, data, allow_nan=allow_nan)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise NotJSON(f"the key {name!r} appears {'twice' if count == 2 else f'{count} times'}")
    return value


def _refused(name: str) -> float:
    raise NotJSON(f"{name} is not JSON")


# Made once: json.loads would make one for each text.
_STRICT = json.JSONDecoder(parse_constant=_refused, object_pairs_hook=_unique)
_LENIENT = json.JSONDecoder(parse_constant=float, object_pairs_hook=_unique)


def json_kind(value: object) -> str:
    """What JSON calls a value, with its article: "a list", "an object", "a number"."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
