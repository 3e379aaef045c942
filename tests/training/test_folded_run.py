"""Whole runs whose steps are filled up and folded, as a GPU takes them, here without recording: the runs themselves."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltaw.show.progress import Display
from deltaw.training import run as running
from deltaw.training.captured import Captured
from deltaw.training.run import resume, train
from deltaw.training.stop import Stopped
from tests.training.test_length import config
from tests.training.test_loop import stop_at

QUIET = Display(quiet=True)
OPTIONS: dict[str, Any] = {"steps": 8, "eval_every": 3, "save_every": 2, "dtype": "float32"}


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    """Runs take folded steps; these."""
    made: list[Captured] = []

    def captured_on(device: Any, forward: Any, learner: Any, longest: int, say: Any, following: Any) -> Captured:
        made.append(Captured(forward, learner, longest, say, None, following, folding=True))
        assert made[-1].faster is not None and made[-1].faster.sums
        return made[-1]

    monkeypatch.setattr(running, "captured_on", captured_on)
    return made


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").open())
    return [line[name] for line in lines for name in ("loss", "eval_loss") if name in line]


def test_a_folded_run_is_the_run(folder: Path, folding: list[Captured], monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(folder, "folded", **OPTIONS), display=QUIET)
    assert len(folding) == 1 and not folding[0].why_not and folding[0].faster is not None
    monkeypatch.undo()
    train(config(folder, "plain", **OPTIONS), display=QUIET)
    assert losses(folder / "folded") == pytest.approx(losses(folder / "plain"), rel=1e-4)
    mine, plain = (load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("folded", "plain"))
    for name, tensor in plain.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-2, atol=1e-4)


def test_a_folded_run_goes_on_where_it_was_stopped(
    folder: Path, folding: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(folder, "straight", **OPTIONS), display=QUIET)
    with monkeypatch.context() as patch:
        stop_at(patch, 5, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config(folder, "stopped", **OPTIONS), display=QUIET)
    resume(folder / "stopped", display=QUIET)
    assert len(folding) == 3
    mine, straight = (
        load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("stopped", "straight")
    )
    assert all(torch.equal(mine[name], tensor) for name, tensor in straight.items()), "to the bit"
