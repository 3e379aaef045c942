"""README's table of what is supported is true: what it names exists where it says yes, and is refused where it says no.

A name is a verb with its option (`deltaw export --push`) or a setting of the run file (`train.patience`).
"""

import re
from pathlib import Path

import pytest
import typer

from deltaw.cli.app import app
from deltaw.config import RunConfig, parse_config
from deltaw.errors import InputError

PAGE = Path(__file__).parents[1] / "README.md"
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SECTIONS = tuple(f"{name}." for name in RunConfig.model_fields)
RUN = {"base": "b", "data": {"train": "t"}, "output": "o"}


def rows() -> list[tuple[str, str, str]]:
    text = PAGE.read_text(encoding="utf-8").partition("\n## What is supported\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| (.+?) \| (yes|no|untested) \| (.+) \|$", text, re.M)
    assert len(found) == len(re.findall(r"^\|", text, re.M)) - 2, "a row that says neither yes, no nor untested"
    return found


ROWS = rows()


@pytest.mark.parametrize(("what", "answer", "where"), ROWS, ids=[what for what, _, _ in ROWS])
def test_what_is_said_to_be_supported_is(what: str, answer: str, where: str) -> None:
    names = [
        name for name in re.findall(r"`([^`]+)`", where) if name.startswith(("deltaw ", *SECTIONS, "base_weights"))
    ]
    refused_at_once = "WSL" in where  # tests/cli/test_verbs.py
    assert names or answer != "no" or refused_at_once, "a thing that isn't supported names what a user would try"
    for name in names:
        assert exists(name) == (answer == "yes"), name


def exists(name: str) -> bool:
    if name.startswith("deltaw "):
        _, verb, *options = name.split()
        return verb in VERBS and all(any(option in p.opts for p in VERBS[verb].params) for option in options)
    if name.startswith("base_weights: "):
        return parse_config({**RUN, "base_weights": name.partition(": ")[2]}) is not None
    section, _, field = name.partition(".")
    fields = RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    known = field in fields or field in {one.alias for one in fields.values()}
    if not known:
        with pytest.raises(InputError):
            parse_config({**RUN, section: {**RUN.get(section, {}), field: True}})  # type: ignore[dict-item]
    return known


def test_a_run_can_not_be_had_of_what_is_not_there() -> None:
    assert exists("deltaw train --replace") and exists("train.lr")
    assert not exists("deltaw train --nothing") and not exists("deltaw nothing") and not exists("train.nothing")
