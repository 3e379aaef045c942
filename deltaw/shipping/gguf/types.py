"""The numbers of a GGUF's tensors: which type each one gets, and the bytes.

For a plain type this does what llama.cpp's own quantiser does, so that a file is what its name promises:

    F32             one-dimensional tensors, norms, GPT-2's positions, tables of rotary factors
    the type        every other tensor, but
    Q8_0            the head (or the embedding, where it is the head, too) in a Q4 or Q5 file. llama.cpp takes Q6_K
                    there, or Q8_0 where rows aren't a multiple of 256; gguf-py can't write Q6_K, and Q8_0 is finer

A type holds blocks of 32 numbers of a row. Rows of any other length are refused before anything is written, as by
llama.cpp. The K types (blocks of 256, and a mixture of them by tensor) are llama.cpp's to make: quantizer.py.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deltaw.errors import InputError, listed
from deltaw.files.gguf_header import Place as Stored

if TYPE_CHECKING:
    import numpy as np

PLAIN = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
FLOATS = PLAIN[:3]
COARSE = PLAIN[4:]
MIXED = re.compile(r"Q[2-6]_K(_[SML])?")
USUAL = "Q8_0"
BLOCK = 32
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
        raise InputError(f"--type {name}: not a type that a GGUF can hold", fix=f"{', '.join(PLAIN)}, Q4_K_M, Q6_K, …")
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


def stays_float32(name: str, rows: tuple[int, ...]) -> bool:
    """Whether a tensor stays float32 in every type."""
    return len(rows) < 2 or not name.endswith("weight") or name.endswith("_norm.weight") or name == POSITIONS


def _type(name: str, shape: tuple[int, ...], asked: str, has_head: bool) -> str:
    if stays_float32(name, shape):
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


def name_of(number: int) -> str:
    """The type's name."""
    from gguf.constants import GGMLQuantizationType

    return str(GGMLQuantizationType(number).name)


def general_keys(kind: str) -> dict[str, int]:
    """The keys that name the type of a file's numbers."""
    from gguf.constants import GGML_QUANT_VERSION, LlamaFileType

    file_type = LlamaFileType.ALL_F32 if kind == "F32" else LlamaFileType[f"MOSTLY_{kind}"]
    return {"general.file_type": int(file_type), "general.quantization_version": int(GGML_QUANT_VERSION)}


def encoded(value: Tensor, kind: str) -> "np.ndarray":
    """The tensor's bytes in a type, by gguf's own quantisers (which take a few rows at a time)."""
    from gguf.quants import quantize

    rows = value.detach().reshape(-1, value.shape[-1])
    data: np.ndarray = quantize(rows.float().contiguous().numpy(), number(kind))
    return data


def decoded(data: "np.ndarray", kind: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 numbers that bytes of a type stand for."""
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(data.reshape(-1, data.shape[-1]), number(kind))).reshape(shape)


def rounded(value: Tensor, kind: str) -> Tensor:
    """A tensor after rounding to a type."""
    return decoded(encoded(value, kind), kind, tuple(value.shape))


def read_values(file: Path, place: Stored, shape: tuple[int, ...]) -> Tensor:
    """The numbers of a tensor of a file whose header was read."""
    import numpy as np

    data = np.fromfile(file, np.uint8, place.size, offset=place.start)
    name = name_of(place.kind)
    kinds = {"F32": np.float32, "F16": np.float16}
    data = data.view(kinds[name]) if name in kinds else data
    return decoded(data.reshape(*shape[:-1], -1), name, shape)
