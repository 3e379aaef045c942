"""The weights of a model folder: one safetensors file, or several and an index that says which tensor lies where.

The headers are checked before any data is read (safetensors.py), and so is what the index promises: a file outside the
folder is refused, missing shards are named, a tensor must lie in the shard that the index gives it.

This module imports no torch: folders are checked before the heavy imports.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.errors import InputError, listed
from deltaw.files.safetensors import SUFFIX, Header, corrupt, opened, read_header
from deltaw.files.strict_json import read_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NAMED = "transformers_weights"  # in config.json: the name of another file


def weights_file(folder: Path) -> Path | None:
    """The file of a model folder that transformers would load: the one that config.json names, else the single file,
    else the index of the shards; None for a folder without weights. Every reader here starts from it."""
    named = None
    if (folder / "config.json").is_file():
        named = read_json(folder / "config.json", allow_nan=True).get(NAMED)
    if named is not None:
        if (
            not isinstance(named, str)
            or Path(named).name != named
            or not named.endswith((SUFFIX, f"{SUFFIX}.index.json"))
        ):
            raise InputError(
                f"{folder / 'config.json'}: {NAMED} is {str(named)[:80]!r}, which isn't a file of weights in its folder"
            )
        return folder / named
    return next((folder / name for name in (SINGLE, INDEX) if (folder / name).is_file()), None)


def shards(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a model folder with their tensors' names; checks headers, reads no data.

    As transformers reads them: a shard gives all its tensors, also those that the index doesn't name, and one that
    stands in two shards is taken from the later.
    """
    chosen = weights_file(folder)
    if chosen is None:
        raise InputError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    promised: dict[Path, list[str]] = {chosen: []}
    if chosen.name.endswith(".json"):
        promised = _by_file(chosen, read_json(chosen, max_bytes=100_000_000).get("weight_map"))
    gone = [file.name for file in promised if not file.is_file()]
    if gone:
        raise InputError(f"{folder}: {len(gone)} of {len(promised)} weight files are missing:\n{listed(gone, 2)}")
    places: dict[str, Path] = {}
    for file in sorted(promised):
        shapes = _base_header(file).shapes
        if absent := sorted(set(promised[file]) - set(shapes)):
            raise InputError(f"{file}: lacks {len(absent)} tensors that {chosen.name} places there: {absent[0]!r}")
        places |= dict.fromkeys(shapes, file)
    return {file: [name for name, place in places.items() if place == file] for file in sorted(promised)}


def read_tensors(folder: Path) -> "Iterator[tuple[str, Tensor]]":
    """(name, tensor) over all shards of a model folder, one tensor in memory at a time. Raises InputError."""
    for path, names in shards(folder).items():
        with opened(path) as file:
            for name in names:
                yield name, file.get_tensor(name)


def _base_header(path: Path) -> Header:
    return read_header(path, max_header_bytes=100_000_000, max_tensors=1_000_000)


def _by_file(index: Path, weight_map: Any) -> dict[Path, list[str]]:
    """The index's `tensor -> file` turned round. A file outside the folder is refused."""
    if not isinstance(weight_map, dict) or not weight_map:
        corrupt(index, "it has no weight_map")
    names: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(SUFFIX):
            corrupt(index, f"{name!r} is placed in {file!r}, which isn't a safetensors file of this folder")
        names.setdefault(index.parent / file, []).append(name)
    return names
