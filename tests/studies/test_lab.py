"""Each training once: what shares a folder and what doesn't, what is resumed, what is left lying."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from deltaw.errors import RunError
from deltaw.show.progress import Display
from deltaw.studies import lab as module
from deltaw.studies.lab import RATES, Lab, best
from deltaw.training import run as loop


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that training was begun or resumed in."""
    folders: list[str] = []
    train, resume = module.train, module.resume

    def watched_train(config: Any, **kwargs: Any) -> Any:
        folders.append(f"train {config.output}")
        return train(config, **kwargs)

    def watched_resume(folder: Path, **kwargs: Any) -> Any:
        folders.append(f"resume {folder}")
        return resume(folder, **kwargs)

    monkeypatch.setattr(module, "train", watched_train)
    monkeypatch.setattr(module, "resume", watched_resume)
    return folders


@pytest.fixture
def fresh(lab: Lab, tmp_path: Path) -> Lab:
    """The same task in a folder without trials."""
    return Lab(tmp_path, Display(quiet=True), task=lab.task)


def test_the_same_arguments_train_once(fresh: Lab, begun: list[str]) -> None:
    first = fresh.train("a name", seed=1, lr=1e-3)
    again = fresh.train("another name", seed=1, lr=1e-3)
    assert again.run.folder == first.run.folder and again.loss == first.loss
    assert begun == [f"train {first.run.folder}"]


def test_what_the_task_says_anyway_is_the_same_training(fresh: Lab, begun: list[str]) -> None:
    plain = fresh.train("plain")
    said = {"targets": "all-linear", "rank": 16, "alpha": 32.0}
    assert fresh.train("said", seed=0, adapter=said, lr=3e-3).run.folder == plain.run.folder
    assert len(begun) == 1


def test_another_seed_rate_or_adapter_is_another_training(fresh: Lab, begun: list[str]) -> None:
    trials = [
        fresh.train("plain"),
        fresh.train("seed", seed=1),
        fresh.train("rate", lr=1e-3),
        fresh.train("rank", adapter={"rank": 4, "alpha": 32}),
        fresh.train("full", adapter="full", lr=3e-4),
    ]
    assert len({trial.run.folder for trial in trials}) == len(begun) == len(trials)
    assert len({trial.loss for trial in trials}) == len(trials)


def test_checkpoints_go_and_the_rest_stays(fresh: Lab) -> None:
    trial = fresh.train("plain")
    assert not trial.run.checkpoints.exists()
    assert math.isfinite(trial.loss) and len(trial.training_losses) == 2
    assert trial.forgetting["kl"] >= 0
    assert trial.adapter().parameters == trial.result["trained_parameters"]


def test_an_unfinished_training_is_resumed(fresh: Lab, begun: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.step

    def breaks(forward: Any, learners: Any, *args: Any) -> Any:
        if learners[0].state.step == 1:
            raise RunError("the power is gone")
        return step(forward, learners, *args)

    task = {**fresh.task, "train": {**fresh.task["train"], "save_every": 1}}
    broken, whole = (Lab(fresh.folder / name, Display(quiet=True), task=task) for name in ("broken", "whole"))
    with monkeypatch.context() as patch, pytest.raises(RunError, match="power"):
        patch.setattr(loop, "step", breaks)
        broken.train("first try")
    resumed = broken.train("second try")
    assert [line.split()[0] for line in begun] == ["train", "resume"]
    assert resumed.result["steps"] == 2 and not resumed.run.checkpoints.exists()
    assert resumed.loss == whole.train("at once").loss


def test_a_sweep_goes_over_the_rates_and_full_gets_a_tenth(lab: Lab) -> None:
    low_rank, full = lab.sweep({"rank": 1, "alpha": 32}), lab.sweep("full")
    assert tuple(low_rank) == RATES
    assert list(full) == pytest.approx([rate / 10 for rate in RATES])
    assert {trial.result["trained_parameters"] for trial in full.values()} == {4 * 64 * 64 + 3 * 64 * 96}
    rate, trial = best(full)
    assert trial.loss == min(other.loss for other in full.values()) and full[rate] is trial


def test_noise_is_what_seeds_do(lab: Lab) -> None:
    losses = [lab.train("", seed=seed).loss for seed in range(3)]
    assert lab.noise == statistics.stdev(losses) > 0
    limit = 2 * 2**0.5 * lab.noise
    assert lab.tie(1, 1 + 0.99 * limit) and not lab.tie(1, 1 + 1.01 * limit) and not lab.tie(1 + 1.01 * limit, 1)
