"""The interface of every export destination: an adapter is refused or accepted as a whole, then written.

    PEFT(trained, options)     looks for everything that the destination can't hold or read, and raises one InputError
                               that lists it, before a byte is written
    .size()                    bytes that it will need on the disk, at most
    .write(folder, display)    writes into a folder that is hidden until it is whole (target.py)

The command (commands/export.py) chooses one by name and adds the card, the report and the mark.
"""

import abc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.shipping.trained import Trained
from deltaw.show.progress import Display


@dataclass(frozen=True)
class Options:
    """Options for a destination. `plain`: only what older servers read (scales in B, one rank).
    `merged`: the whole model instead of the adapter. `type`: the numbers of a merged model ("Q8_0"). `force`: even
    if little of the update survives their rounding."""

    plain: bool = False
    merged: bool = False
    type: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Written:
    """`lines`: the printed summary. `usage`: how to load it there, Markdown for the card. `more`: JSON fields."""

    usage: str
    lines: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


class Destination(abc.ABC):
    """One form of an adapter or a merged model. Raises InputError if it can't hold this adapter."""

    def __init__(self, trained: Trained, options: Options) -> None:
        self.trained, self.options = trained, options

    @abc.abstractmethod
    def size(self) -> int:
        """At least the bytes that `write` writes."""

    @abc.abstractmethod
    def write(self, folder: Path, display: Display) -> Written:
        """Write all files into `folder`, which exists and is empty."""
