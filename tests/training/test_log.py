"""metrics.jsonl, and the programs that a run logs to: stand-ins with the calls of TensorBoard and Weights & Biases."""

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from deltaw.config import RunConfig, parse_config
from deltaw.errors import InputError, RunError
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training.log import LOGGERS, check_loggers, open_log
from deltaw.training.run import resume, train
from tests.tiny import run_file

RECORDS = [{"step": 3, "loss": 1.5}, {"step": 4, "skipped": "a spike", "rows": []}]


def config(*names: str) -> RunConfig:
    return parse_config({"base": "b", "output": "o", "data": {"train": "t"}, "train": {"log_to": list(names)}})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What TensorBoard was told."""
    told: list[Any] = []

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int) -> None:
            told.append((log_dir, purge_step))

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            told.append((tag, scalar_value, global_step))

        def close(self) -> None:
            told.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "tensorboard", _module("tensorboard"))
    return told


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in: `runs` has what each was begun with, told and ended by; `broken` makes that call fail."""
    module: Any = _module("wandb")
    module.runs, module.broken = [], None

    class WandbRun:
        def __init__(self, **given: Any) -> None:
            self.given, self.logged, self.exit_code = given, [], None
            module.runs.append(self)

        def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
            if module.broken == "log":
                raise OSError("no space left on device")
            self.logged.append((step, data))

        def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
            self.exit_code = exit_code

    def init(
        entity: str | None = None,
        project: str | None = None,
        dir: str | None = None,
        id: str | None = None,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        mode: str | None = None,
        resume: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> WandbRun:
        if module.broken == "init":
            raise RuntimeError("api_key not configured (no-tty)")
        assert Path(str(dir)).is_dir()
        json.dumps(config)
        return WandbRun(project=project, dir=dir, id=id, name=name, config=config, resume=resume, settings=settings)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    for variable in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return module


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    return module


def test_without_a_wish_only_the_file_is_written(tmp_path: Path, board: list[Any]) -> None:
    with open_log(Run(tmp_path), config(), 2, print) as log:
        for record in RECORDS:
            log.write(record)
    assert lines(tmp_path) == RECORDS and board == []


def test_tensorboard_is_given_the_numbers(tmp_path: Path, board: list[Any]) -> None:
    with open_log(Run(tmp_path), config("tensorboard"), 2, print) as log:
        for record in RECORDS:
            log.write(record)
    assert lines(tmp_path) == RECORDS
    assert board == [(str(tmp_path / "tensorboard"), 3), ("loss", 1.5, 3), "closed"]  # 3: what it writes again


def test_a_run_that_is_resumed_goes_on_in_the_same_curve(folder: Path, wandb: Any) -> None:
    raw = run_file(folder)
    raw["train"] |= {"log_to": "wandb"}

    def stop(figures: dict[str, Any]) -> None:
        if figures["step"] == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(raw, on_step=stop, display=Display(quiet=True))
    resume(folder / "run", display=Display(quiet=True))
    first, second = wandb.runs
    assert first.given["id"] == second.given["id"] and second.given["resume"] == "allow"
    assert first.given["name"] == "run" and first.given["project"] == "deltaw"
    assert first.given["config"]["train"]["lr"] == 1e-2
    assert (first.exit_code, second.exit_code) == (1, 0)
    steps = [step for one in wandb.runs for step, data in one.logged if "loss" in data]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert {"eval_loss", "eval_perplexity"} in [set(data) for _, data in first.logged]


def test_one_that_fails_on_the_way_is_left_out_and_said_once(tmp_path: Path, wandb: Any, board: list[Any]) -> None:
    said: list[str] = []
    with open_log(Run(tmp_path), config("wandb", "tensorboard"), 0, said.append) as log:
        wandb.broken = "log"
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1.0})
    assert len(said) == 1 and "wandb" in said[0] and "no space" in said[0]
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3]
    assert [told[-1] for told in board[1:-1]] == [1, 2, 3] and board[-1] == "closed"


def test_one_that_does_not_start_ends_the_run_before_a_step(tmp_path: Path, wandb: Any, board: list[Any]) -> None:
    wandb.broken = "init"
    with pytest.raises(RunError, match="api_key"):
        open_log(Run(tmp_path), config("tensorboard", "wandb"), 0, print)
    assert board[-1] == "closed" and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", LOGGERS)
def test_one_that_is_not_installed_is_an_error_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"pip install {name}"):
        check_loggers([name])
    raw = run_file(tmp_path)
    raw["train"] |= {"log_to": [name]}
    with pytest.raises(InputError, match=f"pip install {name}"):  # there is no base either
        train(raw, display=Display(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["tensorboard", ["tensorboard"], ["tensorboard", "tensorboard"]])
def test_a_name_or_a_list_of_names(value: object) -> None:
    raw = {"base": "b", "output": "o", "data": {"train": "t"}, "train": {"log_to": value}}
    assert parse_config(raw).train.log_to == ("tensorboard",)
    with pytest.raises(InputError, match=r"train\.log_to"):
        parse_config({**raw, "train": {"log_to": ["mlflow"]}})
