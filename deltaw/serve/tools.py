"""`tools`, `tool_choice` and `parallel_tool_calls`: which functions an answer may call, and which it must.

Tools go into the chat template as they are; only where an answer is held to calls of them must each be OpenAI's, with
parameters that answers can be held to (schema.py). A call of anything but a function that was sent is text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaw.data.tool_calls import MOST_CALLS, CallForm, CallSplitter
from deltaw.serve.refused import Refused, wrong
from deltaw.serve.schema import check_schemas

TOOLS, CHOICE = "tools", "tool_choice"
MOST_TOOLS, LONGEST_NAME = 128, 128
NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Choice:
    """`shown`: the tools that the template is given; `names`: the functions that a call may name; `most`: how many
    calls there may be. `held`: where the answer must be calls, those of these functions, each with the schema of its
    arguments."""

    shown: Sequence[dict[str, Any]] = ()
    names: tuple[str, ...] = ()
    most: int = MOST_CALLS
    held: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Calling:
    """The calls that a request's answers may have, in the form of their template."""

    form: CallForm
    choice: Choice

    @property
    def shown(self) -> frozenset[int]:
        """The control tokens that an answer's text must have for calls to be found."""
        return frozenset(self.form.tokens.values())

    def splitter(self) -> CallSplitter:
        """For one answer."""
        return CallSplitter(self.form, self.choice.names, self.choice.most)


def choice_of(tools: Sequence[dict[str, Any]], choice: str | Mapping[str, Any], parallel: bool) -> Choice:
    """What a request wants. Raises Refused."""
    named = None if isinstance(choice, str) else _named(choice)
    if named is None and choice not in ("none", "auto", "required"):
        raise wrong(f"{CHOICE} must be none, auto, required or a function's name", CHOICE, "unsupported_value")
    if len(tools) > MOST_TOOLS:
        raise wrong(f"{TOOLS}: {len(tools):,} tools; at most {MOST_TOOLS}", TOOLS, "too_large")
    if choice == "none":
        return Choice()
    functions = [tool.get("function", tool) for tool in tools]
    names = [function.get("name") if isinstance(function, Mapping) else None for function in functions]
    known = tuple(name for name in names if isinstance(name, str) and name)
    most = MOST_CALLS if parallel else 1
    if choice == "auto":
        return Choice(tools, known, most)
    if not tools:
        raise wrong(f"{CHOICE}: there are no {TOOLS} to call", CHOICE)
    if named is not None and named not in known:
        raise wrong(f"{CHOICE}: no function of this name is among the {TOOLS}", CHOICE)
    held = {number: tool for number, tool in enumerate(tools) if named in (None, names[number])}
    schemas = [_parameters(f"{TOOLS}[{number}]", tool) for number, tool in held.items()]
    check_schemas({f"{TOOLS}[{number}].function.parameters": one[1] for number, one in zip(held, schemas, strict=True)})
    if len(dict(schemas)) < len(schemas):
        raise wrong(f"{TOOLS}: two functions have one name", TOOLS)
    return Choice(tools, known, most if named is None else 1, dict(schemas))


def _named(choice: Mapping[str, Any]) -> str:
    """The function that an answer must call."""
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) and function.keys() == {"name"} else None
    if choice.keys() != {"type", "function"} or choice["type"] != "function" or not isinstance(name, str):
        form = '{"type": "function", "function": {"name": …}}'
        raise wrong(f"{CHOICE}: an object must be {form}", CHOICE, "unsupported_value")
    return name


def _parameters(place: str, tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """A function's name, and the schema of its arguments, which are an object whatever else that says."""
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise _refused(place, 'must be {"type": "function", "function": {…}}')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise _refused(f"{place}.function", f"name must be a text of at most {LONGEST_NAME} printable characters")
    if parameters is None:
        return name, NOTHING
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise _refused(f"{place}.function", "parameters must be the schema of an object")
    return name, {**parameters, "type": "object"}


def _refused(place: str, what: str) -> Refused:
    return wrong(f"{place}: {what}", TOOLS, "invalid_value")
