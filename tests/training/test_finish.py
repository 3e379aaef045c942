"""What comes after the last step fails, one thing after the other: the run is whole, says so, and can be completed."""

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.adapter.file import Adapter
from deltaw.analysis import report
from deltaw.config import parse_config
from deltaw.errors import InputError, RunError
from deltaw.evaluation import held_out
from deltaw.evaluation.held_out import add_answers
from deltaw.show.progress import Display
from deltaw.training import finish, measuring
from deltaw.training.checkpoint import list_checkpoints
from deltaw.training.run import resume, train
from tests.tiny import Said, run_file, tiny_base, words

QUIET = Display(quiet=True)
EVERYTHING = {"metrics": ["exact_match"], "max_new_tokens": 4, "general": "builtin:general", "report": True}
MEASURED = ("eval", "forgetting", "answers")


def config(folder: Path, output: str = "run", **changes: Any) -> Any:
    fields = run_file(folder, **{"evaluate": EVERYTHING, **changes})
    return parse_config({**fields, "output": str(folder / output)})


def result(folder: Path, output: str = "run") -> dict[str, Any]:
    return json.loads((folder / output / "result.json").read_text())


def raising(error: Exception) -> Callable[..., Any]:
    def work(*args: Any, **options: Any) -> Any:
        raise error

    return work


def answers_fail(patch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, name: str, **options: Any) -> Any:
        if name == "after":
            raise RuntimeError("Sizes of tensors must match\nand more")
        return add_answers(*args, name=name, **options)

    patch.setattr(measuring, "add_answers", failing)


def loss_is_nan(patch: pytest.MonkeyPatch) -> None:
    """Of the held-out rows, as soon as the adapter does anything."""
    true = held_out.held_out_loss

    def loss(forward: Any, examples: Any, **options: Any) -> Any:
        learnt = any(name.endswith("lora_b") and p.any() for name, p in forward.model.named_parameters())
        value, count = true(forward, examples, **options)
        return (math.nan if learnt else value), count

    patch.setattr(held_out, "held_out_loss", loss)


FAILURES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str], str]] = {
    "the loss crashes": (
        lambda patch: patch.setattr(finish, "measured", raising(IndexError("out of range"))),
        {"held_out_loss"},
        "IndexError: out of range",
    ),
    "the loss is NaN": (loss_is_nan, {"held_out_loss"}, "nan"),
    "an answer crashes": (answers_fail, {"answers"}, "RuntimeError: Sizes of tensors must match"),
    "no memory for forgetting": (
        lambda patch: patch.setattr(
            "deltaw.evaluation.forgetting.batches", raising(torch.OutOfMemoryError("out of memory"))
        ),
        {"forgetting"},
        "out of memory measuring what was forgotten after step 6 of 6",
    ),
    "a plot is broken": (
        lambda patch: patch.setattr(report, "inspect", raising(ValueError("no axis"))),
        {"report"},
        "ValueError: no axis",
    ),
    "the disk is full at the page": (
        lambda patch: patch.setattr(report, "write", raising(OSError(errno.ENOSPC, "No space left on device"))),
        {"report"},
        "No space left",
    ),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows and the run `healthy` that nothing happened to."""
    folder = tmp_path_factory.mktemp("finish")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    train(config(folder, "healthy"), display=QUIET)
    return folder


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_measurement_leaves_a_whole_run_that_can_be_completed(shared: Path, monkeypatch, name: str) -> None:
    folder, run = shared, name.replace(" ", "-")
    harm, failed, why = FAILURES[name]
    display = Said()
    with monkeypatch.context() as patch:
        harm(patch)
        adapter = train(config(folder, run), display=display)
    healthy, got = result(folder, "healthy"), result(folder, run)
    assert got["failed"].keys() == failed and why in next(iter(got["failed"].values()))
    assert any("warning" in line and why in line for line in display.lines)
    bytes_of = [(folder / output / "adapter/adapter_model.safetensors").read_bytes() for output in (run, "healthy")]
    assert (
        bytes_of[0] == bytes_of[1] and Adapter.load(folder / run / "adapter").factors.keys() == adapter.factors.keys()
    )
    if failed == {"forgetting"}:
        assert got["eval"] == healthy["eval"] and got["forgetting"] is None
    with monkeypatch.context() as patch:  # it fails again: nothing is lost
        harm(patch)
        resume(folder / run, display=QUIET)
    assert result(folder, run)["failed"].keys() == failed
    resume(folder / run, display=QUIET)
    again = result(folder, run)
    assert again["failed"] == {} == healthy["failed"] and (folder / run / "report.html").is_file()
    assert all(again[key] == healthy[key] for key in MEASURED)
    assert again["seconds"] == got["seconds"], "it was trained again"
    with pytest.raises(InputError, match="finished"):
        resume(folder / run, display=QUIET)


def test_what_failed_can_be_left_out_and_nothing_but_that_changed(folder: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(finish, "what_was_forgotten", raising(RuntimeError("no")))
        train(config(folder), display=QUIET)
    for override in (["train.steps=20"], ["train.lr=1e-4"], ["data.eval=4"]):
        with pytest.raises(InputError, match="->"):
            resume(folder / "run", override, allow=True, display=QUIET)
    resume(folder / "run", ["evaluate.general=null"], allow=True, display=QUIET)
    assert result(folder)["failed"] == {}
    with pytest.raises(InputError, match="finished"):
        resume(folder / "run", display=QUIET)


def test_a_full_disk_at_the_result_leaves_the_adapter_and_the_run_goes_on_from_there(folder: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(finish, "write_result", raising(RunError("result.json: no space")))
        with pytest.raises(RunError) as full:
            train(config(folder), display=QUIET)
    assert str(folder / "run/adapter") in str(full.value)
    Adapter.load(folder / "run/adapter")
    resume(folder / "run", display=QUIET)
    assert result(folder)["failed"] == {}


def test_samples_that_fail_cost_no_run(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(measuring, "answer", raising(RuntimeError("a cache of another kind")))
    display = Said()
    settings = config(folder, train={**run_file(folder)["train"], "sample_every": 2})
    train(settings, display=display)
    assert result(folder)["steps"] == 6
    assert sum("no samples" in line and "another kind" in line for line in display.lines) == 3


def test_answers_of_the_base_that_no_metric_needs_are_left_out(folder: Path, monkeypatch) -> None:
    settings = config(folder, evaluate={"general": None, "report": False})
    monkeypatch.setattr(measuring, "add_answers", raising(InputError("this model can't be asked")))
    display = Said()
    train(settings, display=display)
    got = result(folder)
    assert got["answers"] == [] and got["failed"] == {} and got["eval"]["unanswered"] == "this model can't be asked"
    assert got["eval"]["after"]["loss"] < got["eval"]["before"]["loss"]
    assert sum("can't be asked" in line for line in display.lines) == 1
    with pytest.raises(InputError, match="can't be asked"):  # a metric needs them: before the first step
        train(config(folder, "metric"), display=QUIET)
    assert not (folder / "metric/checkpoints").exists()


def test_a_held_out_loss_that_is_nan_on_the_way_keeps_what_was_learnt_and_says_how_to_the_adapter(
    folder: Path, monkeypatch
) -> None:
    monkeypatch.setattr(measuring, "held_out_loss", lambda *args: (math.nan, 1))
    with pytest.raises(RunError, match=r"deltaw train --allow \S+ train.eval_every=null"):
        train(config(folder), display=QUIET)
    assert list_checkpoints(folder / "run/checkpoints")[-1].name == "step-000003"
    resume(folder / "run", ["train.eval_every=null"], allow=True, display=QUIET)
    assert result(folder)["steps"] == 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_at_the_last_step_it_wastes_nothing(folder: Path, monkeypatch, value: float) -> None:
    monkeypatch.setattr(measuring, "held_out_loss", lambda *args: (value, 1))
    train(config(folder, train={**run_file(folder)["train"], "eval_every": 6}), display=QUIET)
    got = result(folder)
    assert got["best_step"] == 6 and got["failed"] == {}
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == {"step": 6, "eval_not_finite": str(value)}
