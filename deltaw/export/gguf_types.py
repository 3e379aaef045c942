"""The numbers of a GGUF's tensors: which type each one gets, and the bytes.

What llama.cpp's own quantiser does for a plain type is done here, so that a file is what people expect of its name:

    F32             one-dimensional tensors, norms, GPT-2's positions, tables of rotary factors
    the type        every other tensor, and what is left of the two below
    Q8_0            the head (or the embedding, where it is the head, too) in a Q4 or Q5 file. llama.cpp takes Q6_K
                    there, or Q8_0 where rows aren't a multiple of 256; gguf-py can't write Q6_K, and Q8_0 is finer

A type holds blocks of 32 numbers of a row. What has other rows is refused before anything is written, as llama.cpp
refuses it. The K types (blocks of 256, and a mixture of them by tensor) are llama.cpp's to make: gguf_quantizer.py.
"""

import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deltaw.errors import InputError, listed

if TYPE_CHECKING:
    import numpy as np

PLAIN = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
FLOATS = PLAIN[:3]
COARSE = PLAIN[4:]
MIXED = re.compile(r"Q[2-6]_K(_[SML])?")
USUAL = "Q8_0"
BLOCK = 32
CHUNK = 1 << 24  # numbers that are quantised at once: the quantisers take some ten times their bytes
HEAD, EMBEDDING, POSITIONS = "output.weight", "token_embd.weight", "position_embd.weight"


class Place(NamedTuple):
    """A tensor to be written: its name, shape (rows first) and type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def size(self) -> int:
        """Bytes of it."""
        block, size = _block(self.type)
        return math.prod(self.shape) // block * size


def type_named(name: str | None) -> str:
    """The type that was asked for, in GGUF's spelling. Raises InputError for an unknown one."""
    known = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    asked = known.get(name or USUAL, (name or USUAL).upper())
    if asked not in PLAIN and not MIXED.fullmatch(asked):
        raise InputError(f"--type {name}: no type of numbers in a GGUF", fix=f"{', '.join(PLAIN)}, Q4_K_M, Q6_K, …")
    return asked


def choose(shapes: dict[str, tuple[int, ...]], asked: str) -> list[Place]:
    """A place for every tensor. Raises InputError naming those whose rows the type can't take."""
    places = [Place(name, shape, _type(name, shape, asked, HEAD in shapes)) for name, shape in shapes.items()]
    odd = [place for place in places if place.shape[-1] % _block(place.type)[0]]
    if odd:
        rows = [f"{place.name}: rows of {place.shape[-1]}" for place in odd]
        raise InputError(
            f"{asked} holds blocks of {BLOCK} numbers, and {len(odd)} of {len(places)} tensors have other rows:\n"
            f"{listed(rows, 2)}",
            fix=f"take a type that needs no blocks: {', '.join(FLOATS)}",
        )
    return places


def coarsest(name: str, rows: tuple[int, ...]) -> bool:
    """Whether a tensor stays float32 in every type."""
    return len(rows) < 2 or not name.endswith("weight") or name.endswith("_norm.weight") or name == POSITIONS


def _type(name: str, shape: tuple[int, ...], asked: str, has_head: bool) -> str:
    if coarsest(name, shape):
        return "F32"
    if asked in COARSE and name == (HEAD if has_head else EMBEDDING):
        return "Q8_0"
    return asked


def _block(kind: str) -> tuple[int, int]:
    from gguf.constants import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[number(kind)]
    return int(block), int(size)


def number(kind: str) -> Any:
    """gguf's number of a type."""
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType[kind]


def encoded(value: Tensor, kind: str) -> "np.ndarray":
    """The tensor's bytes in a type, a share of its rows at a time."""
    import numpy as np
    from gguf.quants import quantize

    rows = value.detach().reshape(-1, value.shape[-1])
    step = max(1, CHUNK // rows.shape[-1])
    parts = [quantize(part.float().contiguous().numpy(), number(kind)) for part in rows.split(step)]
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def rounded(value: Tensor, kind: str) -> Tensor:
    """What is left of a tensor of whole blocks once it was written in a type."""
    from gguf.quants import dequantize

    flat = torch.from_numpy(dequantize(encoded(value, kind), number(kind)).copy())
    return flat.reshape(value.shape)
