"""A lab on a tiny random base, shared by all tests here: the studies share their trainings, and so do the tests."""

from pathlib import Path
from typing import Any

import pytest

from deltaw.show.progress import Display
from deltaw.studies.lab import Lab
from tests.tiny import tiny_base, words


def wide_base(folder: Path) -> Path:
    """A random Llama in which rank 64 has room everywhere, with its tokenizer."""
    return tiny_base(folder, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_key_value_heads=4)


def task(folder: Path) -> dict[str, Any]:
    """Two steps on words, in float32; the first step goes from B = 0, so that only the second moves A."""
    return {
        "base": str(wide_base(folder / "base")),
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"train": str(words(folder / "train.jsonl")), "eval": 8},
        "train": {
            "lr": 3e-3,
            "steps": 2,
            "warmup_steps": 0,
            "tokens_per_step": 128,
            "tokens_per_batch": 128,
            "dtype": "float32",
            "device": "cpu",
            "keep": 1,
            "save_every": 1000,
        },
        "evaluate": {"samples": 0, "report": False},
    }


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    return Lab(folder, Display(quiet=True), task=task(folder))
