"""The adapters of a server: the subfolders of one folder, by name, put on the model when they are first asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltaw.model import Model
from deltaw.serve.figures import Figures


@dataclass(frozen=True)
class Served:
    """An adapter that is served: its name, the folder it lies in and its base's name. `modified`: when its files last
    changed, in seconds since 1970.

    `digest` (sha256 of its files) and `rank` are those of the version that was last read, empty and None before that.
    `number`: by which the model carries it at scale 1, None while it doesn't.
    """

    name: str
    path: Path
    parent: str
    modified: int = 0
    digest: str = ""
    rank: int | None = None
    number: int | None = None


class Adapters:
    """What is served under which name. `names`, `get` and `refresh` look at files alone and may be called from any
    thread; what changes the model belongs to the thread that owns it (worker.py)."""

    def __init__(
        self,
        model: Model,
        folder: Path | None = None,
        *,
        named: Mapping[str, Path] | None = None,
        memory: int | None = None,
        figures: Figures | None = None,
    ) -> None:
        """`named`: adapters from elsewhere. `memory`: the bytes that attached adapters may take together."""

    def names(self) -> list[str]:
        """What can be asked for now, sorted."""
        raise NotImplementedError

    def get(self, name: str) -> Served:
        """Raises Unknown."""
        raise NotImplementedError

    def all(self) -> list[Served]:
        """Of all names."""
        return [self.get(name) for name in self.names()]
