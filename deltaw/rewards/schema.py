"""Whether a JSON value fits a JSON schema (draft 2020-12), as far as answers of models need it.

    any        type, enum, const, anyOf, oneOf, allOf, not, $ref to #, #/$defs/… or #/definitions/…
    object     properties, required, additionalProperties, minProperties, maxProperties
    array      items, prefixItems, minItems, maxItems, uniqueItems
    text       minLength, maxLength
    number     minimum, maximum, exclusiveMinimum, exclusiveMaximum, multipleOf

What only describes is read over (title, description, default, examples, …). Every other word is refused, since a
schema that is checked in part would reward what doesn't fit it: `pattern` and `format`, too, which aren't decided in
bounded time or by everyone alike; a reward of kind regex can stand beside. Numbers are compared exactly: 1.0 is an
integer, and true isn't 1, as the specification has it.
"""

import json
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

DESCRIBES = {
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$schema", "$id",
    "$comment", "$defs", "definitions",
}  # fmt: skip
TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and value == value // 1,
}
DEEPEST = 100  # schemas within schemas, and references that are followed
Check = Callable[[Any], bool]


class Unsupported(Exception):
    """The schema asks for what isn't checked here, or isn't one."""


class Schema:
    """A schema that can be checked whole. Raises Unsupported."""

    def __init__(self, schema: Any) -> None:
        self._root, self._known = schema, dict[str, Check]()
        self._check = self._read(schema, "#", 0)

    def fits(self, value: Any) -> bool:
        try:
            return self._check(value)
        except RecursionError:  # a value as deep as none is meant to be
            return False

    def _read(self, schema: Any, at: str, depth: int) -> Check:
        if isinstance(schema, bool):
            return lambda _: schema
        if not isinstance(schema, dict):
            raise Unsupported(f"{at} is neither an object nor true or false")
        if depth > DEEPEST:
            raise Unsupported(f"{at:.40}… is too deep")
        unknown = [word for word in schema if word not in DESCRIBES and word not in WORDS]
        if unknown:
            raise Unsupported(f"{at}: {', '.join(map(str, unknown[:5]))} can't be checked")
        checks = [
            WORDS[word](self, _Word(schema, value, f"{at}/{word}", depth + 1))
            for word, value in schema.items()
            if word in WORDS
        ]
        return lambda value: all(check(value) for check in checks)

    def _referred(self, word: "_Word") -> Check:
        name = word.value
        if not isinstance(name, str) or not (name == "#" or name.startswith(("#/$defs/", "#/definitions/"))):
            raise Unsupported(f"{word.at}: {name!r:.40} isn't #, #/$defs/… or #/definitions/…")
        if name not in self._known:
            target: Any = self._root
            for part in name.split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, dict) or part not in target:
                    raise Unsupported(f"{word.at}: there is no {name!r:.40}")
                target = target[part]
            self._known[name] = lambda value: False  # replaced below; a reference to itself finds it by name
            self._known[name] = self._read(target, name, word.depth)
        return lambda value: self._known[name](value)


class _Word:
    """A word of a schema, its value, and what stands beside it."""

    def __init__(self, schema: Mapping[str, Any], value: Any, at: str, depth: int) -> None:
        self.schema, self.value, self.at, self.depth = schema, value, at, depth

    def number(self) -> Fraction:
        if not _is_number(self.value):
            raise Unsupported(f"{self.at} isn't a number")
        return Fraction(self.value)

    def count(self) -> int:
        if not _is_number(self.value) or self.value < 0 or self.value != self.value // 1:
            raise Unsupported(f"{self.at} isn't a count")
        return int(self.value)

    def names(self) -> list[str]:
        if not isinstance(self.value, list) or not all(isinstance(one, str) for one in self.value):
            raise Unsupported(f"{self.at} isn't a list of texts")
        return self.value

    def several(self, schema: Schema) -> list[Check]:
        if not isinstance(self.value, list) or not self.value:
            raise Unsupported(f"{self.at} isn't a list of schemas")
        return [schema._read(one, f"{self.at}/{number}", self.depth) for number, one in enumerate(self.value)]

    def one(self, schema: Schema) -> Check:
        return schema._read(self.value, self.at, self.depth)

    def mapping(self, schema: Schema) -> dict[str, Check]:
        if not isinstance(self.value, dict):
            raise Unsupported(f"{self.at} isn't an object")
        return {name: schema._read(one, f"{self.at}/{name}", self.depth) for name, one in self.value.items()}


def _type(schema: Schema, word: _Word) -> Check:
    names = [word.value] if isinstance(word.value, str) else word.names()
    if wrong := [name for name in names if name not in TYPES]:
        raise Unsupported(f"{word.at}: {wrong[0]!r:.40} is none of {', '.join(TYPES)}")
    return lambda value: any(TYPES[name](value) for name in names)


def _enum(schema: Schema, word: _Word) -> Check:
    if not isinstance(word.value, list) or not word.value:
        raise Unsupported(f"{word.at} isn't a list of values")
    known = {_same(value) for value in word.value}
    return lambda value: _same(value) in known


def _const(schema: Schema, word: _Word) -> Check:
    known = _same(word.value)
    return lambda value: _same(value) == known


def _properties(schema: Schema, word: _Word) -> Check:
    checks = word.mapping(schema)
    return _of(dict, lambda value: all(check(value[name]) for name, check in checks.items() if name in value))


def _required(schema: Schema, word: _Word) -> Check:
    names = word.names()
    return _of(dict, lambda value: all(name in value for name in names))


def _additional(schema: Schema, word: _Word) -> Check:
    check, named = word.one(schema), word.schema.get("properties", {})
    return _of(dict, lambda value: all(check(one) for name, one in value.items() if name not in named))


def _items(schema: Schema, word: _Word) -> Check:
    check, first = word.one(schema), len(word.schema.get("prefixItems", ()))
    return _of(list, lambda value: all(check(one) for one in value[first:]))


def _prefix(schema: Schema, word: _Word) -> Check:
    checks = word.several(schema)
    return _of(list, lambda value: all(check(one) for check, one in zip(checks, value, strict=False)))


def _unique(schema: Schema, word: _Word) -> Check:
    if not isinstance(word.value, bool):
        raise Unsupported(f"{word.at} isn't true or false")
    return _of(list, lambda value: not word.value or len({_same(one) for one in value}) == len(value))


def _any_of(schema: Schema, word: _Word) -> Check:
    checks = word.several(schema)
    return lambda value: any(check(value) for check in checks)


def _all_of(schema: Schema, word: _Word) -> Check:
    checks = word.several(schema)
    return lambda value: all(check(value) for check in checks)


def _one_of(schema: Schema, word: _Word) -> Check:
    checks = word.several(schema)
    return lambda value: sum(check(value) for check in checks) == 1


def _not(schema: Schema, word: _Word) -> Check:
    check = word.one(schema)
    return lambda value: not check(value)


def _sized(kind: type, fits: Callable[[int, int], bool]) -> Callable[[Schema, _Word], Check]:
    def read(schema: Schema, word: _Word) -> Check:
        bound = word.count()
        return _of(kind, lambda value: fits(len(value), bound))

    return read


def _bounded(fits: Callable[[Fraction, Fraction], bool]) -> Callable[[Schema, _Word], Check]:
    def read(schema: Schema, word: _Word) -> Check:
        bound = word.number()
        return lambda value: not _is_number(value) or fits(Fraction(value), bound)

    return read


def _multiple(schema: Schema, word: _Word) -> Check:
    step = word.number()
    if step <= 0:
        raise Unsupported(f"{word.at} isn't above 0")
    exact = Fraction(str(word.value))  # 0.1 as it is written, not the binary number beside it
    return lambda value: not _is_number(value) or (Fraction(str(value)) / exact).denominator == 1


def _of(kind: type, check: Check) -> Check:
    """It says something of values of this kind alone."""
    return lambda value: not isinstance(value, kind) or check(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _same(value: Any) -> str:
    """A text that is the same for equal values: 1 and 1.0 are one number, and the order of keys says nothing."""

    def plain(one: Any) -> Any:
        if isinstance(one, dict):
            return {name: plain(each) for name, each in one.items()}
        if isinstance(one, list):
            return [plain(each) for each in one]
        return int(one) if isinstance(one, float) and one.is_integer() else one

    return json.dumps(plain(value), sort_keys=True)


def _smaller(one: Any, other: Any) -> bool:
    return bool(one <= other)


def _larger(one: Any, other: Any) -> bool:
    return bool(one >= other)


WORDS: Mapping[str, Callable[[Schema, _Word], Check]] = {
    "type": _type,
    "enum": _enum,
    "const": _const,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "allOf": _all_of,
    "not": _not,
    "$ref": Schema._referred,
    "properties": _properties,
    "required": _required,
    "additionalProperties": _additional,
    "minProperties": _sized(dict, _larger),
    "maxProperties": _sized(dict, _smaller),
    "items": _items,
    "prefixItems": _prefix,
    "minItems": _sized(list, _larger),
    "maxItems": _sized(list, _smaller),
    "uniqueItems": _unique,
    "minLength": _sized(str, _larger),
    "maxLength": _sized(str, _smaller),
    "minimum": _bounded(_larger),
    "maximum": _bounded(_smaller),
    "exclusiveMinimum": _bounded(lambda one, other: one > other),
    "exclusiveMaximum": _bounded(lambda one, other: one < other),
    "multipleOf": _multiple,
}
