"""Each training once: what shares a folder and what doesn't, what is resumed, what is left lying; the tiny rows."""

from pathlib import Path
from typing import Any

import pytest

from deltaw.data.builtin import pronunciation
from deltaw.data.row import Row
from deltaw.errors import RunError
from deltaw.show.progress import Display
from deltaw.studies import large, tiny
from deltaw.studies.bench import ACCENTED, NEW_TASK, Arm, lora
from deltaw.studies.large import Large
from deltaw.studies.tiny import PRETRAINING, Tiny, example
from deltaw.training import run as loop
from tests.tiny import words

SHORT = Arm(lora(2), 3e-3, steps=2, tokens=128)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "BASE_STEPS", 1)
    monkeypatch.setattr(tiny, "ROWS", dict.fromkeys(tiny.ROWS, 60))
    monkeypatch.setattr(tiny, "HELD_OUT", 20)


def test_the_tiny_bench_trains_an_arm_once_and_keeps_it(tmp_path: Path, small: None) -> None:
    said = list[str]()

    class Heard(Display):
        def say(self, text: str = "") -> None:
            said.append(text)

    first = Tiny(tmp_path, Heard(quiet=True))
    trained = first.train(SHORT, 0)
    again = Tiny(tmp_path, Heard(quiet=True)).train(Arm(lora(2), 3e-3, steps=2, tokens=128), 0)
    assert again == trained and len([line for line in said if line.startswith("training")]) == 1
    assert len(trained.curve) == 2 and trained.adapter().parameters > 0 and trained.kl >= 0
    others = [
        first.train(SHORT, 1),
        first.train(SHORT.at(1e-3), 0),
        first.train(Arm("full", 1e-3, steps=2, tokens=128), 0),
    ]
    assert len({one.folder for one in (trained, *others)}) == 4 == len({one.loss for one in (trained, *others)})
    with first.wearing(trained.adapter()):
        assert first.loss() == pytest.approx(trained.loss, rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "line", "learnt"),
    [
        (PRETRAINING, b"cats>KAETS\n", b"ats>KAETS\n"),
        (ACCENTED, b"cats>KAADS\n", b"KAADS\n"),
        (NEW_TASK, b"KAETS<cats\n", b"cats\n"),
    ],
)
def test_tiny_rows_are_words_and_sounds(stage: str, line: bytes, learnt: bytes) -> None:
    row = example(Row(pronunciation("cats", "K AE1 T S"), "here"), stage)
    assert bytes(row.tokens.tolist()) == line
    assert bytes(row.tokens[row.loss_mask].tolist()) == learnt


@pytest.fixture
def task(base: Path, tmp_path: Path) -> dict[str, Any]:
    own = {"warmup_steps": 0, "dtype": "float32", "device": "cpu", "keep": 1, "save_every": 1}
    data = {"train": str(words(tmp_path / "train.jsonl")), "eval": 8}
    return {"base": str(base), "data": data, "train": own, "evaluate": {"samples": 0, "report": False}}


def test_the_large_bench_resumes_a_training(
    task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    train, resume, step = large.train, large.resume, loop.step
    monkeypatch.setattr(large, "train", lambda *a, **k: (begun.append("train"), train(*a, **k))[1])
    monkeypatch.setattr(large, "resume", lambda *a, **k: (begun.append("resume"), resume(*a, **k))[1])

    def breaks(forward: Any, learners: Any, *args: Any) -> Any:
        if learners[0].state.step == 1:
            raise RunError("the power is gone")
        return step(forward, learners, *args)

    bench = Large(tmp_path / "lab", Display(quiet=True), task)
    with monkeypatch.context() as patch, pytest.raises(RunError, match="power"):
        patch.setattr(loop, "step", breaks)
        bench.train(SHORT, 0)
    trained = bench.train(SHORT, 0)
    assert begun == ["train", "resume"] and bench.train(SHORT, 0) == trained
    assert len(trained.curve) == 2 and not (Path(trained.folder) / "checkpoints").exists()
    with bench.wearing(trained.adapter()):
        assert bench.loss() == pytest.approx(trained.loss, rel=1e-4)
    assert bench.general
