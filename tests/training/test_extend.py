"""A finished run that goes on is the run that was longer from the beginning; after a crash, one of the two is there."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from deltaw.adapter.file import Adapter
from deltaw.config import parse_config
from deltaw.errors import InputError
from deltaw.evaluation.metrics import METRICS
from deltaw.run import Run
from deltaw.training.checkpoint import MANIFEST, STATE, _manifest, list_checkpoints
from deltaw.training.run import resume, train
from deltaw.training.stop import Stopped
from tests.tiny import Said, run_file
from tests.training.finished import KINDS, config
from tests.training.test_length import files
from tests.training.test_loop import QUIET, digest, metrics, stop_at

STEPS = 7  # of an epoch


def copy(place: Path, kind: str, tmp_path: Path) -> Path:
    return shutil.copytree(place / kind, tmp_path / kind)


def straight(place: Path, kind: str, epochs: int, output: Path) -> Path:
    """The run of so many epochs from the beginning."""
    options = {"train_on": "train.jsonl", "schedule": "constant", "steps": None, "epochs": epochs}
    train(config(place, str(output), adapter=KINDS[kind], warmup_steps=0, **options), display=QUIET)
    return output


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_it_is_the_longer_run_to_the_bit_also_when_it_is_cut_off(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run, whole = copy(place, kind, tmp_path), straight(place, kind, 2, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, STEPS + 3, signal.SIGTERM)
        with pytest.raises(Stopped):
            resume(run, ["train.epochs=2"], extend=True, display=QUIET)
    assert not (run / "result.json").exists() and (run / "adapter/adapter_config.json").is_file()
    resume(run, display=QUIET)
    assert digest(run) == digest(whole)
    results = [json.loads((one / "result.json").read_text()) for one in (run, whole)]
    for name in ("steps", "planned_steps", "tokens", "supervised_tokens", "best_step"):
        assert results[0][name] == results[1][name], name
    assert [line.get("loss") for line in metrics(run)] == [line.get("loss") for line in metrics(whole)]
    assert Adapter.load(run / "adapter").history.extended_after == (STEPS,)
    assert json.loads((run / f"result.step-{STEPS:06}.json").read_text())["steps"] == STEPS


def test_it_can_go_on_twice_and_by_steps_and_the_rate_is_that_of_the_whole_length(place: Path, tmp_path: Path) -> None:
    run, said = copy(place, "lora", tmp_path), Said()
    resume(run, [f"train.steps={STEPS + 2}"], extend=True, display=QUIET)
    resume(run, [f"train.steps={STEPS + 4}", "train.schedule=linear"], extend=True, display=said)
    assert Adapter.load(run / "adapter").history.extended_after == (STEPS, STEPS + 2)
    rates = [line["lr"] for line in metrics(run) if "lr" in line]
    total = STEPS + 4
    expected = [1e-2 * (1 - step / total) for step in (total - 2, total - 1)]
    assert rates[-2:] == pytest.approx(expected)
    assert any("learning rate" in line for line in said.lines)


def test_what_does_not_make_it_longer_is_refused_and_changes_nothing(place: Path, tmp_path: Path) -> None:
    run = copy(place, "lora", tmp_path)
    before = files(run)
    for overrides in ([], ["train.epochs=1"], ["train.steps=7"], ["train.steps=3"], ["train.keep=3"]):
        with pytest.raises(InputError, match="--extend"):
            resume(run, overrides, extend=True, display=QUIET)
    for overrides in (["adapter.rank=8"], ["train.seed=3"], ["data.limit=4"]):
        with pytest.raises(InputError, match="can't be resumed"):
            resume(run, [*overrides, "train.epochs=2"], extend=True, display=QUIET)
    for overrides in ([], ["train.epochs=2"]):  # without --extend, which the answer names
        with pytest.raises(InputError, match="--extend") as finished:
            resume(run, overrides, display=QUIET)
        assert "train.epochs=2" in str(finished.value)
    assert files(run) == before
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match=r"adapter\.from"):
        resume(run, ["train.epochs=2"], extend=True, display=QUIET)
    (run / "result.json").unlink()
    with pytest.raises(InputError, match="isn't finished"):
        resume(run, ["train.epochs=2"], extend=True, display=QUIET)


def test_a_crash_before_it_goes_on_leaves_the_finished_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy(place, "lora", tmp_path)

    def crash(self: Run, config: object) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_config", crash)
        with pytest.raises(RuntimeError):
            resume(run, ["train.epochs=2"], extend=True, display=QUIET)
    assert json.loads((run / "result.json").read_text())["steps"] == STEPS
    resume(run, ["train.epochs=2"], extend=True, display=QUIET)
    assert Adapter.load(run / "adapter").history.extended_after == (STEPS,)


def test_a_checkpoint_of_before_there_was_patience_goes_on(place: Path, tmp_path: Path) -> None:
    run = copy(place, "lora", tmp_path)
    for path in list_checkpoints(run / "checkpoints"):
        state = json.loads((path / STATE).read_text())
        del state["no_better"], state["config"]["train"]["patience"], state["config"]["adapter"]["from"]
        (path / STATE).write_text(json.dumps(state))
        (path / MANIFEST).write_text(_manifest(path))
    resume(run, [f"train.steps={STEPS + 1}"], extend=True, display=QUIET)
    assert json.loads((run / "result.json").read_text())["steps"] == STEPS + 1


def test_what_is_asked_may_change_with_the_length(place: Path, tmp_path: Path) -> None:
    """Fewer rows are answered without a metric, and the base's answers to all of them are there."""
    data = {"train": str(place / "train.jsonl"), "eval": 4}
    fields = run_file(place, data=data, output=str(tmp_path / "run"), train={"steps": 2, "tokens_per_step": 64})
    train(parse_config(fields), display=QUIET)
    run = tmp_path / "run"
    asked: list[tuple[int, list[str]]] = []
    for changed in (["evaluate.metrics=[]", "evaluate.samples=1"], ["evaluate.metrics=[exact_match]"]):
        resume(run, [f"train.steps={3 + len(asked)}", *changed], extend=True, display=QUIET)
        result = json.loads((run / "result.json").read_text())
        asked.append((len(result["answers"]), [name for name in result["eval"]["after"] if name in METRICS]))
    assert asked == [(1, []), (4, ["exact_match"])]
    assert result["eval"]["before"].keys() == result["eval"]["after"].keys()
