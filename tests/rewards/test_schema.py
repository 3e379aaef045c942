"""JSON schemas: what fits, what doesn't, and that what can't be checked is refused, not passed over."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.rewards.schema import TYPES, WORDS, Schema, Unsupported

LIST = {
    "$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}, "v": {"type": "integer"}}}},
    "$ref": "#/$defs/node",
}
CASES: list[tuple[Any, list[Any], list[Any]]] = [  # schema, what fits, what doesn't
    (True, [None, 1], []),
    (False, [], [None, 1]),
    ({"type": "integer"}, [1, 1.0, -(10**400)], [1.5, "1", True, None, float("inf")]),
    ({"type": ["number", "null"]}, [1.5, None, 10**400], [True, "x"]),
    ({"enum": [1, "a", {"x": [True]}]}, [1, 1.0, "a", {"x": [True]}], [True, {"x": [1]}, 2]),
    ({"const": False}, [False], [0, None]),
    ({"properties": {"a": {"type": "string"}}, "required": ["a"]}, [{"a": "x", "b": 1}, 3], [{}, {"a": 1}]),
    ({"properties": {"a": {}}, "additionalProperties": False}, [{}, {"a": 1}], [{"b": 1}]),
    ({"additionalProperties": {"type": "null"}}, [{"a": None}], [{"a": 1}]),
    ({"minProperties": 1, "maxProperties": 2}, [{"a": 1}, []], [{}, {"a": 1, "b": 2, "c": 3}]),
    ({"items": {"minimum": 3}, "minItems": 1, "maxItems": 2}, [[3], [4, "x"]], [[], [2], [3, 3, 3]]),
    ({"prefixItems": [{"const": 1}], "items": {"const": 2}}, [[], [1], [1, 2, 2]], [[2], [1, 1]]),
    ({"uniqueItems": True}, [[1, 2, True], [[1], [2]]], [[1, 1.0], [{"a": 1, "b": 2}, {"b": 2, "a": 1}]]),
    ({"minLength": 2, "maxLength": 3}, ["äö", "abc", 1], ["a", "abcd"]),
    ({"exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.1}, [0.3, 1, "x"], [0, 1.1, 0.35]),
    ({"anyOf": [{"type": "string"}, {"minimum": 5}]}, ["a", 6, None], [4]),
    ({"oneOf": [{"minimum": 2}, {"maximum": 4}]}, [1, 5], [3]),
    ({"allOf": [{"minimum": 2}, {"not": {"const": 3}}]}, [2, 4], [1, 3]),
    (LIST, [{"v": 1, "next": {"v": 2}}], [{"v": 1, "next": {"v": "x"}}]),
    ({"$ref": "#"}, [], [1]),
    ({"title": "t", "description": "d", "default": 3, "examples": [1]}, [1, None], []),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "fits", "others"), CASES, ids=str)
def test_values_fit_or_dont(schema: Any, fits: list[Any], others: list[Any]) -> None:
    checked = Schema(schema)
    assert [value for value in fits if not checked.fits(value)] == []
    assert [value for value in others if checked.fits(value)] == []


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "a"}, {"format": "date"}, {"patternProperties": {}}, {"if": {}}, {"typ": "object"},
        {"type": "text"},
        {"type": 3}, {"items": [1]}, {"properties": []}, {"required": "a"}, {"minLength": -1}, {"minimum": "1"},
        {"enum": []}, {"$ref": "other.json"}, {"$ref": "#/$defs/none"}, {"anyOf": []}, {"multipleOf": 0}, 3, None,
        {"properties": {"a": {"contains": 1}}}, {"uniqueItems": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_cant_be_checked_is_refused(schema: Any) -> None:
    with pytest.raises(Unsupported):
        Schema(schema)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=8,
)
SCHEMAS = st.recursive(
    st.booleans() | st.builds(lambda name: {"type": name}, st.sampled_from([*TYPES])) | VALUES,
    lambda inner: st.dictionaries(st.sampled_from([*WORDS]), inner | st.lists(inner, max_size=3), max_size=3),
    max_leaves=6,
)


@given(SCHEMAS, VALUES)
def test_any_schema_is_refused_or_decides(schema: Any, value: Any) -> None:
    with contextlib.suppress(Unsupported):
        assert Schema(schema).fits(value) in (True, False)


@given(VALUES)
def test_a_value_fits_itself(value: Any) -> None:
    assert Schema({"const": value}).fits(value) and Schema({"enum": [value]}).fits(value)
