"""How a request's fields are read: strictly, by name, with an error that a client can act on.

Lists are looked at by hand, not by pydantic: of a list with a hundred thousand wrong items it would make a hundred
thousand errors.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, ValidationError

from deltaw.config import Strict
from deltaw.files.strict_json import json_kind
from deltaw.serve.refused import Refused, wrong

ROUTES = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}  # where fields go that another route has
WHY = {
    "response_format": "chats alone are held to JSON or a schema: /v1/chat/completions",
    "functions": "send tools",
    "function_call": "send tools",
    "suffix": "a text can only be continued at its end",
}


def _texts(value: Any) -> Any:
    """One text or a list of them, as a tuple."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
        raise ValueError("must be a text or a list of texts, none of them empty")
    return tuple(items)


def _biases(value: Any) -> Any:
    """OpenAI's form has ids as texts, since they are keys of an object."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    for key, bias in value.items():
        if not (isinstance(key, int) or (key.isascii() and key.isdecimal() and len(key) < 10)):
            raise ValueError(f"{key[:40]!r} isn't a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


def _prompts(value: Any) -> Any:
    """Every form of OpenAI's `prompt` as a tuple of texts or of tuples of ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if _are_ids(value):
            return (tuple(value),)
        if all(isinstance(item, list) and _are_ids(item) for item in value):
            return tuple(map(tuple, value))
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists; none empty")


def _objects(value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError(f"must be a list, not {json_kind(value)}")
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise ValueError(f"item {number} must be an object, not {json_kind(item)}")
    return value


def _ids(value: Any) -> Any:
    if not isinstance(value, list) or not (_are_ids(value) or not value):
        raise ValueError("must be a list of token ids")
    return tuple(value)


def _are_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(item) is int for item in value)


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Biases = Annotated[dict[int, float], BeforeValidator(_biases)]
Prompts = Annotated[Any, BeforeValidator(_prompts)]
Objects = Annotated[list[dict[str, Any]], BeforeValidator(_objects)]
Ids = Annotated[tuple[int, ...], BeforeValidator(_ids)]


class Request(Strict):
    """What all requests have in common: how they are read."""

    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Self:
        """Raises Refused."""
        fields = {name: value for name, value in body.items() if value is not None and name not in cls.ignored}
        own = cls.model_fields
        for name, allowed in cls.neutral.items():
            if name in fields and name not in own:
                value = fields.pop(name)
                if not any(type(value) in (type(one), float) and value == one for one in allowed):
                    why = WHY.get(name, "leave it out")
                    raise wrong(f"{name} isn't supported with this value: {why}", name, "unsupported_value")
        unknown = [name for name in fields if name not in own]
        if unknown:
            named = ", ".join(name[:40] for name in unknown[:3]) + (", …" if unknown[3:] else "")
            other = next((f"; {name} goes to {ROUTES[name]}" for name in unknown if name in ROUTES), "")
            raise wrong(f"{named}: no such field here{other}", unknown[0][:80], "unknown_parameter")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise _refusal(error) from None


def _refusal(error: ValidationError) -> Refused:
    problems, first = [], None
    for problem in error.errors(include_url=False, include_context=False)[:3]:
        field = ".".join(map(str, problem["loc"])) or None
        first = first or field
        words = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        value = problem.get("input")
        got = "" if isinstance(value, dict | list | tuple) or problem["type"] == "missing" else f" (got {short(value)})"
        problems.append(f"{field}: {words}{got}")
    return wrong("; ".join(problems), first, "invalid_value")


def short(value: Any) -> str:
    shown = repr(value[:50] if isinstance(value, str) else value).encode("utf-8", "replace").decode()
    return shown if len(shown) <= 60 else shown[:59] + "…"
