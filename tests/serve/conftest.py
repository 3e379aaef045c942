"""One server for most tests of this room."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.canaries import Canaries
from tests.serve.serving import Running, serving


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Canaries:
    return Canaries(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def served_base(served: Canaries) -> Path:
    return served.base


@pytest.fixture(scope="session")
def served_adapters(served: Canaries) -> Path:
    """Two that answer differently, one whose files are cut short, and one outside the folder."""
    folder = served.folder / "adapters"
    for seed, name in enumerate(("one", "two"), 1):
        served.save(folder / name, seed)
    served.save(served.folder / "outside", 3)
    (folder / "broken").mkdir()
    for file in (folder / "one").iterdir():
        (folder / "broken" / file.name).write_bytes(file.read_bytes()[:300])
    (folder / "link").symlink_to(served.folder / "outside", target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def running(served_base: Path, served_adapters: Path) -> Iterator[Running]:
    with serving(served_base, served_adapters) as server:
        yield server
