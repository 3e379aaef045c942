"""A sweep's folder: sweep.json, the page, and the lock; the runs are ordinary run folders, most of them in it.

    sweep.json     which runs, where, and what became of those that ended early; written whole or not at all
    sweep.html     the page (page.py)
    started.json   in which folder it was started, as a run has it (config/places.py)

What a run has come to is read off its own folder, which is the truth: a run with a result.json is finished, whoever
finished it (`deltaw train FOLDER` may take one further that was stopped here). sweep.json adds only why a run isn't to
be gone on with: it failed by itself, or halving stopped it. So a sweep that was killed at any moment is resumed from
its folder, and one that is finished can be looked at again.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltaw.config import parse_config
from deltaw.config.places import STARTED, record
from deltaw.errors import InputError, command
from deltaw.files.atomic import write_text_atomic
from deltaw.files.lock import claimed, holds_anything
from deltaw.files.output import check_writable
from deltaw.files.strict_json import read_json
from deltaw.run import Run
from deltaw.sweep.grid import Grid, Variant

FILE, PAGE = "sweep.json", "sweep.html"
FORMAT, LARGEST = 1, 50_000_000
FAILED, HALVED = "failed", "halved"
START = "start one: deltaw sweep run.yaml train.lr=1e-4,3e-4"


@dataclass(frozen=True)
class Rung:
    """Where halving looked: after which share of its steps each run was, with which loss (None: not finite)."""

    share: float
    losses: Mapping[str, float | None]

    def to_json(self) -> dict[str, Any]:
        return {"share": self.share, "losses": dict(self.losses)}


@dataclass(frozen=True)
class Ended:
    """Why a run of a sweep isn't gone on with: `FAILED` or `HALVED`, and words."""

    state: str
    why: str


@dataclass(frozen=True)
class SweepFolder:
    """A sweep, and what became of its runs as far as they don't say so themselves."""

    grid: Grid
    ended: Mapping[str, Ended] = field(default_factory=dict)
    rungs: tuple[Rung, ...] = ()

    @property
    def path(self) -> Path:
        return self.grid.folder

    @property
    def page(self) -> Path:
        return self.path / PAGE

    def run(self, variant: Variant) -> Run:
        return Run(Path(variant.config.output))

    def is_finished(self, variant: Variant) -> bool:
        return self.run(variant).result.is_file()

    @property
    def to_train(self) -> list[Variant]:
        """The runs that are left."""
        return [v for v in self.grid.variants if v.name not in self.ended and not self.is_finished(v)]

    def with_ended(self, name: str, state: str, why: str) -> "SweepFolder":
        return replace(self, ended={**self.ended, name: Ended(state, why)})

    def with_rung(self, rung: Rung) -> "SweepFolder":
        return replace(self, rungs=(*self.rungs, rung))

    def write(self) -> None:
        """Raises RunError when the disk refuses."""
        runs = [
            {
                "name": variant.name,
                "folder": os.path.relpath(variant.config.output, self.path),
                "settings": dict(variant.settings),
                "config": variant.config.model_dump(mode="json"),
            }
            for variant in self.grid.variants
        ]
        ended = {name: {"state": one.state, "why": one.why} for name, one in self.ended.items()}
        rungs = [rung.to_json() for rung in self.rungs]
        raw = {"format": FORMAT, "halving": self.grid.halving, "runs": runs, "ended": ended, "rungs": rungs}
        write_text_atomic(self.path / FILE, json.dumps(raw, indent=2, ensure_ascii=False) + "\n")

    def begin(self) -> None:
        """Write it for the first time."""
        if not (self.path / STARTED).exists():
            record(self.path)
        self.write()

    @staticmethod
    def read(folder: Path) -> "SweepFolder":
        """Raises InputError where there is none, or it can't be read."""
        file = folder / FILE
        if not file.is_file():
            raise InputError(f"{folder} isn't a sweep: it has no {FILE}", fix=START)
        raw = read_json(file, max_bytes=LARGEST)
        try:
            if raw["format"] != FORMAT:
                raise InputError(f"{file} is of another version of deltaw")
            variants = []
            for one in raw["runs"]:
                config = parse_config(one["config"], source=f"{file}, {one['name']}", begun=True)
                place = os.path.normpath(folder / one["folder"])
                settings = {_text(key): value for key, value in one["settings"].items()}
                variants.append(Variant(_text(one["name"]), config.model_copy(update={"output": place}), settings))
            ended = {name: Ended(_text(one["state"]), _text(one["why"])) for name, one in raw["ended"].items()}
            rungs = tuple(_rung(one) for one in raw["rungs"])
            if not variants:
                raise ValueError("it has no runs")
            return SweepFolder(Grid(folder, tuple(variants), bool(raw["halving"])), ended, rungs)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"{file} is damaged: {error!r}", fix="its runs are intact: deltaw train resumes each"
            ) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} isn't a text")
    return value


def _rung(raw: Mapping[str, Any]) -> Rung:
    losses = {name: None if loss is None else float(loss) for name, loss in raw["losses"].items()}
    return Rung(float(raw["share"]), losses)


def is_sweep(folder: Path) -> bool:
    return (folder / FILE).is_file()


def begun_before(grid: Grid) -> SweepFolder | None:
    """The sweep that this command line has begun already, if it has. Raises InputError for another one there."""
    if not is_sweep(grid.folder):
        return None
    there = SweepFolder.read(grid.folder)
    if _asked(there.grid) != _asked(grid):
        raise InputError(
            f"output {grid.folder} already holds another sweep",
            fix=f"go on with that: {command('sweep', grid.folder)}   start over: --replace   or choose another output",
        )
    return there


def _asked(grid: Grid) -> Any:
    """What a sweep was asked to do, wherever it lies."""
    return grid.halving, [(v.name, {**v.config.model_dump(mode="json"), "output": ""}) for v in grid.variants]


@contextmanager
def held(grid: Grid, *, new: bool, replace: bool = False) -> Iterator[None]:
    """Inside, the sweep's folder is this process's alone. `new`: no run may lie in it yet. Raises InputError."""

    def check() -> None:
        check_writable(grid.folder, f"output {grid.folder}")
        if Run(grid.folder).config.is_file():
            raise InputError(f"output {grid.folder} is a run already", fix="choose another output")
        if not new:
            return
        for variant in grid.variants:
            Run(Path(variant.config.output)).check_place()
            if Run(Path(variant.config.output)).config.is_file() and not replace:
                raise InputError(
                    f"{variant.config.output} already holds a run",
                    fix="start over: --replace   or choose another output",
                )
        if holds_anything(grid.folder) and not is_sweep(grid.folder):
            raise InputError(f"output {grid.folder} exists and isn't a sweep", fix="choose another output")

    with claimed(grid.folder, check):
        yield
