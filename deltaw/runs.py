"""The runs in a folder, each as far as it can be read.

A folder of runs grows for months: some were stopped, some are from another deltaw, a disk has eaten a file of some.
Each is read by itself and as plain values (not as a run file, whose settings may since have other names), and what
can't be read is missing in its entry, never an error. Only small files are opened, of metrics.jsonl only the end, and
no torch: hundreds of runs take a second or two.

    running       a living process holds its lock            finished     it has a result.json
    interrupted   neither, and it can be resumed             broken       config.yaml or result.json can't be read
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from deltaw.config import METRICS
from deltaw.errors import InputError
from deltaw.files.lock import LOCK, in_use
from deltaw.files.paths import no_such
from deltaw.files.run_yaml import read_mapping
from deltaw.run import Run, is_number

DEPTH = 3  # folders below the one that is named: runs/studies/rank/seed-0
MARKS = ("before.json", "metrics.jsonl", "checkpoints", "result.json", LOCK)  # one lies in a run besides its config
LOSSES = ("loss", "perplexity")


@dataclass(frozen=True)
class Entry:
    """A run: its settings as they were written, its figures where it has them. `loss` and `metrics`: on the held-out
    rows, after the training or as measured last; `train_loss`: of the last step. `when`: it ended or last changed."""

    name: str
    state: str
    base: str | None = None
    data: str | None = None
    lr: float | None = None
    rank: int | str | None = None
    steps: int | None = None
    loss: float | None = None
    train_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    parameters: int | None = None
    adapter_bytes: int | None = None
    failed: list[str] = field(default_factory=list)
    problem: str | None = None
    when: float = 0.0

    def to_json(self) -> dict[str, Any]:
        moment = datetime.fromtimestamp(self.when).astimezone().isoformat(timespec="seconds")
        return {**asdict(self), "when": moment}


def list_runs(folder: str | Path) -> list[Entry]:
    """Every run in `folder` or up to `DEPTH` folders below it; of a run itself, that one. The newest first. Raises
    InputError where there is no such folder."""
    root = Path(folder)
    if not root.exists():
        missing = no_such(root)
        raise InputError(missing.what, fix=f"{missing.fix}; a run lies where its run file's `output` says")
    if not root.is_dir():
        raise InputError(f"{root}: is a file, not a folder of runs")
    entries = [_entry(Run(path), str(path.relative_to(root)) if path != root else root.name) for path in _runs(root)]
    return sorted(entries, key=lambda entry: (-entry.when, entry.name))


def ranked(entries: list[Entry], by: str) -> list[Entry]:
    """By when (newest first), name, loss or a metric (best first); those without the figure last. Raises InputError."""
    if by == "when":
        return entries
    if by == "name":
        return sorted(entries, key=lambda entry: entry.name)
    directions = {"loss": False} | {name: entry.higher_is_better[name] for entry in entries for name in entry.metrics}
    if by not in directions:
        raise InputError(f"can't sort by {by!r}", fix=f"there is: when, name, {', '.join(directions)}")

    def key(entry: Entry) -> float:
        value = entry.loss if by == "loss" else entry.metrics.get(by)
        return math.inf if value is None else -value if directions[by] else value

    return sorted(entries, key=key)


def _runs(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Runs in it, none inside another one."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    names = {entry.name for entry in entries}
    if ("config.yaml" in names or {"adapter", "result.json"} <= names) and not names.isdisjoint(MARKS):
        yield folder
    elif depth:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir():
                yield from _runs(Path(entry.path), depth - 1)


def _entry(run: Run, name: str) -> Entry:
    problems: list[str] = []
    config = _read(lambda: read_mapping(run.config), problems)
    finished = run.result.is_file()
    result = _read(lambda: run.read_json(run.result), problems) if finished else {}
    evaluation = _mapping(result, "eval")
    after = {
        name: value
        for name, value in _mapping(evaluation, "after").items()
        if is_number(value) and math.isfinite(value)
    }
    lines = run.last_metrics()
    steps, eval_loss, train_loss = (_last(lines, name) for name in ("step", "eval_loss", "loss"))
    metrics = {name: value for name, value in after.items() if name not in LOSSES}
    known = {name: value for name, value in _mapping(evaluation, "higher_is_better").items() if isinstance(value, bool)}
    adapter, train = config.get("adapter"), _mapping(config, "train")
    state = (
        "running" if in_use(run.folder / LOCK) else "broken" if problems else "finished" if finished else "interrupted"
    )
    return Entry(
        name=name,
        state=state,
        base=_text(config.get("base")),
        data=_text(_mapping(config, "data").get("train")),
        lr=_number(train.get("lr")),
        rank=_rank(adapter),
        steps=_whole(result.get("steps")) or _whole(steps),
        loss=after.get("loss", eval_loss),
        train_loss=train_loss,
        metrics=metrics,
        higher_is_better={name: known.get(name, METRICS.get(name, True)) for name in metrics},
        parameters=_whole(result.get("trained_parameters")),
        adapter_bytes=_size(run.adapter / "adapter_model.safetensors"),
        failed=[str(name) for name in _mapping(result, "failed")],
        problem="; ".join(problems) or None,
        when=_moment(result.get("finished")) or max(map(_changed, (run.config, run.metrics, run.result))),
    )


def _read(read: Any, problems: list[str]) -> Mapping[str, Any]:
    """What it reads, or nothing and why."""
    try:
        value: Mapping[str, Any] = read()
        return value
    except (InputError, RecursionError) as error:
        problems.append(error.what.splitlines()[0] if isinstance(error, InputError) else "nested too deeply")
        return {}


def _mapping(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _last(lines: list[dict[str, Any]], name: str) -> float | None:
    values = (line[name] for line in reversed(lines) if name in line and math.isfinite(line[name]))
    return next(values, None)


def _text(value: Any) -> str | None:
    """Of a source: its name, or the first of several and how many more there are."""
    if isinstance(value, list) and value:
        more = f" + {len(value) - 1}" if len(value) > 1 else ""
        return f"{_text(value[0])}{more}"
    return value if isinstance(value, str) or value is None else json.dumps(value, default=str)


def _rank(adapter: Any) -> int | str | None:
    if adapter == "full" or (isinstance(adapter, dict) and adapter.get("full") is True):
        return "full"
    return _whole(adapter.get("rank")) if isinstance(adapter, dict) else None


def _number(value: Any) -> float | None:
    return value if is_number(value) and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _moment(written: Any) -> float | None:
    """Of a finished run: a copied folder's files have the time of the copy."""
    try:
        return datetime.fromisoformat(written).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
