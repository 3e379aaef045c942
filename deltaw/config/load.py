"""Reading a run file: YAML and overrides in, a `RunConfig` out, or every problem at once with its line."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deltaw.config.before import as_it_was
from deltaw.config.own_rows import at_home
from deltaw.config.problems import fields_at, meant, refusal
from deltaw.config.run import BEGUN, RunConfig
from deltaw.errors import InputError
from deltaw.files.paths import similar
from deltaw.files.run_yaml import PROBLEMS, Loader, not_yaml

SHORT = {"objective": "kind", "train.retain": "data"}  # sections for which a text alone stands: the field that it is
RECIPES = Path(__file__).parents[1] / "recipes"


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run file and apply `key.sub=value` overrides. Raises InputError that lists every problem."""
    path = Path(path)
    raw, node = read_yaml(path, "a run file is a mapping with base, data and output")
    begun = path.name == "config.yaml" and any((path.parent / name).exists() for name in BEGUN)
    keys = [_override(raw, item) for item in overrides]
    config = parse_config(raw, source=str(path), node=node, begun=begun, folder=path.parent, overrides=keys)
    return at_home(config, path.parent) if begun else config


def read_yaml(path: Path, what: str) -> tuple[dict[str, Any], yaml.Node | None]:
    """A file's mapping, and its tree for the line numbers. `what` it should be, for the error. Raises InputError."""
    text = read_text(shipped(path))
    try:
        node = yaml.compose(text, Loader=Loader)
        raw = yaml.load(text, Loader=Loader)
    except PROBLEMS as error:
        raise InputError(not_yaml(error, str(path), text)) from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: {what}; this is {_kind(raw)}")
    return raw, node


def config_of(given: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    """A config, what would stand in a run file as a mapping, or a run file. Raises InputError."""
    if isinstance(given, RunConfig):
        return given
    if isinstance(given, Mapping):
        return parse_config(given)
    path = Path(given).expanduser()
    if (path / "config.yaml").is_file():
        raise InputError(f"{path} is a run already", fix=f"resume it: deltaw.resume({str(path)!r})")
    return load_config(path)


def parse_config(
    raw: Mapping[str, Any],
    *,
    source: str = "config",
    node: yaml.Node | None = None,
    begun: bool = False,
    folder: Path = Path(),
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Validate a plain mapping. `node` (the YAML tree) lends the line numbers. `begun`: a run's own, accepted already,
    so a setting without an effect doesn't keep it from being read. `folder`: where files of metrics and rewards are
    looked for. `overrides`: the keys that don't stand in the file."""
    try:
        # JSON mode: a list is a tuple, an int is a float, and nothing else converts.
        given = json.dumps(as_it_was(raw) if begun else raw)
        config = RunConfig.model_validate_json(given, context=BEGUN if begun else None)
        named = {"evaluate": config.evaluate.located(folder), "objective": config.objective.located(folder)}
        return config.model_copy(update=named)
    except ValidationError as error:
        raise InputError(refusal(error, RunConfig, source, file=source, node=node, overrides=overrides)) from None
    except (TypeError, ValueError) as problem:
        raise InputError(f"{source} has 1 problem:\n  {source}: {problem}") from None


def shipped(path: Path) -> Path:
    """The recipe of that name that comes with deltaw, for recipes/NAME.yaml where there is no such file."""
    own = RECIPES / path.name
    return own if path.parent == Path("recipes") and not path.exists() and own.is_file() else path


def read_text(path: Path) -> str:
    """A small text file the user wrote. Raises InputError when it is missing, a folder, huge or not UTF-8."""
    try:
        if path.stat().st_size > 10_000_000:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes is too large for a run file")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file", fix=similar(path, None if path.parent.is_dir() else Path("."))
        ) from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, not a file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text", fix="save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def setting_meant(option: str) -> str | None:
    """What to write into a run file, or behind its name, for an option `--learning-rate` that there isn't."""
    word = option.lstrip("-").partition("=")[0].replace("-", "_")
    return f"did you mean {word}=…?" if word in fields_at(RunConfig, ()) else meant([word], RunConfig)


def _override(raw: dict[str, Any], item: str) -> str:
    """Apply one, and return its key."""
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise InputError(f"{item!r} is not an override", fix="write key=value, for example train.lr=1e-3")
    *parents, last = key.split(".")
    for depth, name in enumerate(parents, 1):
        raw[name] = _written_out(".".join(parents[:depth]), raw.get(name))
        raw = raw[name]
        if not isinstance(raw, dict):
            raise InputError(f"{item!r}: {name} is a single value, it has no fields")
    try:
        raw[last] = yaml.load(value, Loader=Loader)
    except PROBLEMS:
        raise InputError(f"{item!r:.200}: the value is not valid YAML") from None
    return key


def _written_out(section: str, value: Any) -> Any:
    """A section of which one field is to be set: one that is absent, or whose lines are all commented out, is empty,
    and a word that is short for one is what it is short for."""
    if value is None:
        return {}
    if section in SHORT and isinstance(value, str):
        return {SHORT[section]: value}
    return {"full": True} if (section, value) == ("adapter", "full") else value


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "empty"}.get(type(value), f"a {type(value).__name__}")
