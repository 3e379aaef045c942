"""`on_step`: told of every step once, and what it raises ends the run as a stop would, with nothing lost."""

import math
from pathlib import Path

import pytest

from deltaw.errors import InputError
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training.run import resume, train
from tests.tiny import run_file, tiny_base, words

SILENT = Display(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on_step")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    return folder


def test_it_is_told_of_each_step_and_its_evaluation(folder: Path) -> None:
    told: list[dict] = []
    train(run_file(folder, output=str(folder / "whole")), on_step=told.append, display=SILENT)
    assert [one["step"] for one in told] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(one["loss"]) and one["lr"] >= 0 for one in told)
    assert [one["step"] for one in told if "eval_loss" in one] == [3, 6]
    written = Run(folder / "whole").read_metrics()
    assert [{k: v for r in written if r["step"] == one["step"] for k, v in r.items()} for one in told] == told


def test_what_it_raises_is_the_callers_and_the_step_is_saved(folder: Path) -> None:
    class Pruned(Exception):
        pass

    def prune(figures: dict) -> None:
        if figures["step"] == 3:  # save_every is 2
            figures.clear()
            raise Pruned

    told: list[int] = []
    config = run_file(folder, output=str(folder / "pruned"))
    with pytest.raises(Pruned) as caught:
        train(config, on_step=prune, display=SILENT)
    assert "deltaw train" in caught.value.__notes__[0]
    adapter = resume(folder / "pruned", on_step=lambda figures: told.append(figures["step"]), display=SILENT)
    assert told == [4, 5, 6]
    whole = train({**config, "output": str(folder / "unpruned")}, display=SILENT)
    assert all((adapter.factors[p].dense() == whole.factors[p].dense()).all() for p in whole.factors)


def test_a_run_file_and_a_mapping_are_one_and_a_run_is_not_trained_again(folder: Path) -> None:
    import yaml

    raw = run_file(folder, output=str(folder / "from_file"))
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))

    def stop(figures: dict) -> None:
        raise KeyboardInterrupt

    for given in (str(folder / "run.yaml"), folder / "run.yaml", raw):
        with pytest.raises(KeyboardInterrupt):
            train(given, on_step=stop, replace=True, display=SILENT)
        assert Run(folder / "from_file").config.is_file()
    with pytest.raises(InputError, match="resume"):
        train(folder / "from_file", display=SILENT)
    with pytest.raises(InputError):
        train(folder / "nothing.yaml", display=SILENT)
