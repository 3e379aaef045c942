"""The adapters of a server: those of a folder, by name, put on the model when they are first asked for.

A version of an adapter is what its files held when they were read. The model carries each version under a number of its
own, which batches name, so versions of one name can be on it side by side: when files change, requests that come later
take the new numbers, and those that run end on the old ones. What may be reused of one request's work for another goes
by the digest of the files and the scale, never by name or number.

Versions stay while they fit into `memory`; the one that was used longest ago makes room, none that a request runs on.
An adapter that nobody has asked for costs its name.

At the beginning the model is given a carrier: a fresh adapter of rank 1 on all linear layers that takes no rows. It
has the model tried once and puts the layers and stand-ins in, so that a LoRA comes beside it in the time that its file
takes to be read (measured on SmolLM2-135M, rank 16, one core: 0.3 s instead of 4 s). DoRA, full fine-tuning and layers
that the carrier leaves out have the model tried again and its layers changed, which no row that is being decoded would
survive: they wait until nothing runs (`Later`).

The scale of a request is one more number with the same tensors (`at_scale`); scale 0 is the base.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import sleep

from deltaw.adapter.attach import Attached, attach, discard, joins, sees_all_rows
from deltaw.adapter.file import Adapter
from deltaw.config import AdapterSpec
from deltaw.data.added import unread
from deltaw.data.render import Renderer
from deltaw.errors import DeltawError, InputError, command
from deltaw.model import Model
from deltaw.serve.ask import Unknown
from deltaw.serve.figures import Figures
from deltaw.serve.folder import Folder, Look, Read, now
from deltaw.serve.version import Served as Served
from deltaw.serve.version import Taken, Version

MEMORY = 2 << 30  # bytes, unless the caller knows better
GONE, TICK = 5, 0.01  # how often, and after how many seconds, one that was there is looked for again


class Later(Exception):
    """It can't be put on while requests run: any at all (`quiet`), or those of so many adapters."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self.quiet = quiet


class Adapters:
    """What is served under which name. `names`, `get` and `all` look at files alone and may be called from any thread;
    the rest changes the model and belongs to the thread that owns it (worker.py)."""

    def __init__(
        self,
        model: Model,
        folder: Path | None = None,
        *,
        named: Mapping[str, Path] | None = None,
        memory: int = MEMORY,
        figures: Figures | None = None,
    ) -> None:
        """`named`: adapters from elsewhere. `memory`: the bytes that attached adapters may take together. Raises
        InputError for a folder that isn't one."""
        self.model, self.memory, self.figures = model, memory, figures or Figures()
        self._folder = Folder(folder, named or {})
        self._live: dict[str, Version] = {}  # what new requests take
        self._ending: list[Version] = []  # replaced or dropped while requests run on them
        self._dropped: set[str] = set()
        self._broken: dict[str, tuple[Look, DeltawError]] = {}
        self._read: Read | None = None  # waits until it can be put on
        self._uses = self._requests = 0
        self.changes = 0  # of the model's layers and stand-ins, after which nothing that was decoded goes on
        self._carrier: Attached | None = None

    def names(self, count: int | None = None) -> list[str]:
        """What can be asked for now, sorted; the first `count`."""
        return self._folder.names(count, without=self._dropped)

    def left_out(self) -> tuple[list[str], list[str]]:
        """Subfolders that can't be asked for: those with names that a model can't have, those without an adapter."""
        return self._folder.left_out()

    def get(self, name: str) -> Served:
        """Raises Unknown."""
        if name in self._dropped:
            raise Unknown(f"the adapter {name!r} was dropped", fix="load it again")
        version, (broken, error) = self._live.get(name), self._broken.get(name, (None, None))
        try:
            look = self._folder.look(name)
        except Unknown:  # of one that was there a moment ago, beginning a request will tell
            if version is None:
                raise
            return version.served
        problem = str(error) if broken == look else ""
        return replace(version.served, problem=problem) if version else self._served(look, problem=problem)

    def all(self) -> list[Served]:
        """Of all names."""
        served = []
        for name in self.names():
            with suppress(Unknown):  # it was removed meanwhile
                served.append(self.get(name))
        return served

    def open(self) -> None:
        """Put the carrier on, where the model takes one."""
        model, spec = self.model.base.model, AdapterSpec(rank=1, alpha=1, targets="all-linear")
        with suppress(InputError):  # no layer can be adapted: whoever asks for an adapter will hear why
            self._carrier = attach(model, spec)
            whole = tuple(path for path in self._carrier.paths if sees_all_rows(model, path))
            if len(whole) < len(self._carrier.paths):  # beside experts' updates there can't be others
                discard(self._carrier)
                self._carrier = None
                self._carrier = attach(model, spec.model_copy(update={"targets": whole}))

    def close(self) -> None:
        """Take all off the model; no request may run."""
        for version in (*self._live.values(), *self._ending):
            version.take_off()
        self._live, self._ending = {}, []
        if self._carrier is not None:
            discard(self._carrier)
            self._carrier = None
        self._count()

    def take(self, name: str | None, scale: float = 1.0) -> Taken:
        """What a request that begins now runs on, on the model until it is released. Raises Unknown; InputError for an
        adapter that can't be read or doesn't fit this base, or for a scale that its kind doesn't have; Later."""
        taken = Taken()
        if name is not None:
            version = self._version(name)
            if scale:  # 0 is the base
                key = f"{version.served.digest} {float(scale)!r}".encode()
                taken = Taken(version.number_at(scale), key, scale, version)
        self._requests += 1
        return taken

    def release(self, taken: Taken) -> None:
        """The request has ended."""
        self._requests -= 1
        if taken.version is not None:
            taken.version.leave(taken.scale)
            if taken.version in self._ending:
                self._sweep()

    def load(self, name: str) -> Served:
        """Serve it, also after `drop`, as its files are at this moment, and put it on the model. Raises as `take`."""
        was_dropped = name in self._dropped
        self._dropped.discard(name)
        try:
            return self._version(name, wanted_now=True).served
        except DeltawError:
            self._dropped |= {name} if was_dropped else set()
            raise

    def drop(self, name: str) -> None:
        """Serve it no more; requests that run end on it. Raises Unknown."""
        self.get(name)
        self._dropped.add(name)
        self._retire(name)

    def refresh(self) -> None:
        """Take off what isn't in the folder any more."""
        for name in list(self._live):
            with suppress(Unknown):
                self._look(name)

    def _sweep(self) -> None:
        """Take off what has been replaced or dropped and no request runs on."""
        for version in [version for version in self._ending if not version.running]:
            self._ending.remove(version)
            version.take_off()
        self._count()

    def _version(self, name: str, *, wanted_now: bool = False) -> Version:
        """The one that a request takes now, on the model."""
        if name in self._dropped:
            self.get(name)
        version, look, time = self._live.get(name), self._look(name), now()
        half = version is not None and not wanted_now and look.half_of(version.look, time)
        if version is not None and (half or self._same(version, look, time)):
            self.figures.adapter_hits += 1
            return self._used(version)
        self.figures.adapter_misses += 1
        try:
            read = self._whole(look, time)
            if version is not None and version.served.digest == read.digest:
                version.look, version.settled = look, not look.unsettled(time)
                return self._used(version)
            return self._used(self._put_on(read, settled=not look.unsettled(time)))
        except DeltawError as error:
            if version is not None and not wanted_now and look.unsettled(time):
                return self._used(version)  # it may be being written
            self.figures.adapter_failures += 1
            self._broken[name] = look, error
            raise

    def _look(self, name: str) -> Look:
        """What is there. A folder in which another takes its place by two renames is gone for a moment."""
        for _ in range(GONE if name in self._live else 0):
            with suppress(Unknown):
                return self._folder.look(name)
            sleep(TICK)
        try:
            return self._folder.look(name)
        except Unknown:
            self._retire(name)
            raise

    def _same(self, version: Version, look: Look, time: float) -> bool:
        """Whether the files are those that the version was read from."""
        if version.look != look:
            return False
        if not version.settled and not look.unsettled(time):
            version.settled = self._folder.digest(look) == version.served.digest
            return version.settled
        return True

    def _used(self, version: Version) -> Version:
        self._uses += 1
        version.used = self._uses
        return version

    def _whole(self, look: Look, time: float) -> Read:
        """The adapter as it is in the files, if it belongs to this base. One that was broken isn't read again until it
        changes."""
        broken, error = self._broken.get(look.name, (None, None))
        if broken == look and error is not None and not look.unsettled(time):
            raise error
        if self._read is None or self._read.look != look:
            self._read = None
            read = self._folder.read(look)
            if wrong := read.adapter.base.mismatch(self.model.id):
                raise InputError(f"the adapter {look.name} doesn't belong to this base: {wrong}")
            check_words(look.name, read.adapter, self.model.renderer)
            self.figures.adapter_loads += 1
            self._read = read
        return self._read

    def _put_on(self, read: Read, *, settled: bool) -> Version:
        """On the model, in the place of what had its name. Raises InputError or Later."""
        size = 4 * read.adapter.parameters
        # Nothing is trained here, and where dropout could be, the kernels don't go.
        adapter = replace(read.adapter, spec=read.adapter.spec.model_copy(update={"dropout": 0.0}))
        apart = not joins(self.model.base.model, adapter)
        if apart and self._requests:
            raise Later(quiet=True)
        self._make_room(read.look.name, size)
        self._read = None
        self.changes += apart
        attached = attach(self.model.base.model, adapter)
        self._retire(read.look.name)
        served = self._served(read.look, digest=read.digest, number=attached.number)
        version = self._live[read.look.name] = Version(served, read.look, attached, size, settled)
        self._broken.pop(read.look.name, None)
        self._count()
        return version

    def _make_room(self, name: str, size: int) -> None:
        """Take off others until so many bytes are free. Raises InputError for more than there can be, or Later."""
        if size > self.memory:
            what = f"the adapter {name} takes {size / 2**20:,.0f} MiB, and adapters may take {self.memory / 2**20:,.0f}"
            raise InputError(what, fix="give the server's adapters more memory, or lower its rank: deltaw resize")
        if self.figures.adapter_bytes + size > self.memory:
            self.refresh()
        idle = [version for version in self._live.values() if not version.running]
        idle.sort(key=lambda version: (version.served.name != name, version.used))
        while self.figures.adapter_bytes + size > self.memory:
            if not idle:
                raise Later(quiet=False)
            self._retire(idle.pop(0).served.name)
            self.figures.adapter_evictions += 1

    def _retire(self, name: str) -> None:
        """No new request takes it; it goes when the last that runs has ended."""
        version = self._live.pop(name, None)
        if version is not None:
            self._ending.append(version)
            self._sweep()

    def _count(self) -> None:
        versions = (*self._live.values(), *self._ending)
        self.figures.adapters_attached = len(versions)
        self.figures.adapter_bytes = sum(version.bytes for version in versions)

    def _served(self, look: Look, *, digest: str = "", number: int | None = None, problem: str = "") -> Served:
        card, own = self._folder.card(look), self.model.id
        problem = problem or card.problem or card.base.mismatch(own) or ""
        return Served(
            look.name,
            look.directory,
            own.name,
            look.modified,
            rank=card.rank,
            system=card.system,
            template=card.template,
            digest=digest,
            number=number,
            problem=problem,
        )


def check_words(name: str, adapter: Adapter, renderer: Renderer) -> None:
    """Raise InputError for tokens that the base's tokenizer, by which all prompts are read and all answers written,
    doesn't have."""
    if words := unread(renderer.tokenizer, adapter.tokens, renderer.template or ""):
        more = f" and {len(words) - 3} more" if len(words) > 3 else ""
        raise InputError(
            f"the adapter {name} has tokens that the base's tokenizer doesn't have: "
            f"{', '.join(f'{text!r:.40}' for text in words[:3])}{more}",
            fix=f"merge it and serve that: {command('merge', name, options=['-o', f'{name}-merged'])}",
        )
