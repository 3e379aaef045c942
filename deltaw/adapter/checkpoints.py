"""Two checkpoints side by side: which of their tensors are the same parameter, and how far each one moved.

Every tensor of either folder has one of three fates: it is compared (or handed on to be extracted), it is reported as
being in one of the two only, or the pair is refused. The rules:

    names      the model's own, whatever the file calls them (base/names.py)
    tied       a parameter that the config ties to another and the file leaves out is that other; one that the file
               holds with numbers of its own is a parameter of its own, as it is for transformers
    rows       the embedding and the head may have more or fewer rows than the base's: the rows of both are compared
    one only   a bias, or a head for another use, may be in one of the two if the other's config has no place for it
    refused    what the other's config has a place for and its file lacks, and shapes that differ elsewhere
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.base.linear_weights import HEADER_BYTES, TENSORS
from deltaw.base.names import Slot, places
from deltaw.errors import InputError, listed
from deltaw.files.safetensors import read_header, read_tensor
from deltaw.files.shards import shards
from deltaw.show.text import percent

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that old checkpoints hold


@dataclass(frozen=True)
class Change:
    """A parameter that differs: ‖tuned − base‖_F / ‖base‖_F over the rows of both, None where that would divide by 0.
    `rows`: how many more the tuned one has. `only_in`: "tuned" or "base", for one that the other doesn't have."""

    name: str
    relative: float | None
    rows: int = 0
    only_in: str = ""

    def __str__(self) -> str:
        if self.only_in:
            return f"{self.name} is in the {self.only_in} model only"
        moved = "changed from zeros" if self.relative is None else f"changed by {percent(self.relative, 2)}"
        if not self.rows:
            return f"{self.name} {moved}"
        more = f"{abs(self.rows)} rows {'more' if self.rows > 0 else 'fewer'} than the base's"
        return f"{self.name} has {more}, those of both {moved}"


class Stored(NamedTuple):
    """Where a tensor lies, and its type as the file says it ("BF16")."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of a folder by the names that its own model gives them; those that it has no place for, or makes
    others of (`converted`), by their names in the file."""

    def __init__(self, folder: Path, skeleton: nn.Module) -> None:
        self.folder = folder
        own: dict[int, str] = {}
        self._partner: dict[str, str] = {}
        for name, parameter in skeleton.named_parameters(remove_duplicate=False):
            if own.setdefault(id(parameter), name) != name:
                self._partner[name] = own[id(parameter)]
        self.places = set(skeleton.state_dict())
        self.vocabulary = _vocabulary(skeleton)
        self.stored: dict[str, Stored] = {}
        self.converted: dict[str, list[str]] = {}
        self.slots: dict[str, Slot] = {}  # of those that are experts' matrices, by their names in the file
        for file, names in shards(folder).items():
            header = read_header(file, max_header_bytes=HEADER_BYTES, max_tensors=TENSORS)
            for name, place in places(skeleton, names).items():
                if place.slot is not None:
                    self.slots[name] = place.slot
                if place.converted:
                    self.converted.setdefault(place.name or name, []).append(name)
                own_name = name if place.converted else place.name or name
                self.stored[own_name] = Stored(file, name, header.shapes[name], header.dtypes[name])

    def find(self, name: str) -> Stored | None:
        """Where a parameter's numbers are, its own or those of the one it is tied to."""
        return self.stored.get(name) or self.stored.get(self._partner.get(name, ""))

    def apart(self, name: str) -> bool:
        """Whether a parameter has numbers that no other has."""
        own, partner = self.stored.get(name), self.stored.get(self._partner.get(name, ""))
        if own is None or partner is None:
            return own is not None
        return own.shape != partner.shape or not torch.equal(read(own), read(partner))


def read(stored: Stored) -> Tensor:
    return read_tensor(stored.file, stored.name).float()


def compared(tuned: Checkpoint, base: Checkpoint) -> list[str]:
    """The names that both have, each once. Raises InputError unless one can have been made from the other."""
    names, problems = [], []
    for name in {**tuned.stored, **base.stored}:
        new, old = tuned.find(name), base.find(name)
        if name.endswith(BUFFERS) or not (tuned.apart(name) or base.apart(name)):
            continue
        if new is not None and old is not None:
            names.append(name)
            resized = name in base.vocabulary and new.shape[1:] == old.shape[1:]
            if new.shape != old.shape and not resized:
                problems.append(f"{name}: {new.shape} and {old.shape}")
        elif name in (base if old is None else tuned).places:
            problems.append(f"{name}: not in {(base if old is None else tuned).folder}")
    if problems:
        where = f"{tuned.folder} wasn't made from {base.folder}"
        raise InputError(f"{where}, {len(problems)} tensors don't fit:\n{listed(problems)}")
    return names


def changes(tuned: Checkpoint, base: Checkpoint, names: list[str], extracted: set[str]) -> Iterator[Change]:
    """Every parameter that differs and isn't `extracted`, and every tensor that only one of the two has."""
    for name in names:
        new, old = tuned.find(name), base.find(name)
        assert new is not None and old is not None
        if name not in extracted and (change := _change(name, new, old)):
            yield change
    for side, own, other in (("tuned", tuned, base), ("base", base, tuned)):
        for name in own.stored:
            if other.find(name) is None and not name.endswith(BUFFERS):
                yield Change(name, None, only_in=side)


def _change(name: str, new: Stored, old: Stored) -> Change | None:
    now, was = read(new), read(old)
    rows = now.shape[0] - was.shape[0] if now.dim() else 0
    if rows:
        both = min(now.shape[0], was.shape[0])
        now, was = now[:both], was[:both]
    moved, size = float((now - was).norm()), float(was.norm())
    if not moved and not rows:
        return None
    return Change(name, moved / size if size else 0.0 if not moved else None, rows)


def _vocabulary(skeleton: Any) -> set[str]:
    """The parameters with a row for each token."""
    ends = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    return {
        f"{path}.{name}"
        for path, module in skeleton.named_modules()
        if any(module is end for end in ends)
        for name, _ in module.named_parameters()
    }
