"""`data.train` and `data.eval`: where rows come from.

    train: rows.jsonl                                              one source
    train: [a.jsonl, {path: "b/*.jsonl", weight: 2.0}]             several, each with how often its rows are seen
    train: [{prompt: …, completion: …}, …]                         the rows themselves, as Python has them
    eval: 100   eval: 0.1                                          so many of the rows of train, or such a share

A weight says how often each row of a source is seen in an epoch: 2 is twice, 0.5 is half of the rows (prepare.py
chooses). Other tools' weights are shares of what is drawn, which have no epoch and never end; here the shares follow,
and the preview shows them.

Rows that are given are copied through JSON, so that what is trained on can be written down: a run writes them into its
folder and its config names that file (own_rows.py).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator

from deltaw.config.strict import MANY, Strict
from deltaw.files.paths import PathText, expand, public_name, written

Row = dict[str, Any]
ROWS = "the rows given"  # their name, in place of a path
KEYS = {"path", "weight"}
WRONG = "must be a source (a file, folder, pattern, builtin: or hub name), a list of them, or a list of rows"


class WeightedSource(Strict):
    """A source and how often each of its rows is seen in an epoch."""

    path: PathText = Field(min_length=1)
    weight: float = Field(1.0, gt=0, le=1000, allow_inf_nan=False)

    def __str__(self) -> str:
        return self.path if self.weight == 1 else f"{self.path} x {self.weight:g}"


SourceValue = str | tuple[str | WeightedSource, ...] | tuple[Row, ...]


def sources_of(value: SourceValue) -> tuple[WeightedSource, ...]:
    """The sources that a value names; none where it is rows."""
    given: Sequence[Any] = (value,) if isinstance(value, str) else value
    named = [WeightedSource(path=written(one)) if isinstance(one, str) else one for one in given]
    return tuple(one for one in named if isinstance(one, WeightedSource))


def rows_given(value: SourceValue) -> tuple[Row, ...]:
    """The rows that a value is; none where it names sources."""
    return () if isinstance(value, str) else tuple(one for one in value if isinstance(one, dict))


def label(value: SourceValue) -> str:
    """A value in a few words, with whole names."""
    rows = rows_given(value)
    return f"{ROWS} ({len(rows):,})" if rows else " + ".join(map(str, sources_of(value)))


def with_names(value: SourceValue, rename: Callable[[str], str]) -> SourceValue:
    """The same with each source's name replaced."""
    if isinstance(value, str):
        return rename(value)
    if rows_given(value):
        return value
    named = sources_of(value)
    return tuple(source.model_copy(update={"path": rename(source.path)}) for source in named)


def public(value: SourceValue) -> str:
    """`label` without the folders of this machine."""
    return label(with_names(value, public_name))


def _sources(value: Any) -> SourceValue:
    if isinstance(value, str):
        return _name(value)
    if not isinstance(value, list | tuple):
        raise ValueError(WRONG + _of_python(value))
    if not value:
        raise ValueError("is an empty list")
    rows = [isinstance(one, Mapping) and not set(one) <= KEYS for one in value]
    if all(rows):
        return tuple(_row(number, one) for number, one in enumerate(value, 1))
    if any(rows):
        raise ValueError(f"item {rows.index(True) + 1} is a row, and others are names of sources: one kind in a list")
    items = tuple(_item(number, one) for number, one in enumerate(value, 1))
    names = [source.path for source in sources_of(items)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} is named twice; to see its rows twice: {{path: {twice}, weight: 2}}")
    return items


def _name(value: str) -> str:
    if not value:
        raise ValueError(WRONG)
    return expand(value)


def _item(number: int, value: Any) -> str | WeightedSource:
    if isinstance(value, WeightedSource):
        return value
    if isinstance(value, str):
        return _name(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"item {number} {WRONG.partition(',')[0]}, or {{path: …, weight: 2}}")
    if not isinstance(value.get("path"), str) or not value["path"]:
        raise ValueError(f"item {number} has no path")
    weight = value.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1000:
        raise ValueError(f"item {number}: weight must be a number above 0, at most 1000")
    return WeightedSource(path=value["path"], weight=float(weight))


def _row(number: int, value: Mapping[str, Any]) -> Row:
    try:
        return dict(json.loads(json.dumps(dict(value), allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"row {number} can't be written as JSON: {error}") from None


def _of_python(value: Any) -> str:
    """What to write for what other libraries call a set."""
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return '; of a DataFrame: .to_dict("records")'
    return "; of what is iterated over: list(…)" if hasattr(value, "__iter__") and not isinstance(value, dict) else ""


def _held_out(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        if value is None:
            return None
    elif isinstance(value, int):
        if 1 <= value <= MANY:
            return value
    elif isinstance(value, float):
        if 0 < value < 1:
            return value
    else:
        return _sources(value)
    raise ValueError("must be a number of rows (1 or more), a share of them (0.1), or a source of its own")


def _dumped(value: Any) -> Any:
    if isinstance(value, str):
        return written(value)
    if not isinstance(value, tuple):
        return value
    if rows_given(value):
        return list(value)
    return [written(one) if isinstance(one, str) else one.model_dump(mode="json") for one in value]


Sources = Annotated[SourceValue, PlainValidator(_sources), PlainSerializer(_dumped)]
HeldOut = Annotated[int | float | SourceValue | None, PlainValidator(_held_out), PlainSerializer(_dumped)]
