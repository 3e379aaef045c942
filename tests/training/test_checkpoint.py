"""Checkpoints: the manifest is what `sha256sum` makes, rotation keeps the newest and the best of each."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from deltaw.errors import InputError
from deltaw.show.progress import Display
from deltaw.training.checkpoint import (
    MANIFEST,
    STATE,
    TrainState,
    _manifest,
    _rotate,
    checkpoint_at,
    is_whole,
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
)
from tests.training.test_loop import changed, run

QUIET = Display(quiet=True)


def fake(folder: Path, step: int, best: int = 0) -> Path:
    """A folder that rotation takes for a checkpoint."""
    path = checkpoint_at(folder, step)
    path.mkdir(parents=True)
    (path / STATE).write_text(json.dumps({"step": step, "best_step": best}))
    return path


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(folder)]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum on this machine")
def test_other_tools_can_check_a_checkpoint(folder: Path) -> None:
    run(folder)
    newest = list_checkpoints(folder / "run/checkpoints")[-1]
    assert subprocess.run(["sha256sum", "-c", "--strict", MANIFEST], cwd=newest, capture_output=True).returncode == 0


def test_the_state_says_what_the_run_was(folder: Path) -> None:
    run(folder)
    state = read_checkpoint(list_checkpoints(folder / "run/checkpoints")[-1]).state
    assert state.step == 6 and state.config["adapter"]["rank"] == 4 and state.evaluated == 6
    assert state.fingerprints.keys() == {"base", "data", "template"}
    assert state.metrics_lines == len((folder / "run/metrics.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("bests", "keep", "left"),
    [
        ({1: 0, 2: 0, 3: 0, 4: 0}, 2, [3, 4]),
        ({1: 1, 2: 1, 3: 1, 4: 1}, 2, [1, 3, 4]),
        ({1: 1, 2: 1, 3: 1, 4: 4}, 2, [1, 3, 4]),  # 3 is what is left when 4 breaks, and 1 is its best
        ({1: 1, 2: 2, 3: 2, 4: 4}, 1, [4]),
        ({1: 0}, 5, [1]),
    ],
)
def test_rotation(tmp_path: Path, bests: dict[int, int], keep: int, left: list[int]) -> None:
    for step, best in bests.items():
        fake(tmp_path, step, best)
    _rotate(tmp_path, keep)
    assert steps(tmp_path) == left


def test_steps_are_numbers_also_beyond_six_digits(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 20):
        fake(tmp_path, step)
    (tmp_path / "step-final").mkdir()
    assert steps(tmp_path) == [20, 999_999, 1_000_000]


def test_a_checkpoint_of_another_version_is_named(folder: Path) -> None:
    run(folder, **changed(folder, steps=2, eval_every=None))
    path = list_checkpoints(folder / "run/checkpoints")[-1]
    raw = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps({**raw, "momentum": 1}))
    assert not is_whole(path)
    (path / MANIFEST).write_text(_manifest(path))
    assert is_whole(path)
    with pytest.raises(InputError, match="all 1 checkpoints are broken"):
        latest_checkpoint(folder / "run/checkpoints", QUIET)
    with pytest.raises(InputError, match="another version"):
        read_checkpoint(path)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "checkpoints", QUIET) is None
    assert TrainState() == TrainState()
