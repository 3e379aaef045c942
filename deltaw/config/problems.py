"""What is wrong with a run file, a line per field, with the line of the file and the nearest name that exists."""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from deltaw.config.run import RunConfig
from deltaw.config.strict import Strict
from deltaw.files.run_yaml import line_of


def problems(error: ValidationError, source: str, node: yaml.Node | None) -> list[str]:
    """One line per field, names before values: a misspelt key explains the missing one, and only the first few show."""
    by_field: dict[tuple[Any, ...], Any] = {}
    for problem in error.errors():
        # A union's branch name (`str`, `int`) isn't a field of the file; its branches' problems are one problem.
        field = (
            tuple(p for p in problem["loc"] if p not in ("str", "int", "constrained-int") and "[" not in str(p))
            or problem["loc"]  # a key of the user's own that looks like one
        )
        words = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        words = words.replace("an object", "a mapping")
        if field in by_field and problem["type"] != "value_error":
            words = by_field[field]["msg"] + " or " + words.removeprefix("must be ")
        by_field[field] = {**problem, "loc": field, "msg": words}
    order = ("extra_forbidden", "missing")
    ranked = sorted(by_field.values(), key=lambda p: order.index(p["type"]) if p["type"] in order else len(order))
    return [_problem(problem, source, node) for problem in ranked]


def _problem(problem: Mapping[str, Any], source: str, node: yaml.Node | None) -> str:
    location = problem["loc"]
    field = ".".join(part if str(part).isprintable() else ascii(part) for part in map(str, location))
    line = line_of(node, location)
    where = f"{source}:{line}" if line else source
    if problem["type"] == "extra_forbidden":
        known = fields_at(RunConfig, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{where}: unknown key {field!r:.80}; {hint}"
    if problem["type"] == "missing":
        return f"{where}: {field!r} is missing"
    value = problem.get("input")
    got = f" (got {json.dumps(value, ensure_ascii=False):.60})" if not isinstance(value, dict | list) else ""
    return f"{where}: {field + ': ' if field else ''}{problem['msg']}{got}"


def fields_at(model: type[BaseModel], location: Iterable[Any]) -> list[str]:
    """The field names of the section at `location`, for near-miss hints."""
    for part in location:
        field = next((f for name, f in model.model_fields.items() if str(part) in (name, f.alias)), None)
        kinds = [field.annotation, *get_args(field.annotation)] if field else []
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), Strict)
    return [field.alias or name for name, field in model.model_fields.items()]


def similar_file(path: Path) -> str | None:
    """A hint at the entry of the same folder whose name is nearest."""
    folder = path.parent if path.parent.is_dir() else Path(".")
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    return f"did you mean {folder / near[0]}?" if near else None
