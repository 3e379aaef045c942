"""How long a run is, and how long it warms up: as it was asked, or refused before anything is written."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from deltaw.config import parse_config
from deltaw.errors import InputError
from deltaw.show.progress import Display
from deltaw.training.checkpoint import MANIFEST, _manifest, list_checkpoints
from deltaw.training.plan import plan
from deltaw.training.run import resume, train
from deltaw.training.stop import Stopped
from tests.tiny import run_file
from tests.training.test_loop import stop_at

QUIET = Display(quiet=True)


def config(folder: Path, output: str = "run", **options: Any) -> Any:
    fields = run_file(folder, output=str(folder / output))
    return parse_config({**fields, "train": {**fields["train"], **options}})


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """A run that was stopped after its fifth step."""
    with monkeypatch.context() as patch:
        stop_at(patch, 5, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config(folder, **options), display=QUIET)
    return folder / "run"


def files(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("shorter", [["train.steps=4"], ["train.steps=null", "train.epochs=0.1"]])
def test_a_run_is_never_made_shorter_than_it_is(folder: Path, monkeypatch, shorter: list[str]) -> None:
    run = stopped(folder, monkeypatch, steps=100)
    before = files(run)
    with pytest.raises(InputError, match="5 steps already"):
        resume(run, shorter, allow=True, display=QUIET)
    assert files(run) == before
    resume(run, ["train.steps=8"], allow=True, display=QUIET)
    assert json.loads((run / "result.json").read_text())["steps"] == 8


def test_a_run_can_be_ended_where_it_is(folder: Path, monkeypatch) -> None:
    run = stopped(folder, monkeypatch, steps=100)
    resume(run, ["train.steps=5"], allow=True, display=QUIET)
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 5 and (run / "adapter/adapter_config.json").is_file()


@pytest.mark.parametrize("options", [{"steps": 6}, {"steps": None, "epochs": 1}])
def test_a_warm_up_as_long_as_the_run_is_refused_before_anything_is_written(
    folder: Path, options: dict[str, Any]
) -> None:
    for work in (train, plan):
        with pytest.raises(InputError, match=r"train\.warmup_steps"):
            work(config(folder, warmup_steps=60, **options), display=QUIET)
    assert not (folder / "run").exists()
    train(config(folder, steps=6, warmup_steps=5), display=QUIET)
    rates = [line["lr"] for line in map(json.loads, (folder / "run/metrics.jsonl").open()) if "lr" in line]
    assert rates == pytest.approx([1e-2 * n / 6 for n in range(1, 7)])


def test_a_run_of_before_goes_on_with_the_warm_up_that_it_had(folder: Path, monkeypatch) -> None:
    """Then `warmup_steps: 10`, written out as every default, was a tenth of a short run."""
    train(config(folder, "straight", steps=30), display=QUIET)
    run = stopped(folder, monkeypatch, steps=30)
    written = (run / "config.yaml").read_text()
    assert "warmup_steps: null" in written
    (run / "config.yaml").write_text(written.replace("warmup_steps: null", "warmup_steps: 10"))
    newest = list_checkpoints(run / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    state["config"]["train"]["warmup_steps"] = 10
    del state["conditions"]["deltaw"]
    (newest / "state.json").write_text(json.dumps(state))
    (newest / MANIFEST).write_text(_manifest(newest))
    resume(run, display=QUIET)
    rates = [
        [line["lr"] for line in map(json.loads, (folder / name / "metrics.jsonl").open()) if "lr" in line]
        for name in ("run", "straight")
    ]
    assert rates[0] == rates[1] and len(rates[0]) == 30
