"""Strict JSON: what Python's reader would let pass is refused, and said where."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.errors import InputError
from deltaw.files.strict_json import NotJSON, parse, read_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_json_writes_is_read_as_it_was(value: Any) -> None:
    text = json.dumps(value)
    assert parse(text) == value
    assert parse(text.encode()) == value


@given(st.binary(max_size=30))
def test_any_bytes_are_a_value_or_not_json(data: bytes) -> None:
    try:
        assert parse(data) == json.loads(data.decode())
    except NotJSON as error:
        assert str(error)


@pytest.mark.parametrize(
    ("data", "line", "more"),
    [
        (b'{"a": 1,\n "a": 2}', 0, False),
        (b'{"a": 1}\n{"a": 2}\n', 2, True),
        (b'{"a": 1,\n "b" 2}', 2, False),
        (b'{"a": "\n\n \xff"}', 3, False),
        (b"[" * 100_000, 0, False),
        (b'{"a": ' + b"9" * 10_000 + b"}", 0, False),
    ],
)
def test_it_says_where_and_whether_a_value_stood_there(data: bytes, line: int, more: bool) -> None:
    with pytest.raises(NotJSON) as caught:
        parse(data)
    assert (caught.value.line, caught.value.more) == (line, more)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_no_number_is_none_unless_it_is_allowed(word: str) -> None:
    with pytest.raises(NotJSON, match=word):
        parse(word)
    assert not math.isfinite(parse(word, allow_nan=True))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"a":NaN}', '{"a":1}'.encode("utf-16"), b"[" * 100_000, b'{"a":1,"a":2}', b"\xff"]
)
def test_bad_json_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InputError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_json_with_a_byte_order_mark_is_read_and_a_huge_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(path) == {"a": 1}
    os.truncate(path, 1_000_000_000)
    with pytest.raises(InputError, match="too large"):
        read_json(path)
