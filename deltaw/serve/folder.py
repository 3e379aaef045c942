"""The folder that a server's adapters lie in: names, what lies under them now, and reading it whole.

A name from a request is looked up and never joined to a path before it is known to be a plain name; what it leads to,
links followed, must lie inside the folder. A subfolder that is a run stands for the adapter in it.

Files may change while the server runs, so an adapter is looked at for each request: a few calls of `stat`, no byte
read. One that has changed is read whole, and counts only if its files are the same after reading as before. Whoever
replaces an adapter writes one file after the other, so for a moment the new weights lie beside the old config. Nothing
in them says so, but the stamps do: either all files have changed since they were last read, or the last change must
have settled.
"""

import hashlib
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from deltaw.adapter.file import DELTAS, RECORD, Adapter, BaseId, base_of, is_adapter, is_run
from deltaw.adapter.peft_config import CONFIG
from deltaw.adapter.peft_tensors import WEIGHTS
from deltaw.errors import DeltawError, InputError
from deltaw.files.content import SETTLED, Stamp, stamp
from deltaw.files.safetensors import read_header
from deltaw.files.strict_json import read_json
from deltaw.named import template_beside
from deltaw.serve.ask import Unknown

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # hidden folders aren't adapters
FILES = (CONFIG, WEIGHTS, DELTAS, RECORD)  # what makes the update, in no order
AT_ONCE = 1.0  # seconds after which files that were changed one by one count as they are


@dataclass(frozen=True)
class Look:
    """An adapter's folder and what the system says of its files."""

    name: str
    directory: Path
    stamps: Mapping[str, Stamp]

    @property
    def changed(self) -> float:
        """When a file was last changed or put there, in seconds since 1970, by the time that no program can set."""
        return max(stamp[-1] for stamp in self.stamps.values()) / 1e9

    @property
    def modified(self) -> int:
        """When a file's contents last changed, by what it says."""
        return max(stamp[-2] for stamp in self.stamps.values()) // 10**9

    def half_of(self, before: "Look", now: float) -> bool:
        """Whether it may be a replacement of `before` that isn't finished yet."""
        some_stayed = any(self.stamps.get(name) == stamp for name, stamp in before.stamps.items())
        return some_stayed and now - self.changed < AT_ONCE

    def unsettled(self, now: float) -> bool:
        """Whether somebody may be writing it: what can't be read may be whole in a moment, and a file that changed
        again within the clock's tick would look the same."""
        return now - self.changed < SETTLED


@dataclass(frozen=True)
class Read:
    """An adapter as it was read, and the sha256 of its files."""

    look: Look
    adapter: Adapter
    digest: str


@dataclass(frozen=True)
class Card:
    """What small files say of an adapter: its rank, the system prompt of its training, and its chat template, where
    that isn't the tokenizer's own. `base`: which one it belongs to; `problem`: what can be seen to be wrong without
    reading the weights, which a server doesn't do before they are asked for."""

    rank: int | None = None
    system: str = ""
    template: Path | None = None
    base: BaseId = field(default_factory=BaseId)
    problem: str = ""


class Folder:
    """Adapters by name: the subfolders of `root`, and `named` ones from elsewhere. Any thread may ask."""

    def __init__(self, root: Path | None, named: Mapping[str, Path]) -> None:
        if root is not None and not root.is_dir():
            raise InputError(f"{root}: no such folder of adapters", fix="name the folder whose subfolders are adapters")
        self._root = None if root is None else root.resolve()
        self._named = {name: path.resolve() for name, path in named.items()}
        self._cards: dict[str, tuple[Look, Card]] = {}

    def names(self, count: int | None = None, *, without: Collection[str] = ()) -> list[str]:
        """What is an adapter now, sorted; the first `count`."""
        entries = [] if self._root is None else [entry.name for entry in self._root.iterdir()]
        ordered = sorted({*entries, *self._named}.difference(without))
        return list(islice((name for name in ordered if self._place(name) is not None), count))

    def left_out(self) -> tuple[list[str], list[str]]:
        """Subfolders that aren't served though they aren't hidden, sorted: adapters whose names can't be a model's, and
        those that hold no adapter."""
        entries = [] if self._root is None else list(self._root.iterdir())
        folders = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
        others = folders - set(self.names())
        badly_named = {name for name in others if NAME.fullmatch(name) is None}
        return sorted(badly_named), sorted(others - badly_named)

    def look(self, name: str) -> Look:
        """Raises Unknown."""
        directory = self._place(name)
        stamps = {} if directory is None else self._stamps(name, directory)
        if directory is None or not stamps:
            raise Unknown(f"no adapter called {name[:128]!r} is served")
        return Look(name, directory, stamps)

    def card(self, look: Look) -> Card:
        """Read once per version."""
        known = self._cards.get(look.name)
        if known is None or known[0] != look:
            known = self._cards[look.name] = look, _card(look)
        return known[1]

    def read(self, look: Look) -> Read:
        """The adapter whole. Raises InputError for one that can't be read, or whose files change meanwhile."""
        digest, adapter = self.digest(look), _loaded(look)
        if self.look(look.name) != look:
            raise InputError(f"the files of the adapter {look.name} are changing", fix="ask again in a moment")
        return Read(look, adapter, digest)

    def digest(self, look: Look) -> str:
        """The sha256 of its files, in hex. Raises InputError where they can't be read."""
        digest = hashlib.sha256()
        try:
            for name in sorted(look.stamps):
                with (look.directory / name).open("rb") as file:
                    digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise InputError(f"the adapter {look.name} can't be read: {error.strerror or error}") from None
        return digest.hexdigest()

    def _place(self, name: str) -> Path | None:
        """Where its files lie, links followed; None for what isn't an adapter inside the folder."""
        if NAME.fullmatch(name) is None:
            return None
        inside = self._inside(name)
        if inside is None:
            return None
        try:
            path = inside.resolve(strict=True) if name in self._named else (inside / name).resolve(strict=True)
            place = path / "adapter" if is_run(path) else path
            return place if self._holds(name, path) and is_adapter(place) else None
        except (OSError, RuntimeError, InputError):  # a loop of links, a folder that mustn't be looked into
            return None

    def _inside(self, name: str) -> Path | None:
        """The folder that all of it must lie in."""
        return self._named.get(name, self._root)

    def _holds(self, name: str, path: Path) -> bool:
        inside = self._inside(name)
        return inside is not None and path.resolve().is_relative_to(inside)

    def _stamps(self, name: str, directory: Path) -> dict[str, Stamp]:
        """Nothing where one of them leads out of the folder or vanishes meanwhile."""
        try:
            files = [file for file in FILES if (directory / file).exists()]
            if not all(self._holds(name, directory / file) for file in files):
                return {}
            return {file: stamp(directory / file) for file in files}
        except (OSError, RuntimeError):
            return {}


def now() -> float:
    """The clock of files."""
    return time.time()


def _loaded(look: Look) -> Adapter:
    """Its errors name files within the adapter: clients are told them."""
    try:
        return Adapter.load(look.directory)
    except DeltawError as error:
        raise InputError(_unplaced(error.what, look), fix=_unplaced(error.fix or "", look) or None) from None


def _unplaced(text: str, look: Look) -> str:
    return text.replace(f"{look.directory}/", f"{look.name}/").replace(str(look.directory), look.name)


def _card(look: Look) -> Card:
    directory, config, rank = look.directory, {}, None
    if not {WEIGHTS, DELTAS} & look.stamps.keys():
        return Card(problem="its weights are missing")
    try:
        if WEIGHTS in look.stamps:
            read_header(directory / WEIGHTS)
        if DELTAS in look.stamps:
            read_header(directory / DELTAS)
        else:
            config = read_json(directory / CONFIG, max_bytes=1_000_000, allow_nan=True)
            rank = config.get("r")
        base = base_of(directory, config)
    except (InputError, OSError) as error:
        return Card(problem=_unplaced(str(error), look))
    whole = rank if isinstance(rank, int) and not isinstance(rank, bool) else None
    return Card(whole, base.system, template_beside(directory), base)
