"""What is wrong with a run file, a line per field, with the line of the file and what was probably meant.

An unknown key may be a setting of another section, another tool's word for one (hints.py), or a slip of the pen; they
are looked for in this order, since a word that means something elsewhere is seldom a misspelt other one.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from deltaw.config.hints import in_section, named_here, of_value, of_word
from deltaw.errors import MAX_LISTED, listed
from deltaw.files.run_yaml import line_of

MAPPING = re.compile("an object|a valid dictionary or instance of [A-Za-z]+")  # pydantic's words for one
SLIP, GUESS = 0.75, 0.5  # how alike two words are, of which one is surely the other's misspelling, or may be


def refusal(
    error: ValidationError,
    root: type[BaseModel],
    name: str,
    *,
    section: str = "",
    file: str = "",
    node: Any = None,
    overrides: Sequence[str] = (),
    words: Mapping[str, str] | None = None,
) -> str:
    """All that is wrong with `name`, a value of `root`. `section`: where in the run file that stands; `file` and its
    YAML tree: where it was read from; `overrides`: the keys that were given beside it. `words`: what other tools call a
    key of a file that is no run file: what to do instead."""
    found = _ranked(error)
    lines = _renamed(found, section, file) if len(found) > MAX_LISTED and words is None else []
    left = [problem for problem in found if not (lines and _other_name(problem))]
    for problem in left:
        line = line_of(node, problem["loc"])
        where = f"{file}:{line}: " if line else f"{file}: " if file else ""
        if any(f"{'.'.join(map(str, problem['loc']))}.".startswith(f"{key}.") for key in overrides):
            where = "override: "
        lines.append(where + _problem(problem, root, section, words))
    return "\n".join([f"{name} has {len(found)} problem{'s' * (len(found) > 1)}:", listed(lines)])


def _ranked(error: ValidationError) -> list[dict[str, Any]]:
    """One problem per field, names before values: a misspelt key explains the missing one, and only the first show."""
    by_field: dict[tuple[Any, ...], Any] = {}
    for problem in error.errors():
        # A union's branch name (`str`, `int`) isn't a field of the file; its branches' problems are one problem.
        field = (
            tuple(p for p in problem["loc"] if p not in ("str", "int", "constrained-int") and "[" not in str(p))
            or problem["loc"]  # a key of the user's own that looks like one
        )
        words = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        words = MAPPING.sub("a mapping", words)
        if field in by_field and problem["type"] != "value_error":
            words = by_field[field]["msg"] + " or " + words.removeprefix("must be ")
        by_field[field] = {**problem, "loc": field, "msg": words}
    order = ("extra_forbidden", "missing")
    return sorted(by_field.values(), key=lambda p: order.index(p["type"]) if p["type"] in order else len(order))


def _renamed(found: Sequence[Mapping[str, Any]], section: str, file: str) -> list[str]:
    """All keys that only have another name here, in one line: of another tool's file few would show otherwise."""
    names = {str(problem["loc"][-1]): name for problem in found if (name := _other_name(problem))}
    if len(names) < 2:
        return []
    pairs = ", ".join(f"{key} → {in_section(name, section)}" for key, name in names.items())
    return [f"{file + ': ' if file else ''}these have other names here: {pairs}"]


def _other_name(problem: Mapping[str, Any]) -> str | None:
    return named_here(str(problem["loc"][-1])) if problem["type"] == "extra_forbidden" else None


def _problem(problem: Mapping[str, Any], root: type[BaseModel], section: str, words: Mapping[str, str] | None) -> str:
    location = problem["loc"]
    field = ".".join(part if str(part).isprintable() else ascii(part) for part in map(str, location))
    if problem["type"] == "extra_forbidden":
        known = f"known: {', '.join(fields_at(root, location[:-1]))}"
        hint = meant(location, root, section) if words is None else _meant_in(words, location, root)
        return f"unknown key {field!r:.80}; {hint or known}"
    if problem["type"] == "missing":
        return f"{field!r} is missing"
    value = problem.get("input")
    got = f" (got {_shown(value):.60})" if not isinstance(value, dict | list) else ""
    hint = of_value(".".join([section, field] if section else [field]), value) if words is None else None
    return f"{field + ': ' if field else ''}{problem['msg']}{got}" + (f"; {hint}" if hint else "")


def meant(location: Sequence[Any], root: type[BaseModel], section: str = "") -> str | None:
    """What an unknown key was probably meant to be, as advice; None where nothing is like it."""
    *parents, key = map(str, location)
    here, known = ".".join([section, *parents] if section else parents), fields_at(root, parents)
    elsewhere = [f"{name}.{key}" for name in fields_at(root, ()) if key in fields_at(root, [name])]
    if len(elsewhere) == 1:
        return f"did you mean {in_section(elsewhere[0], here)!r}?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=SLIP)
    if said := of_word(key, here, slips=not near):
        return said
    if near := near or difflib.get_close_matches(key, known, n=1, cutoff=GUESS):
        return f"did you mean {near[0]!r}?"
    everywhere = {f"{name}.{field}": field for name in fields_at(root, ()) for field in fields_at(root, [name])}
    close = difflib.get_close_matches(key, everywhere.values(), n=1, cutoff=SLIP)
    if close:
        return f"did you mean {next(path for path, field in everywhere.items() if field == close[0])!r}?"
    return None


def _meant_in(words: Mapping[str, str], location: Sequence[Any], root: type[BaseModel]) -> str | None:
    """The same in a file that is no run file."""
    key = str(location[-1])
    near = difflib.get_close_matches(key, fields_at(root, location[:-1]), n=1, cutoff=SLIP)
    return f"did you mean {near[0]!r}?" if near else words.get(key.lower().replace("-", "_"))


def fields_at(model: type[BaseModel], location: Iterable[Any]) -> list[str]:
    """The field names of the section at `location`, for near-miss hints."""
    for part in location:
        if isinstance(part, int):  # an item of a list: its fields are those of any
            continue
        field = next((f for name, f in model.model_fields.items() if str(part) in (name, f.alias)), None)
        model = next(_sections(field.annotation), BaseModel) if field else BaseModel
    return [field.alias or name for name, field in model.model_fields.items()]


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Those that a field's type names, also in an `Annotated` or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _shown(value: Any) -> str:
    """As JSON has it; what a run file can't hold, as Python has it."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return repr(value)
