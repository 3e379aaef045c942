"""Ollama's side of a Modelfile, as far as deltaw writes one: its lines, and Go's templates.

Written after Ollama's parser and Go's text/template: a value ends at the line's end unless it is quoted, what isn't
printable is lost; actions are if, else if, else, end, range, fields, strings, eq, not, len and slice. What else stands
in a template is an error here.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

ACTION = re.compile(r'\{\{((?:"(?:\\.|[^"\\])*"|[^"}])*)\}\}')


def commands(text: str) -> list[tuple[str, str]]:
    """(command, value) of every line; PARAMETER's value is its name and value."""
    made, lines = [], iter(text.split("\n"))
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        first = ""
        if name == "PARAMETER":
            first, _, value = value.partition(" ")
            first += " "
        while (read := _unquoted(value)) is None:
            value += "\n" + next(lines)
        made.append((name, first + "".join(sign for sign in read if sign in "\n\t" or sign.isprintable())))
    return made


def _unquoted(value: str) -> str | None:
    value = value.strip()
    for quote in ('"""', '"'):
        if value.startswith(quote):
            ended = value.endswith(quote) and len(value) >= 2 * len(quote)
            return value[len(quote) : -len(quote)] if ended else None
    return value


def expand(template: str, messages: Sequence[dict[str, str]]) -> str:
    """What the template writes, given what Ollama gives it."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    nodes = iter(_parts(template))
    body, end = _body(nodes)
    assert end is None
    values = {"System": system, "Messages": list(messages), "Prompt": messages[-1]["content"]}
    return "".join(_run(body, {"$": values, ".": values}))


def _parts(template: str) -> Iterator[tuple[str, str]]:
    at = 0
    while (start := template.find("{{", at)) >= 0:
        yield "text", template[at:start]
        match = ACTION.match(template, start)
        assert match, f"no action: {template[start : start + 40]!r}"
        yield "action", match[1].strip()
        at = match.end()
    yield "text", template[at:]


def _body(parts: Iterator[tuple[str, str]]) -> tuple[list[Any], str | None]:
    """Nodes up to the end or else that closes them."""
    nodes: list[Any] = []
    for kind, text in parts:
        if kind == "text":
            nodes.append(("text", text))
        elif text == "end" or text.startswith("else"):
            return nodes, text
        elif text.startswith("if "):
            nodes.append(_choice(text.removeprefix("if "), parts))
        elif text.startswith("range "):
            head = re.fullmatch(r"range (\$\w+), \$_ := (\S+)", text)
            assert head, text
            inner, end = _body(parts)
            assert end == "end"
            nodes.append(("range", head[1], head[2], inner))
        else:
            nodes.append(("value", text))
    return nodes, None


def _choice(condition: str, parts: Iterator[tuple[str, str]]) -> Any:
    inner, end = _body(parts)
    other: list[Any] = []
    if end == "else":
        other, end = _body(parts)
        assert end == "end"
    elif end is not None and end.startswith("else if "):
        other = [_choice(end.removeprefix("else if "), parts)]
    else:
        assert end == "end"
    return ("if", condition, inner, other)


def _run(nodes: list[Any], scope: dict[str, Any]) -> Iterator[str]:
    for kind, *rest in nodes:
        if kind == "text":
            yield rest[0]
        elif kind == "value":
            yield str(_value(rest[0], scope))
        elif kind == "if":
            yield from _run(rest[1] if _value(rest[0], scope) else rest[2], scope)
        else:
            for number, message in enumerate(_value(rest[1], scope)):
                fields = {"Role": message["role"], "Content": message["content"]}
                yield from _run(rest[2], {**scope, ".": fields, rest[0]: number})


def _value(text: str, scope: dict[str, Any]) -> Any:
    words = _words(text)
    if words[0] == "eq":
        return _value(words[1], scope) == _value(words[2], scope)
    if words[0] == "not":
        return not _value(words[1], scope)
    if words[0] == "len":
        return len(_value(words[1], scope))
    if words[0] == "slice":
        return _value(words[1], scope)[_value(words[2], scope) :]
    (word,) = words
    if word.startswith("("):
        return _value(word[1:-1], scope)
    if word.startswith('"'):
        return re.sub(r"\\(U[0-9a-f]{8}|.)", lambda part: _sign(part[1]), word[1:-1])
    if word.isdigit():
        return int(word)
    if word.startswith("$."):
        return scope["$"][word[2:]]
    return scope["."][word[1:]] if word.startswith(".") else scope[word]


def _sign(escape: str) -> str:
    assert escape[0] == "U" or escape in '"\\'
    return chr(int(escape[1:], 16)) if escape[0] == "U" else escape


def _words(text: str) -> list[str]:
    """Split at spaces outside of brackets and strings."""
    words, depth = [""], 0
    for part in re.findall(r'"(?:\\.|[^"\\])*"|.', text, re.DOTALL):
        depth += {"(": 1, ")": -1}.get(part, 0)
        if part == " " and not depth:
            words.append("")
        else:
            words[-1] += part
    return [word for word in words if word]
