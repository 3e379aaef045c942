"""`response_format`, and functions that an answer must call: which schemas are taken from a client, before anything is
made of them.

A schema decides how much work each token of its answer is, and strangers send it. So it is walked first: a keyword that
isn't in the lists below is refused by its name and place, numbers and sizes are bounded, and a reference leads nowhere
but into the schema. What the library behind (generate/grammar.py) can't keep of the rest it refuses by name. Nothing is
left out in silence: an answer that ends by itself is valid under the whole schema.

`pattern` isn't taken: no regular expression from a request is ever used. Nor is `multipleOf`, whose automaton has as
many states as the number is large. `not`, `if`, `uniqueItems` and the like aren't what an automaton can hold. Of
`oneOf` the library takes those of which no value can be of two branches, as far as it can tell.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from deltaw.files.strict_json import json_kind
from deltaw.serve.refused import Refused, wrong

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
FIELD = "response_format"
MOST_NODES, MOST_LENGTH, MOST_ITEMS, MOST_PROPERTIES, MOST_CHOICES, MOST_TEXT = 2_000, 10_000, 1_000, 100, 1_000, 1_000

WORDS = frozenset(  # what is about the schema and says nothing of the answer
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$comment"}
    | {"discriminator"}
)
ONE = frozenset({"items", "additionalProperties"})  # a schema, or true or false
SOME = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})  # a list of schemas
NAMED = frozenset({"properties", "$defs", "definitions"})  # schemas by name
MOST = {
    "minLength": MOST_LENGTH,
    "maxLength": MOST_LENGTH,
    "minItems": MOST_ITEMS,
    "maxItems": MOST_ITEMS,
    "minProperties": MOST_PROPERTIES,
    "maxProperties": MOST_PROPERTIES,
}
PLAIN = frozenset(
    {"type", "required", "enum", "const", "format", "$ref"}
    | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
)
KNOWN = WORDS | ONE | SOME | NAMED | PLAIN | MOST.keys()


def schema_of(response_format: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema that a request's answers are held to; None for text. Raises Refused."""
    kind = response_format.get("type")
    allowed = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
    if not isinstance(kind, str) or kind not in allowed:
        raise wrong(f"{FIELD}: type must be text, json_object or json_schema", FIELD, "unsupported_value")
    _only(response_format, allowed[kind], FIELD)
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    given = response_format.get("json_schema")
    if not isinstance(given, Mapping):
        raise wrong(f"{FIELD}: json_schema must be an object with name and schema", FIELD, "invalid_value")
    _only(given, {"name", "description", "schema", "strict"}, f"{FIELD}.json_schema")
    schema = given.get("schema")
    if not isinstance(schema, Mapping):
        raise wrong(f"{FIELD}: json_schema.schema must be an object, not {json_kind(schema)}", FIELD, "invalid_value")
    check_schemas({f"{FIELD}.schema": schema})
    return schema


def _only(given: Mapping[str, Any], known: set[str], place: str) -> None:
    if unknown := sorted(given.keys() - known):
        raise wrong(f"{place}.{unknown[0][:40]}: no such field here", FIELD, "unknown_parameter")


def check_schemas(schemas: Mapping[str, Any]) -> None:
    """Raises Refused for what isn't taken of schemas, wherever in them; by the places where they stand in a request,
    which begin with a field's name. Together they may be as large as one."""
    choices = 0
    nodes = chain.from_iterable(_nodes(place, schema) for place, schema in schemas.items())
    for number, (place, node) in enumerate(nodes):
        if number == MOST_NODES:
            raise _refused(place, f"more than {MOST_NODES:,} parts")
        if unknown := sorted(node.keys() - KNOWN):
            raise _refused(place, f"{unknown[0][:40]!r} isn't a keyword that answers can be held to")
        for name, most in MOST.items():
            value = node.get(name, 0)
            if type(value) is not int or not 0 <= value <= most:
                raise _refused(place, f"{name} must be a whole number of at most {most:,}")
        if not isinstance(node.get("$ref", "#"), str) or not str(node.get("$ref", "#")).startswith("#"):
            raise _refused(place, "$ref may only lead into the schema: #/$defs/…")
        enum, properties = node.get("enum"), node.get("properties")
        given: list[Any] = enum if isinstance(enum, list) else []
        named: list[Any] = list(properties) if isinstance(properties, Mapping) else []
        choices += len(given)
        if len(named) > MOST_PROPERTIES:
            raise _refused(place, f"an object may have {MOST_PROPERTIES} properties")
        if choices > MOST_CHOICES or any(
            len(str(text)) > MOST_TEXT for text in (*given, *named, node.get("const", ""))
        ):
            raise _refused(place, f"at most {MOST_CHOICES:,} choices, of {MOST_TEXT:,} characters each")


def _nodes(place: str, node: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All schemas in a schema, with where they stand. Its depth is the body's, which is bounded."""
    if not isinstance(node, Mapping):
        raise _refused(place, f"must be a schema, not {json_kind(node)}")
    yield place, node
    for name in NAMED & node.keys():
        if not isinstance(node[name], Mapping):
            raise _refused(f"{place}.{name}", f"must be an object of schemas, not {json_kind(node[name])}")
        for key, inner in node[name].items():
            yield from _nodes(f"{place}.{name}.{key[:40]}", inner)
    for name in SOME & node.keys():
        if not isinstance(node[name], list):
            raise _refused(f"{place}.{name}", f"must be a list of schemas, not {json_kind(node[name])}")
        for number, inner in enumerate(node[name]):
            yield from _nodes(f"{place}.{name}[{number}]", inner)
    for name in ONE & node.keys():
        if not isinstance(node[name], bool):
            yield from _nodes(f"{place}.{name}", node[name])


def _refused(place: str, what: str) -> Refused:
    return wrong(f"{place[:200]}: {what}", re.split(r"\W", place)[0], "unsupported_value")
