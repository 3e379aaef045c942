"""The YAML of run files: YAML 1.2's scalars, nothing set twice, no aliases, and the line on which each value stands."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from deltaw.errors import InputError

LARGEST = 1_000_000  # bytes of a run's config.yaml
PROBLEMS = (yaml.YAMLError, RecursionError, ValueError)  # what reading raises


class Loader(yaml.SafeLoader):
    """YAML 1.2's scalars (`1e-3` is a number, `2024-01-01` a text), no duplicate keys and no aliases: ten lines of
    those can stand for gigabytes."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) aren't supported", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single value", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is set twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Puts quotes around a text that `Loader` would read as a number."""


for kind in (Loader, Dumper):
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """A run file as plain values, whatever they mean: of a run that another deltaw made. Raises InputError."""
    try:
        with path.open("rb") as file:
            raw = yaml.load(file.read(LARGEST).decode("utf-8-sig"), Loader=Loader)
    except PROBLEMS as error:
        raise InputError(not_yaml(error, str(path), "")) from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: isn't a mapping")
    return raw


def not_yaml(error: Exception, source: str, text: str) -> str:
    """The parser's complaint in one line, with the line it is about."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"{source}:{line}: not valid YAML: the character {chr(error.character)!r} is not allowed"
    mark = getattr(error, "problem_mark", None)
    where = f"{source}:{mark.line + 1}" if mark else source
    problem = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "problem", None) or error
    return f"{where}: not valid YAML: {problem}"


def line_of(node: yaml.Node | None, location: Iterable[Any]) -> int | None:
    """The line, counted from 1, of the innermost part of `location` that the tree has."""
    line = None
    for part in location:
        child = next(_children(node, part), None)
        if child is None:
            break
        line, node = child
    return line


def _children(node: yaml.Node | None, part: Any) -> Iterator[tuple[int, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                yield key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        yield node.value[part].start_mark.line + 1, node.value[part]
