"""A run folder: what lies where, and what may be written there.

    config.yaml      the resolved run file            checkpoints/    step-000100/ …  (checkpoint.py)
    before.json      the base on the held-out rows    best/           the best adapter so far, PEFT layout
    metrics.jsonl    a line a step, a line an eval    adapter/        the result, PEFT layout
    result.json      the figures                  report.html     what the run did, for people

result.json is written when everything else is safe (the report only shows what lies there), so a folder that has it is
finished. A folder that is not a run is never touched.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.base.weights import read_json, write_text_atomic
from deltaw.config import RunConfig
from deltaw.errors import InputError


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
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def best(self) -> Path:
        return self.folder / "best"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @staticmethod
    def check(config: RunConfig, *, replace: bool = False) -> "Run":
        """See that `output` can hold a new run, before any work is done. Raises InputError."""
        run = Run(Path(config.output))
        existing = next(path for path in [run.folder.absolute(), *run.folder.absolute().parents] if path.exists())
        if not existing.is_dir():
            raise InputError(f"output {run.folder}: {existing} is not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"output {run.folder}: no permission to write in {existing}")
        if run.folder.exists() and any(run.folder.iterdir()):
            if not run.config.is_file():
                raise InputError(f"output {run.folder} exists and is not a run", fix="choose another output")
            if not replace:
                raise InputError(
                    f"output {run.folder} already holds a run",
                    fix=f"resume it: deltaw train {run.folder}   start over: --replace   or choose another output",
                )
        return run

    def create(self, config: RunConfig) -> None:
        """Make the folder with the resolved config in it; what an earlier run left there goes."""
        if self.config.is_file():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.config, config.to_yaml())

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after `step`: a resumed run writes them again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_text_atomic(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl; a last line cut short by a crash is left out."""
        records = []
        text = self.metrics.read_text(encoding="utf-8") if self.metrics.is_file() else ""
        for line in text.splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def write_json(self, path: Path, value: dict[str, Any]) -> None:
        """A whole JSON file or none."""
        write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, path: Path) -> dict[str, Any]:
        """Raises InputError when it is missing or broken."""
        return read_json(path, allow_nan=True)
