from pathlib import Path

import pytest

from tests.tiny import tiny_base, words


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny base and data; a run goes to `run` in it."""
    tiny_base(tmp_path / "base")
    words(tmp_path / "train.jsonl")
    return tmp_path
