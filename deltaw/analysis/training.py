"""What a run folder says about its training, as far as it can be read.

result.json and metrics.jsonl come from a disk that may have failed, from an older deltaw, from an editor. So each field
is used where it has the kind that it should have; one that is missing stays missing, one of another kind is left out
and named among `faults`. Whoever reads a `Training` therefore asks for a field with `get`, and never for its type.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.adapter.file import is_run
from deltaw.config import RunConfig, load_config
from deltaw.errors import InputError
from deltaw.run import Run, is_number

Metrics = list[dict[str, Any]]
Fault = Callable[[str], None]

FIGURES = (
    "trained_parameters", "steps", "best_step", "tokens", "supervised_tokens", "tokens_per_second", "peak_memory_bytes",
    "train_rows", "epoch_tokens", "planned_steps", "total_seconds", "processes")  # fmt: skip
WORDS = ("form", "dtype", "finished", "checkpointing")
LOST = ("tokens", "loss_before", "loss_after", "kl", "passages")
RETAIN = ("weight", "share", "tokens", "time_share", "kl")
ALWAYS = ("trained_parameters", "steps", "best_step", "tokens", "train_rows", "eval", "answers")  # by every version
ANSWER = ("prompt", "before", "after", "truth")
ANSWERS = 20  # at most; a run keeps ten


@dataclass(frozen=True)
class Training:
    """What a run folder holds beside its adapter. `result` has what is sound of result.json's fields that are asked for
    here, `raw` all of it."""

    config: RunConfig
    result: Mapping[str, Any]
    metrics: Metrics
    faults: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def epochs(self) -> float | None:
        """How often the data was gone through; None where the run doesn't say how many tokens that is."""
        seen, epoch = self.result.get("tokens"), self.result.get("epoch_tokens")
        if seen and epoch:
            return float(seen / epoch)
        return self.config.train.epochs if self.config.train.steps is None else None

    def to_json(self) -> dict[str, Any]:
        """result.json as it is, and every line of metrics.jsonl by column, null where a line hasn't it."""
        names = {name: None for line in self.metrics for name in line}
        columns = {name: [_finite(line.get(name)) for line in self.metrics] for name in names}
        return {**self.raw, "metrics": columns, "faults": list(self.faults)}


def read_training(folder: Path, config: RunConfig | None = None) -> Training | None:
    """None for an adapter folder, or a run that has no result yet. `config`: the run's, where it has been read."""
    run = Run(folder)
    if not is_run(folder) or not run.result.is_file():
        return None
    config = config or load_config(run.config)
    metrics, odd = run.scan_metrics()
    faults = [f"metrics.jsonl: {odd} of its lines can't be read, or not in full"] if odd else []
    try:
        stored = run.read_json(run.result)
        raw = json.loads(json.dumps(stored), parse_constant=lambda _: None)  # NaN isn't JSON
    except (InputError, RecursionError) as error:
        what = error.what if isinstance(error, InputError) else "result.json: nested too deeply"
        return Training(config, {}, metrics, (*faults, what))
    names: list[str] = []
    result = dict(_sound(stored, names.append))
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        faults.append(f"result.json: left out what can't be read: {shown}")
    return Training(config, result, metrics, tuple(faults), raw)


def _sound(raw: Mapping[str, Any], fault: Fault) -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields of result.json that are what they should be."""
    for name in ALWAYS:
        if name not in raw:
            fault(f"{name}, which is missing")
    yield from _numbers(raw, FIGURES, "", fault).items()
    yield from ((name, value) for name in WORDS if isinstance(value := raw.get(name), str))
    if (evaluation := _object(raw, "eval", fault)) is not None:
        sides = {side: _object(evaluation, side, fault) for side in ("before", "start", "after")}
        known = {side: figures_of for side, figures_of in sides.items() if figures_of is not None}
        figures = {
            side: _numbers(figures_of, tuple(figures_of), f"eval.{side}.", fault) for side, figures_of in known.items()
        }
        yield "eval", {**figures, **_numbers(evaluation, ("rows",), "eval.", fault)}
    if lost := _object(raw, "forgetting", fault):
        named = {"source": lost["source"]} if isinstance(lost.get("source"), str) else {}
        intervals = {name: _pair(lost, name, fault) for name in ("rise_interval", "kl_interval")}
        yield "forgetting", {**named, **_numbers(lost, LOST, "forgetting.", fault), **intervals}
    if retain := _object(raw, "retain", fault):
        named = {"data": retain["data"]} if isinstance(retain.get("data"), str) else {}
        yield "retain", {**named, **_numbers(retain, RETAIN, "retain.", fault)}
    for name in ("machine", "versions"):
        if words := _object(raw, name, fault):
            yield name, {key: value for key, value in words.items() if isinstance(value, str)}
    yield "answers", _answers(raw.get("answers") or [], fault)


def _answers(raw: Any, fault: Fault) -> list[dict[str, str | None]]:
    rows = raw[:ANSWERS] if isinstance(raw, list) else [raw]
    sound = [{name: row.get(name) for name in ANSWER} for row in rows if isinstance(row, dict)]
    sound = [row for row in sound if row["prompt"] and all(isinstance(words, str | None) for words in row.values())]
    if len(sound) < len(rows):
        fault("answers")
    return sound


def _numbers(raw: Mapping[str, Any], names: tuple[str, ...], where: str, fault: Fault) -> dict[str, float]:
    figures = {}
    for name in names:
        if is_number(value := raw.get(name)) and math.isfinite(value):
            figures[name] = value
        elif value is not None:
            fault(f"{where}{name if name.isprintable() else repr(name)}"[:60])
    return figures


def _object(raw: Mapping[str, Any], name: str, fault: Fault) -> Mapping[str, Any] | None:
    """Empty where nothing was measured, None where something else stands there."""
    value = raw.get(name)
    if isinstance(value, dict) or (name in raw and value is None):
        return value or {}
    if name in raw:
        fault(name)
    return None


def _pair(raw: Mapping[str, Any], name: str, fault: Fault) -> tuple[float, float] | None:
    match raw.get(name):
        case [low, high] if all(is_number(end) and math.isfinite(end) for end in (low, high)):
            return low, high
        case None:
            return None
    fault(name)
    return None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
