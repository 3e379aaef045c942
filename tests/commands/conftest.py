"""A tiny base with three finished runs on it, for all tests of commands; none of them may change what lies there."""

from pathlib import Path

import pytest
import yaml

from deltaw.config import load_config
from deltaw.show.progress import Display
from deltaw.training.run import train
from tests.tiny import run_file, tiny_base, words

NOTHING = {"general": None, "report": False, "samples": 0}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, train.jsonl, run.yaml (of full/), and the runs: one/ and two/ of two seeds, full/ of full fine-tuning."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    steps = {**run_file(folder)["train"], "steps": 3}
    for name, seed, adapter in (("one", 0, {}), ("two", 1, {}), ("full", 0, {"adapter": "full"})):
        raw = run_file(folder, output=str(folder / name), evaluate=NOTHING, train={**steps, "seed": seed}, **adapter)
        (folder / "run.yaml").write_text(yaml.safe_dump(raw))
        train(load_config(folder / "run.yaml"), display=Display(quiet=True))
    return folder
