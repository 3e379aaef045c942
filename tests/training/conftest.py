from pathlib import Path

import pytest

from tests.tiny import tiny_base, words
from tests.training.finished import finished_runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny base and data; a run goes to `run` in it."""
    tiny_base(tmp_path / "base")
    words(tmp_path / "train.jsonl")
    return tmp_path


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs, in a folder whose name is nobody's business. Read only: what changes goes to a folder beside."""
    return finished_runs(tmp_path_factory.mktemp("private"))
