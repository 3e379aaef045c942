"""The lab: where studies run, and on which bench."""

from functools import cached_property
from pathlib import Path

from deltaw.show.progress import Display
from deltaw.studies.bench import Bench
from deltaw.studies.large import Large
from deltaw.studies.tiny import Tiny


class Lab:
    """A folder for pages, records and trainings. `full`: on the large bench."""

    def __init__(self, folder: Path, display: Display, *, full: bool = False, bench: Bench | None = None) -> None:
        self.folder, self.display, self.full, self._bench = folder, display, full, bench

    @cached_property
    def bench(self) -> Bench:
        if self._bench is not None:
            return self._bench
        return Large(self.folder, self.display) if self.full else Tiny(self.folder, self.display)

    @cached_property
    def tiny(self) -> Tiny:
        """Of studies that pretrain, or need a model whose every weight may change."""
        return Tiny(self.folder, self.display)
