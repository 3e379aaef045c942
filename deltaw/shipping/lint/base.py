"""What lint knows about an adapter's base: its modules and their shapes, where its numbers are, tokenizer and template.

The modules are those of a skeleton (no weights are read for them), since PEFT looks for targets among modules. The base
is the one named with --base, or the one that the adapter names, if that is on this machine: lint downloads only what it
is told to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaw.base.source import Source, find_base, find_local
from deltaw.errors import InputError
from deltaw.files.strict_json import read_json
from deltaw.shipping.base_files import BaseFiles
from deltaw.show.progress import Display


@dataclass(frozen=True)
class Base:
    """A base on this machine. `linear`: (outputs, inputs) of all linear layers by path, the head's too; `embeddings`:
    (rows, size) by path; `kind`: transformers' model_type; `head`, `embedding`: the paths of the two ends, or ""."""

    files: BaseFiles
    linear: Mapping[str, tuple[int, int]]
    embeddings: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, tuple[int, ...]]
    kind: str
    head: str
    embedding: str
    transposed: bool  # its linear layers are Conv1D

    @property
    def tied(self) -> bool:
        """Whether the embedding and the head share their numbers."""
        named = dict(self.files.skeleton.named_parameters(remove_duplicate=False))
        ends = [named.get(f"{end}.weight") for end in (self.head, self.embedding)]
        return ends[0] is not None and ends[0] is ends[1]

    @property
    def source(self) -> Source:
        return self.files.source


@dataclass(frozen=True)
class Looked:
    """A base, or the reason why none is available."""

    base: Base | None = None
    kind: str = ""  # its model_type, known even if it can't be opened
    reason: str = ""


def look(named: str | None, recorded: str, revision: str | None, display: Display) -> Looked:
    """The base named with --base, else the one that the adapter names. Raises InputError for the former only."""
    if named:
        return Looked(base := base_of(find_base(named, display=display)), base.kind)
    if not recorded:
        return Looked(reason="it doesn't say which base it belongs to")
    source = None
    try:
        source = find_local(recorded, revision, display=display)
        if source is not None:
            return Looked(base := base_of(source), base.kind)
    except InputError as error:
        kind = _kind(source.directory) if source else ""
        return Looked(kind=kind, reason=f"its base {recorded:.100} can't be opened here: {error.what.splitlines()[0]}")
    return Looked(reason=f"its base {recorded:.100} isn't on this machine")


def base_of(source: Source) -> Base:
    """Raises InputError for what transformers can't open or isn't a causal language model."""
    files = BaseFiles(source)
    skeleton: Any = files.skeleton
    linear: dict[str, tuple[int, int]] = {}
    embeddings: dict[str, tuple[int, int]] = {}
    transposed = False
    for path, module in skeleton.named_modules():
        if isinstance(module, Conv1D):
            linear[path], transposed = (module.weight.shape[1], module.weight.shape[0]), True
        elif isinstance(module, nn.Linear):
            linear[path] = (module.weight.shape[0], module.weight.shape[1])
        elif isinstance(module, nn.Embedding):
            embeddings[path] = (module.weight.shape[0], module.weight.shape[1])
    parameters = {name: tuple(p.shape) for name, p in skeleton.named_parameters(remove_duplicate=False)}
    paths = {id(module): path for path, module in skeleton.named_modules()}
    head = paths.get(id(skeleton.get_output_embeddings()), "")
    embedding = paths.get(id(skeleton.get_input_embeddings()), "")
    kind = str(skeleton.config.model_type)
    return Base(files, linear, embeddings, parameters, kind, head, embedding, transposed)


def _kind(folder: Path) -> str:
    try:
        kind = read_json(folder / "config.json", allow_nan=True).get("model_type")
    except InputError:
        return ""
    return kind if isinstance(kind, str) else ""
