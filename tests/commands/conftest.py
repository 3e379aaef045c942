"""A tiny base with four finished runs on it, for all tests of commands; none of them may change what lies there."""

from pathlib import Path

import pytest
import yaml

from deltaw.config import load_config
from deltaw.show.progress import Display
from deltaw.training.run import train
from tests.tiny import run_file, sums, tiny_base, words

NOTHING = {"general": None, "report": False, "samples": 0}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, train.jsonl, chats.jsonl, run.yaml (of full/), and the runs: chats/ of chats, one/ and two/ of two seeds,
    full/ of full fine-tuning."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    sums(folder / "chats.jsonl")
    steps = {**run_file(folder)["train"], "steps": 3}
    chats = {"data": {"train": str(folder / "chats.jsonl"), "eval": 8}}
    for name, seed, more in (("chats", 0, chats), ("one", 0, {}), ("two", 1, {}), ("full", 0, {"adapter": "full"})):
        raw = run_file(folder, output=str(folder / name), evaluate=NOTHING, train={**steps, "seed": seed}, **more)
        (folder / "run.yaml").write_text(yaml.safe_dump(raw))
        train(load_config(folder / "run.yaml"), display=Display(quiet=True))
    return folder
