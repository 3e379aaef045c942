"""The weights of a model folder by module path, one at a time: no transformers model is built, nothing stays in memory.

Comparing an update with its base (amplification, intruder directions, the difference of two checkpoints) needs each
weight once and alone, so a base of any size costs its largest tensor in float32. The safetensors files are opened for
each read: that costs a header, and no file stays mapped that somebody may truncate.

A module path is its weight's name in the file without `.weight`. A checkpoint of the bare base model lacks the leading
part of the paths that the whole model uses (GPT-2: the module `transformer.h.0.attn.c_attn` is stored as
`h.0.attn.c_attn.weight`), so a path is looked for as it is, then without its first part, then with one part before it.

A head that the config ties to the embedding isn't in the files: its path stands for the embedding. Either of the two is
stored as [V, D], whatever the linear layers are.

Rejected: the names of a skeleton on the meta device (seconds of imports for the one rule above), and KeyError for a
path that isn't there: somebody typed it, or an adapter was made for another base.

Letters: M outputs, N inputs.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import InputError, listed
from deltaw.files.safetensors import read_header, read_tensor
from deltaw.files.shards import shards
from deltaw.files.strict_json import read_json
from deltaw.kernels.weight import DenseWeight, Weight

SUFFIX = ".weight"
EMBEDDINGS, HEADS = ("embed_tokens", "wte", "embed_in", "word_embeddings"), ("lm_head", "embed_out", "output")
HEADER_BYTES, TENSORS = 100_000_000, 1_000_000  # what `shards` accepts of a base


class LinearWeights(Mapping[str, Weight]):
    """`weights[module path]` -> the weight in float32 on the CPU, read when asked for; iterating gives the 2-D ones.

    `transposed`: the linear layers of this base store [N, M] (GPT-2's Conv1D), so every matrix is turned; only ask for
    linear layers then. Raises InputError: at once for a folder that `shards` refuses, at a read for an unknown path
    (also by `get`), a weight that isn't a floating-point matrix, and NaN or infinity in it.
    """

    def __init__(self, folder: Path, transposed: bool = False) -> None:
        self.folder, self.transposed = folder, transposed
        self._files: dict[str, Path] = {}
        self._tied = (folder / "config.json").is_file() and _ties(folder / "config.json")
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file, names in shards(folder).items():
            shapes = read_header(file, max_header_bytes=HEADER_BYTES, max_tensors=TENSORS).shapes
            for name in names:
                if name.endswith(SUFFIX):
                    self._files[name.removesuffix(SUFFIX)] = file
                    self._shapes[name.removesuffix(SUFFIX)] = shapes[name]

    def __getitem__(self, path: str) -> Weight:
        return DenseWeight(self.read(path)[0])

    def read(self, path: str) -> tuple[Tensor, torch.dtype]:
        """The matrix [M, N] itself, float32, and the type in which it is stored."""
        stored, shape = self._stored(path), self.shape(path)
        weight = read_tensor(self._files[stored], stored + SUFFIX)
        if not weight.is_floating_point():
            raise InputError(f"{self.folder}: {stored} holds {weight.dtype} numbers, not floating-point ones")
        weight_MN = (weight.T if self._turned(stored) else weight).float().contiguous()
        if not torch.isfinite(weight_MN).all():
            raise InputError(
                f"{self.folder}: {stored}, shape {shape}, holds NaN or infinity", fix="download the base again"
            )
        return weight_MN, weight.dtype

    def __iter__(self) -> Iterator[str]:
        return (path for path, shape in self._shapes.items() if len(shape) == 2)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, path: object) -> bool:
        candidates = self._candidates(path) if isinstance(path, str) else []
        return len(candidates) == 1 and len(self._shapes[candidates[0]]) == 2

    def shape(self, path: str) -> tuple[int, int]:
        """(M, N), from the header alone. Raises InputError for an unknown path and for what isn't a matrix."""
        shape = self._shapes[stored := self._stored(path)]
        if len(shape) != 2:
            raise InputError(
                f"{self.folder}: {stored} has shape {shape}, which isn't a matrix", fix="name a linear layer"
            )
        return shape[::-1] if self._turned(stored) else shape

    def _turned(self, stored: str) -> bool:
        return self.transposed and stored.rpartition(".")[2] not in (*EMBEDDINGS, *HEADS)

    def _stored(self, path: str) -> str:
        """The path under which the file has it."""
        match self._candidates(path):
            case [stored]:
                return stored
            case []:
                near = difflib.get_close_matches(path, self._shapes, n=3, cutoff=0.6)
                some = (
                    f"did you mean {' or '.join(near)}?" if near else f"it has, for example:\n{listed(list(self), 2)}"
                )
                raise InputError(f"{self.folder}: has no weight of a module {path!r:.120}", fix=some)
            case several:
                raise InputError(f"{self.folder}: {path!r:.120} stands for several weights:\n{listed(several, 2)}")

    def _candidates(self, path: str) -> list[str]:
        tail = path.partition(".")[2]
        for exact in (path, tail):
            if exact in self._shapes:
                return [exact]
        named = [stored for stored in self._shapes if stored.partition(".")[2] == path]
        if not named and self._tied and path.rpartition(".")[2] in HEADS:
            return [stored for stored in self._shapes if stored.rpartition(".")[2] in EMBEDDINGS]
        return named


def _ties(config: Path) -> bool:
    """Whether a model's head is its embedding: so it is unless its config says otherwise."""
    known = read_json(config, allow_nan=True)
    inner = known.get("text_config")
    own = [
        part["tie_word_embeddings"]
        for part in (known, inner)
        if isinstance(part, dict) and "tie_word_embeddings" in part
    ]
    return bool(own[0]) if own else True
