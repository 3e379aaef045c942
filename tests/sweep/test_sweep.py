"""A sweep trains each run as it would be trained alone, ends each by itself, and resumes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deltaw.adapter.file import Adapter
from deltaw.commands.sweep import sweep_named
from deltaw.config import parse_config
from deltaw.errors import InputError
from deltaw.run import Run
from deltaw.show.progress import QUIET
from deltaw.sweep import joint
from deltaw.sweep.folder import SweepFolder
from deltaw.sweep.grid import Grid, Variant
from deltaw.sweep.sweep import run_sweep
from deltaw.training.run import train
from deltaw.training.stop import Stopped
from tests.tiny import run_file, tiny_base, words

NO_ANSWERS = {"samples": 0, "general": None, "report": False}
LORA = {"rank": 4, "alpha": 8}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": LORA},
    "dora": {"adapter": {**LORA, "magnitude": True}},
    "full": {"adapter": "full"},
    "lora+": {"adapter": LORA, "lr_ratio_b": 4.0},
    "pissa": {"adapter": {**LORA, "init": "pissa"}},
    "eva": {"adapter": {**LORA, "init": "eva"}},
    "lora-ga": {"adapter": {**LORA, "init": "lora-ga"}},
    "dropout": {"adapter": {**LORA, "dropout": 0.3}},
    "dora with dropout": {"adapter": {**LORA, "magnitude": True, "dropout": 0.3}, "seed": 5},
    "others": {"adapter": {"rank": 7, "targets": "attention", "scaling": "rslora"}, "seed": 3, "tokens_per_step": 70},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    return folder


def config(place: Path, output: Path | str, *, adapter: Any = LORA, eval_every: int | None = 3, **options: Any) -> Any:
    fields = run_file(place, adapter=adapter, evaluate=NO_ANSWERS, output=str(output))
    return parse_config({**fields, "train": {**fields["train"], "eval_every": eval_every, **options}})


def grid(folder: Path, configs: dict[str, Any], **settings: Any) -> Grid:
    made = [
        Variant(name, one.model_copy(update={"output": str(folder / name)}), {"run": name})
        for name, one in configs.items()
    ]
    return Grid(folder, tuple(made), **settings).checked()


def begun(made: Grid) -> Any:
    return run_sweep(SweepFolder(made), new=True, display=QUIET)


def losses(run: Path) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in Run(run).read_metrics()]


@pytest.fixture(scope="module")
def together(place: Path) -> Path:
    """A run of each kind, in one sweep."""
    folder = place / "together"
    begun(grid(folder, {kind: config(place, ".", **options) for kind, options in KINDS.items()}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_adapter_is_what_its_own_run_makes(place: Path, together: Path, kind: str) -> None:
    alone, beside = place / "alone" / kind, together / kind
    train(config(place, alone, **KINDS[kind]), display=QUIET)
    assert losses(beside) == pytest.approx(losses(alone), rel=2e-5)
    one, other = Adapter.load(alone), Adapter.load(beside)
    assert one.spec == other.spec
    for path, update in one.factors.items():
        tensors = other.factors[path].tensors()
        for name, wanted in update.tensors().items():
            apart = float((tensors[name] - wanted).norm() / wanted.norm())
            print("APART", kind, apart)
            assert apart < 2e-3, (path, name)
    counts = ("steps", "tokens", "supervised_tokens", "best_step", "eval", "fingerprints", "trained_parameters")
    results = [json.loads((folder / "result.json").read_text()) for folder in (alone, beside)]
    for name in counts:
        if name != "eval":
            assert results[0][name] == results[1][name]
    assert results[1]["eval"]["after"]["loss"] == pytest.approx(results[0]["eval"]["after"]["loss"], rel=2e-5)
