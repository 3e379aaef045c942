"""One server for most tests of this room."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.serving import Running, random_adapter, serving
from tests.tiny import tiny_base


@pytest.fixture(scope="session")
def served_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("served") / "base")


@pytest.fixture(scope="session")
def served_adapters(served_base: Path) -> Path:
    folder = served_base.parent / "adapters"
    for seed, name in enumerate(("one", "two"), 1):
        random_adapter(served_base, folder / name, seed)
    (folder / "broken").mkdir()
    for file in (folder / "one").iterdir():
        (folder / "broken" / file.name).write_bytes(file.read_bytes()[:300])
    return folder


@pytest.fixture(scope="session")
def running(served_base: Path, served_adapters: Path) -> Iterator[Running]:
    with serving(served_base, served_adapters) as server:
        yield server
