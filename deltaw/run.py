"""A run folder: where everything is, and what may be written there.

    config.yaml      the resolved run file            checkpoints/    step-000100/ …  (training/checkpoint.py)
    before.json      the base on the held-out rows    adapter/        the result, PEFT layout
    metrics.jsonl    a line per step and per eval     report.html     what the run did, for people
    result.json      the figures                      started.json    in which folder (config/places.py)
    references.safetensors    what the reference says of each answer (preferences; training/references.py)
    data/            rows that were given as values, not as files
    lineage.json     which adapter it started from, after which steps it was extended (where it was)
    result.step-000120.json, …    the figures of a finished run that was extended after that step
    .lock            who writes here (lock.py)

Everything in it is named relative to the folder, so it can be moved. result.json is written when everything else is
safe (the report only shows what is there), so a folder that has it is finished; `failed` in it names what couldn't be
measured. A folder that is not a run is never touched, whoever names it (a sweep.json may be damaged, or a stranger's);
of one that is replaced, only what is listed here goes. Files rot on disks and are edited by hand: a line of
metrics.jsonl that can't be read is left out and counted.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from deltaw.adapter.history import NOTHING, History
from deltaw.config import RunConfig, load_config
from deltaw.config.places import STARTED, record
from deltaw.errors import InputError, RunError, command
from deltaw.files.atomic import fsync, replacing, sweep, temporary_name, write_text_atomic
from deltaw.files.lock import claimed, held_in
from deltaw.files.output import check_writable
from deltaw.files.strict_json import NotJSON, parse, read_json

LAST = 50_000  # bytes of metrics.jsonl: some 300 lines
EARLIER = re.compile(r"result\.step-\d+\.json")
WORDS = ("skipped", "rows")  # of a line of metrics.jsonl; everything else in it is a number


@dataclass(frozen=True)
class Run:
    """The paths of one run."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def before(self) -> Path:
        return self.folder / "before.json"

    @property
    def references(self) -> Path:
        return self.folder / "references.safetensors"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def lineage(self) -> Path:
        return self.folder / "lineage.json"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @staticmethod
    def check(config: RunConfig, *, replace: bool = False) -> "Run":
        """Check that `output` can hold a new run, before any work is done or library loaded. Raises InputError."""
        run = Run(Path(config.output))
        with run.claimed(new=True, replace=replace):
            return run

    def check_resumable(self, wanted: Sequence[str] = (), *, extend: bool = False) -> None:
        """Check that here is a run that lacks something, or is finished and to `extend`, and that no other process is
        using it. `wanted`: the settings that it is to go on with. Raises InputError."""
        with self.resumed(wanted, extend=extend):
            pass

    @contextmanager
    def resumed(self, wanted: Sequence[str] = (), *, extend: bool = False) -> Iterator[bool]:
        """Inside the block the folder, whose run lacks something or is to be extended, belongs to this process alone.
        Gives whether all its steps are taken. Raises InputError."""
        if not self.config.is_file():
            fix = "start one: deltaw train run.yaml"
            raise InputError(f"{self.folder} isn't a run: it has no config.yaml", fix=fix)
        with self.claimed(new=False):
            finished = self.result.is_file()
            if extend and not finished:
                raise InputError(
                    f"{self.folder} isn't finished, so there is nothing to extend yet",
                    fix=f"finish it: {command('train', self.folder)}",
                )
            if finished and not extend and not self.read_json(self.result).get("failed"):
                more = command("train", self.folder, *(wanted or [self.longer()]), options=["--extend"])
                raise InputError(
                    f"{self.folder} is finished; its adapter is {self.adapter}",
                    fix=f"to train it further: {more}   to train again, choose another output",
                )
            yield finished

    def longer(self) -> str:
        """A setting under which a finished run would go on."""
        train = load_config(self.config).train
        if self.result.is_file() and self.read_json(self.result).get("stopped_early"):
            return "train.patience=null"
        return f"train.steps={2 * train.steps}" if train.steps else f"train.epochs={train.epochs + 1:g}"

    def extended(self, lineage: History, config: RunConfig) -> None:
        """A finished run is one that goes on: its result becomes one of earlier times. Until the last of these writes
        it is finished as it was."""
        earlier = self.folder / f"result.step-{lineage.extended_after[-1]:06}.json"
        self.write_lineage(lineage)
        self.write_config(config)
        try:
            self.result.replace(earlier)
            fsync(self.folder)
        except OSError as error:
            raise RunError(f"{self.result}: {error}") from None

    def read_lineage(self) -> History:
        """What lineage.json says; nothing where there is none. Raises InputError when it is broken."""
        return History.of(self.read_json(self.lineage), self.lineage) if self.lineage.is_file() else NOTHING

    def write_lineage(self, lineage: History) -> None:
        """lineage.json, whole or not at all."""
        self.write_json(self.lineage, lineage.to_json())

    @contextmanager
    def claimed(self, *, new: bool, replace: bool = False) -> Iterator[None]:
        """Inside the block the folder belongs to this process alone. `new`: it must not hold a run yet, unless it may
        be replaced. Raises InputError, also where it holds something and isn't a run. A folder that was made for the
        block and stays empty is removed again."""
        with claimed(self.folder, lambda: self._check(new, replace)):
            for folder in (self.folder, self.adapter, self.checkpoints):
                sweep(folder)
            yield

    def _check(self, new: bool, replace: bool) -> None:
        self.check_place()
        there = held_in(self.folder)
        begun, ours = self.config.is_file(), STARTED in {path.name for path in there}
        # What killed a run at its birth may have left what it writes before config.yaml, and nothing else.
        unborn = ours and not begun and all(self._writes(path) for path in there)
        if not there or unborn or (begun and not new):
            return
        if not begun:
            raise InputError(f"output {self.folder} exists and isn't a run", fix="choose another output")
        if not ours:
            raise InputError(
                f"output {self.folder} has a config.yaml, but nothing says that deltaw wrote it",
                fix="choose another output",
            )
        if not replace:
            raise InputError(
                f"output {self.folder} already holds a run",
                fix=f"resume it: {command('train', self.folder)}   start over: --replace   or choose another output",
            )

    def _writes(self, path: Path) -> bool:
        """Whether that is an entry of the folder which a run writes."""
        named = (self.config, self.before, self.references, self.metrics, self.result, self.lineage, self.report)
        folders = (self.checkpoints, self.adapter)
        others = STARTED, "data", "tensorboard", "wandb"
        return path in (*named, *folders) or path.name in others or bool(EARLIER.fullmatch(path.name))

    def check_place(self) -> None:
        """Raise InputError where no run can be written, whatever lies there."""
        check_writable(self.folder, f"output {self.folder}")
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output {self.folder} is not a folder", fix="choose another output")

    def create(self, config: RunConfig, files: Mapping[str, str] | None = None) -> None:
        """Write the resolved config and the files that belong to it into the claimed folder; what an earlier run wrote
        there is removed."""
        old = temporary_name(self.folder / "earlier")
        # The old config goes last, and before it the mark: until then the folder is a run that can be replaced.
        earlier = [path for path in self.folder.iterdir() if self._writes(path)]
        earlier.sort(key=lambda path: (path == self.config, path.name == STARTED))
        try:
            old.mkdir()
            for path in earlier:
                path.rename(old / path.name)
        except OSError as error:
            raise RunError(f"{self.folder}: the earlier run can't be removed: {error}") from None
        shutil.rmtree(old, ignore_errors=True)
        record(self.folder)
        for name, text in (files or {}).items():
            try:
                (self.folder / name).parent.mkdir(exist_ok=True)
            except OSError as error:
                raise RunError(f"{self.folder / name}: {error}") from None
            write_text_atomic(self.folder / name, text)
        self.write_config(config)
        fsync(self.folder.parent)

    def write_config(self, config: RunConfig) -> None:
        """config.yaml, whole or not at all."""
        write_text_atomic(self.config, config.to_yaml())

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl. Raises RunError when the disk refuses."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"{self.metrics}: {error}", fix="nothing was lost; free some space, then resume") from None

    def sync_metrics(self) -> None:
        """Make the lines so far survive a power cut. Raises RunError when the disk refuses."""
        try:
            if self.metrics.is_file():
                fsync(self.metrics)
                fsync(self.folder)
        except OSError as error:
            raise RunError(f"{self.metrics}: {error}", fix="nothing was lost; free some space, then resume") from None

    def cut_metrics(self, lines: int) -> int:
        """Keep the first `lines` lines, as they are: a resumed run writes the others again. How many of them can't be
        read, or are missing."""
        data = b"".join(line + b"\n" for line in self._metrics_lines()[:lines])
        with replacing(self.metrics, len(data)) as temporary:
            temporary.write_bytes(data)
        return lines - len(self.read_metrics())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that can be read."""
        return self.scan_metrics()[0]

    def scan_metrics(self) -> tuple[list[dict[str, Any]], int]:
        """The lines of metrics.jsonl, without what isn't a figure, and how many were left out or lost a part."""
        records = [_record(line) for line in self._metrics_lines()]
        return [record for record, _ in records if record], sum(not whole for _, whole in records)

    def last_metrics(self) -> list[dict[str, Any]]:
        """The last lines of metrics.jsonl that can be read, of a long one not all: for whoever looks at many runs."""
        try:
            with self.metrics.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LAST))
                lines = file.read(LAST).split(b"\n")
        except OSError:
            return []
        return [record for line in lines if (record := _record(line)[0])]

    def _metrics_lines(self) -> list[bytes]:
        """Only a line end ends a line: what a damaged one holds may look like one to Python."""
        text = self.metrics.read_bytes() if self.metrics.is_file() else b""
        return text.removesuffix(b"\n").split(b"\n") if text else []

    def write_json(self, path: Path, value: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, path: Path) -> dict[str, Any]:
        """Raises InputError when it is missing or broken."""
        size = path.stat().st_size if path.is_file() else 0  # before.json may have an answer to each of many rows
        return read_json(path, max_bytes=size, allow_nan=True)


def _record(line: bytes) -> tuple[dict[str, Any] | None, bool]:
    """A line's figures, and whether it is whole. None without a step, which says where it belongs."""
    try:
        value = parse(line, allow_nan=True)
    except NotJSON:
        return None, False
    if not isinstance(value, dict) or type(step := value.get("step")) is not int or not 0 <= step < 2**53:
        return None, False
    record = {name: figure for name, figure in value.items() if name in WORDS or is_number(figure)}
    return record, len(record) == len(value)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether what stood in a JSON file can be counted with; NaN and infinity can, an integer beyond any float not."""
    return type(value) in (int, float) and not 1e300 < abs(value) < math.inf
