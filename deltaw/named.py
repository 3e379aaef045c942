"""What a name on the command line means: a run, an adapter's folder, or a base.

    a run        a folder with config.yaml; its adapter lies in adapter/, and its config says which base that goes on
    an adapter   a folder in PEFT's layout, from any tool; it may say which base it goes on
    a base       anything else, for `find_base` to know

A command makes one `Named` and hands it on, so that a config and an adapter's factors are read once, when they are
first asked for, however many functions want them.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deltaw.adapter.file import Adapter, adapter_folder, is_adapter, is_run
from deltaw.base.source import found_as, may_be_base
from deltaw.config import RunConfig, load_config
from deltaw.config.places import check_there, placed
from deltaw.data.render import TEMPLATE, open_tokenizer
from deltaw.errors import InputError
from deltaw.replaced import Rows


@dataclass(frozen=True, eq=False)
class Named:
    """A name and what lies under it. `config` and `adapter` raise InputError where they can't be read."""

    name: str

    @staticmethod
    def of(name: "str | Path | Named") -> "Named":
        """Of a name; a `Named` is itself, with what was read of it."""
        return name if isinstance(name, Named) else Named(str(name))

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()

    @cached_property
    def config(self) -> RunConfig | None:
        """A run's, as it was written; None for what isn't a run."""
        return load_config(self.path / "config.yaml") if is_run(self.path) else None

    @cached_property
    def local(self) -> RunConfig | None:
        """The same with its names where they lead from here, whatever folder the run was started in."""
        return placed(self.config, self.path) if self.config else None

    @cached_property
    def adapter(self) -> Adapter:
        """Read whole. Raises InputError where there is none."""
        return Adapter.load(self.path)

    @property
    def holds_adapter(self) -> bool:
        """Whether it is a run or an adapter's folder, finished or not, and not a base."""
        return self.config is not None or is_adapter(self.path)

    @property
    def base(self) -> str:
        """The name of the base that the adapter goes on. Raises InputError where neither run nor adapter says, and
        where what an adapter says can't be a base's name here."""
        if self.config is None or self.local is None:
            return self._base_of_run() or self._base_of_adapter()
        if "@" not in self.config.base:  # a hub's base is recorded with its commit
            check_there(self.config.base, self.config, self.path, "base", "put it back, or name it with --base")
        return self.local.base

    def _base_of_run(self) -> str:
        """What the run says whose adapter folder this is. Nothing where it is no run's, or the run can't say it: the
        adapter may."""
        folder = self.path.absolute()
        if folder.name != "adapter" or not is_run(folder.parent):
            return ""
        try:
            return Named(str(folder.parent)).base
        except InputError:
            return ""

    def _base_of_adapter(self) -> str:
        """What it says itself: of a path the last part alone, which leads nowhere from another folder."""
        name = base_name(self.adapter, self.path)
        if not may_be_base(name):
            what = f"{self.name} was trained on a base called {name!r}, which isn't here"
            raise InputError(what, fix="name its folder or file with --base")
        return name

    def refused(self, error: InputError) -> InputError:
        """What to say of a name that is no run and no adapter, and no base because of `error`: it may be a part of
        one."""
        if not self.path.exists():
            return error
        whole = next((path for path in self.path.absolute().parents[:2] if is_run(path) or is_adapter(path)), None)
        if whole is not None:
            kind = "a run" if is_run(whole) else "an adapter"
            return InputError(f"{self.name} is a part of {kind}", fix=f"name its whole folder: {whole}")
        if self.path.suffix == ".gguf" or (self.path / "config.json").exists():
            return error  # it is a model
        fix = error.fix if self.path.is_dir() else "name a run's folder, an adapter's, or a base"
        return InputError(f"{self.name} isn't a run, an adapter or a base", fix=fix)

    @property
    def tokens(self) -> dict[int, str]:
        """The tokens that the adapter trains by name; those that another tool's doesn't name are looked up in the
        tokenizer beside it, where one lies there. Raises InputError where there is no adapter."""
        ids = next((one.index_K.tolist() for one in self.adapter.factors.values() if isinstance(one, Rows)), [])
        texts = self.adapter.tokens
        if not ids or len(texts) == len(ids):
            return texts
        folder = adapter_folder(self.path)
        if not (folder / "tokenizer.json").is_file():
            return {}
        added = open_tokenizer(folder).added_tokens_decoder
        return {id: added[id].content for id in ids if id in added}

    @property
    def template(self) -> Path | None:
        """The chat template that lies beside the weights, where it isn't the tokenizer's own."""
        return template_beside(self.path)


def template_beside(path: Path) -> Path | None:
    """The chat template that a run or an adapter folder has beside its weights, where it isn't the tokenizer's own."""
    file = (path / "adapter" if is_run(path) else path) / TEMPLATE
    return file if is_adapter(file.parent) and file.is_file() else None


def base_name(adapter: Adapter, path: Path) -> str:
    """A name that `find_base` may know: the builtin for its upstream id, else what the adapter says."""
    if not adapter.base.name:
        raise InputError(f"{path} doesn't say which base it belongs to", fix="name it with --base")
    return found_as(adapter.base.name)
