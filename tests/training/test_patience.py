"""Early stopping: evaluations that are not the best are counted, across stops, and the best step is what is saved."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from deltaw.adapter.file import Adapter
from deltaw.config import parse_config
from deltaw.errors import InputError
from deltaw.training import underway
from deltaw.training.checkpoint import checkpoint_at, latest_checkpoint, read_checkpoint
from deltaw.training.run import resume, train
from deltaw.training.stop import Stopped
from tests.tiny import Said, run_file
from tests.training.finished import config
from tests.training.test_loop import QUIET, digest, metrics, stop_at

LOSSES = [3.0, 2.0, 1.0, 1.5, 0.9, 1.1, 1.2, 0.8]  # of steps 2, 4, …: three in a row aren't the best after step 4 … 14
STOPPED = 14  # with a patience of two


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out losses on the way are those of LOSSES, whatever the model."""
    taken = underway.note_evaluation

    def note(loss: float, figures: Any, learner: Any, *rest: Any) -> dict[str, Any]:
        return taken(LOSSES[learner.state.step // 2 - 1], figures, learner, *rest)

    monkeypatch.setattr(underway, "note_evaluation", note)


def asked(place: Path, output: Path, **options: Any) -> Any:
    sizes = {"steps": 16, "eval_every": 2, "patience": 2, "save_every": 3, "tokens_per_step": 64, **options}
    return config(place, str(output), adapter={"rank": 2, "alpha": 4}, train_on="train.jsonl", **sizes)


def test_it_stops_saves_the_best_and_says_so(place: Path, tmp_path: Path, losses: None) -> None:
    run, said = tmp_path / "run", Said()
    train(asked(place, run), display=said)
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["planned_steps"], result["stopped_early"]) == (STOPPED, 16, True)
    assert result["best_step"] == 10
    best = read_checkpoint(checkpoint_at(run / "checkpoints", 10)).factors
    for path, update in Adapter.load(run / "adapter").factors.items():
        assert update.tensors()["a"].equal(best[f"{path}.a"])
    assert any(line.startswith("stopped early") for line in said.lines)
    assert max(line["step"] for line in metrics(run)) == STOPPED

    with pytest.raises(InputError, match=r"train\.patience=null"):
        resume(run, display=QUIET)
    with pytest.raises(InputError, match=r"train\.patience"):
        resume(run, ["train.steps=20"], extend=True, display=QUIET)
    resume(run, ["train.patience=null"], extend=True, display=QUIET)
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["best_step"], result["stopped_early"]) == (16, 16, False)


@pytest.mark.parametrize("step", [11, 14])
def test_a_stop_between_keeps_the_count(
    place: Path, tmp_path: Path, losses: None, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, step, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(asked(place, run), display=QUIET)
    resume(run, display=QUIET)
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["best_step"]) == (STOPPED, 10)


def test_a_run_that_was_killed_before_it_finished_takes_no_step_more(place: Path, tmp_path: Path, losses: None) -> None:
    run = tmp_path / "run"
    train(asked(place, run), display=QUIET)
    saved = digest(run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "adapter")
    resume(run, display=QUIET)
    assert json.loads((run / "result.json").read_text())["steps"] == STOPPED and digest(run) == saved
    newest = latest_checkpoint(run / "checkpoints", QUIET)
    assert newest and (newest.state.step, newest.state.no_better) == (STOPPED, 2)


def test_it_needs_evaluations(tmp_path: Path) -> None:
    for data, train_options in (
        ({"eval": 8}, {"patience": 2}),
        ({}, {"patience": 2}),
        ({}, {"patience": 2, "eval_every": 3}),
    ):
        fields = run_file(tmp_path, data={"train": "t.jsonl", **data}, train=train_options, evaluate={})
        with pytest.raises(InputError, match=r"train\.patience does nothing without"):
            parse_config(fields)
    with pytest.raises(InputError, match=r"train\.patience"):
        parse_config(run_file(tmp_path, train={"eval_every": 1, "patience": 0}))
