"""A version of an adapter on the model, what a server says of it, and what a request takes of it."""

from dataclasses import dataclass, field
from pathlib import Path

from deltaw.adapter.attach import Attached, at_scale, discard
from deltaw.generate.cache import BASE
from deltaw.serve.folder import Look

IDLE_SCALES = 4  # of an adapter, for the next request: factors are copied for one that comes


@dataclass(frozen=True)
class Served:
    """An adapter that is served: its name, the folder it lies in and its base's name. `modified`: when its files last
    changed, in seconds since 1970; `system` and `template`: how it was asked in training, where that isn't the
    tokenizer's own way.

    Of the version that new requests take: `digest`, the sha256 of its files, and `number`, by which the model carries
    it at scale 1; empty and None while it isn't on the model. `problem`: why the files can't be served as they are now.
    """

    name: str
    path: Path
    parent: str
    modified: int = 0
    rank: int | None = None
    system: str = ""
    template: Path | None = None
    digest: str = ""
    number: int | None = None
    problem: str = ""


@dataclass(eq=False)
class Scaled:
    """A version at some scale, under a number of its own, and how many requests take it."""

    attached: Attached
    running: int = 0


@dataclass(eq=False)
class Version:
    """An adapter on the model. `settled`: files that look the same are the same; `used`: when it was last taken, as a
    count; `running`: how many requests take it, at whatever scale."""

    served: Served
    look: Look
    attached: Attached
    bytes: int
    settled: bool
    used: int = 0
    running: int = 0
    scaled: dict[float, Scaled] = field(default_factory=dict)

    def number_at(self, scale: float) -> int:
        """What a request of that scale takes, counted as running."""
        number = self.attached.number
        if scale != 1:
            if scale not in self.scaled:
                idle = [other for other, scaled in self.scaled.items() if not scaled.running]
                for other in idle[: max(0, len(idle) + 1 - IDLE_SCALES)]:
                    discard(self.scaled.pop(other).attached)
                self.scaled[scale] = Scaled(at_scale(self.attached, scale))
            self.scaled[scale].running += 1
            number = self.scaled[scale].attached.number
        self.running += 1
        return number

    def leave(self, scale: float) -> None:
        """One of them has ended."""
        self.running -= 1
        if scale != 1:
            self.scaled[scale].running -= 1

    def take_off(self) -> None:
        """The model carries it no longer."""
        for attached in (*(scaled.attached for scaled in self.scaled.values()), self.attached):
            discard(attached)


@dataclass(frozen=True, eq=False)
class Taken:
    """What a request runs on: an update's number, `BASE` for none, and the key of what may be reused of its work."""

    number: int = BASE
    key: bytes = b"base"
    scale: float = 1.0
    version: Version | None = None
