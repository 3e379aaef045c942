"""`base_weights: keep`: a GGUF's matrices stay in its own blocks (kernels/blocks.py), which are what will be served.

The converted folder (gguf.py) is bfloat16; what it says of names, shapes and the order of rows holds for the blocks
as well. That is checked and not assumed: a matrix is taken from the file if its numbers there, rounded to bfloat16,
are the folder's to the bit, as its rows stand or in the order that llama.cpp gives those of Llama's queries and keys:

    row i of the model is row order[i] of the file      order = [h, d, 2] -> [h, 2, d], h heads of 2d rows

So no table of architectures has to be right, and the fingerprint is the folder's: an adapter of one goes on the other.
What fits neither way (experts in one tensor, rows that are shuffled otherwise) stays dense, and a line says so. Vectors
are the file's own in float32 where the model computes in that (Gemma's norms, stored plus one, included).

The model is built without numbers for its matrices (`unallocated`), and each is read, checked and put apart some rows
at a time. So no more is ever in memory than the packed model and a few rows.

Rejected: transformers' loader (it has the whole dense model in memory before anything can be packed), and reading the
file by names alone, as transformers' reader does (a permutation that it gets wrong trains an adapter for nothing).

Letters: M outputs, N inputs, X bytes of a row.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltaw.base.gguf import stored_names
from deltaw.base.packed import LEAST, pack_modules
from deltaw.base.source import Source
from deltaw.errors import InputError, listed
from deltaw.files.gguf_header import Header, type_name
from deltaw.files.gguf_parts import parts_of as files_of
from deltaw.files.gguf_parts import read_model
from deltaw.files.safetensors import read_tensor
from deltaw.files.shards import shards
from deltaw.kernels.blocks import FORMATS, BlockWeight, Format, numbers_of, parts_of
from deltaw.kernels.packed import CastWeight, PackedWeight
from deltaw.show.text import counted

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # ggml's numbers of types without blocks
AT_ONCE = 2**22  # numbers that are read and checked in one piece


def check_keep(source: Source) -> Header:
    """The header of the base's GGUF. Raises InputError where there is none, or has blocks that can't be kept."""
    if source.gguf is None:
        raise InputError(
            f"base_weights: keep keeps the blocks of a .gguf file, and {source.name} isn't one",
            fix="name a .gguf file as the base, or set base_weights: bfloat16",
        )
    header = read_model(files_of(source.gguf))
    strange: dict[str, list[str]] = {}
    for name, place in header.places.items():
        if len(header.shapes[name]) == 2 and place.kind not in FORMATS and place.kind not in PLAIN:
            strange.setdefault(type_name(place.kind), []).append(name)
    if strange:
        lines = [f"{kind}: {counted(len(names), 'tensor')}, {names[0]}, …" for kind, names in strange.items()]
        known = ", ".join(kind.name for kind in FORMATS.values())
        raise InputError(
            f"{source.gguf}: base_weights: keep can't keep some of its types:\n{listed(lines, 2)}",
            fix=f"set base_weights: bfloat16, or use a file in {known}, F16 or BF16",
        )
    return header


class Unallocated(TorchFunctionMode):
    """Inside, matrices are made on the meta device, where they take no memory; everything else as ever, so that what a
    model computes for itself (rotary frequencies) is there. Layers make their weights by `torch.empty`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            made = func(*args, **{**kwargs, "device": "meta"})
            return made if made.numel() >= LEAST else func(*args, **kwargs)
        return func(*args, **kwargs)


def load_blocks(model: nn.Module, source: Source, header: Header, dtype: torch.dtype) -> list[str]:
    """Give a model that was made `Unallocated` its weights, frozen, in place. Raises InputError for a folder whose
    tensors aren't the model's. Returns the names of its matrices that stayed dense."""
    folder = Folder(source.directory, model)
    blocks = Blocks(header, stored_names(header, folder.unread), model.config)

    def pack(path: str, w_MN: Tensor) -> PackedWeight | None:
        name, wanted = folder.read(f"{path}.weight")
        return blocks.matrix(name, wanted if w_MN.is_contiguous() else wanted.t(), dtype)

    pack_modules(model, pack)
    _fill(model, lambda name, kind: blocks.plain(*folder.read(name), kind))
    if left := sorted(folder.unread - {name for name, _ in model.named_buffers()}):
        raise _unfit(source.directory, [f"{name}: no place for it in the model" for name in left])
    dense = ((name, one) for name, one in model.named_parameters() if one.is_floating_point() and one.ndim > 1)
    return [name for name, parameter in dense if parameter.numel() >= LEAST]


class Folder:
    """The converted folder's tensors by the model's names, one in memory at a time. A tensor that the model shares is
    in the files under one of its names."""

    def __init__(self, path: Path, model: nn.Module) -> None:
        self.path = path
        self._files = {name: file for file, names in shards(path).items() for name in names}
        self.unread = set(self._files)
        stored: dict[nn.Parameter, str] = {}
        named = list(model.named_parameters(remove_duplicate=False))
        for name, parameter in named:
            if name in self._files:
                stored.setdefault(parameter, name)
        self._names = {name: stored.get(parameter, name) for name, parameter in named}

    def read(self, name: str) -> tuple[str, Tensor]:
        """Its name in the files, and the tensor."""
        name = self._names[name]
        if name not in self._files:
            raise _unfit(self.path, [f"{name}: not in the files"])
        self.unread.discard(name)
        return name, read_tensor(self._files[name], name)


class Blocks:
    """The GGUF's tensors by the model's names, each checked against the numbers that it must have."""

    def __init__(self, header: Header, names: dict[str, str], config: Any) -> None:
        self._header, self._names = header, names
        text = config.get_text_config(decoder=True)
        heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
        self._heads = [count for count in dict.fromkeys(heads) if isinstance(count, int) and count > 0]
        files = {place.file for place in header.places.values()}
        # A private mapping: what is never written to is read from the file when it is looked at.
        self._bytes = {
            file: torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
            for file in files
        }

    def matrix(self, name: str, wanted_MN: Tensor, dtype: torch.dtype) -> PackedWeight | None:
        """It in the file's own form, with products in `dtype`; None where it isn't there, or is dense as it stands."""
        raw_MX = self._raw(name, wanted_MN)
        if raw_MX is None:
            return None
        kind = self._header.places[self._names[name]].kind
        if kind in FORMATS:
            made = (_blocks(FORMATS[kind], rows_MX, wanted_MN) for rows_MX in self._orders(raw_MX))
            parts = next((parts for parts in made if parts is not None), None)
            return None if parts is None else BlockWeight(FORMATS[kind], parts, dtype)
        if PLAIN[kind] in (torch.float32, dtype):
            return None
        numbers = (rows_MX.view(PLAIN[kind]) for rows_MX in self._orders(raw_MX))
        w_MN = next((w_MN for w_MN in numbers if _same(w_MN, wanted_MN)), None)
        return None if w_MN is None else CastWeight(w_MN.clone(), dtype)

    def plain(self, name: str, wanted: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor in `dtype`: the file's own numbers where that is float32, else the folder's."""
        raw = self._raw(name, wanted)
        if raw is None or dtype != torch.float32:
            return wanted.to(dtype, copy=True)
        if self._header.places[self._names[name]].kind != 0:
            weight = self.matrix(name, wanted, dtype) if wanted.ndim == 2 else None
            return wanted.to(dtype, copy=True) if weight is None else weight.dense()
        stored = raw.view(torch.float32)
        numbers = (some.view(wanted.shape) for plain in (stored, stored - 1) for some in self._orders(plain))
        return next((some for some in numbers if _same(some, wanted)), wanted).to(dtype, copy=True)

    def _raw(self, name: str, wanted: Tensor) -> Tensor | None:
        """A tensor's bytes [M, X], or None where it isn't there in this shape."""
        stored = self._names.get(name, "")
        if self._header.shapes.get(stored) != tuple(reversed(wanted.shape)):
            return None
        start, size, _, file = self._header.places[stored]
        return self._bytes[file][start : start + size].view(len(wanted), -1)

    def _orders(self, raw_MX: Tensor) -> Iterator[Tensor]:
        """The rows as they stand, then as they are if llama.cpp permuted them."""
        yield raw_MX
        for heads in self._heads:
            if len(raw_MX) % (2 * heads) == 0:
                yield raw_MX.view(heads, -1, 2, raw_MX.shape[1]).transpose(1, 2).reshape(raw_MX.shape)


def _blocks(kind: Format, raw_MX: Tensor, wanted_MN: Tensor) -> dict[str, Tensor] | None:
    """The parts of a matrix, or None where its numbers aren't those that are wanted."""
    m, n = wanted_MN.shape
    parts: dict[str, Tensor] = {}
    step = max(1, AT_ONCE // n)
    for start in range(0, m, step):
        some = parts_of(kind, raw_MX[start : start + step])
        if not _same(numbers_of(kind, some), wanted_MN[start : start + step]):
            return None
        for name, part in some.items():
            whole = parts.setdefault(name, part.new_empty(m, *part.shape[1:]))
            whole[start : start + step] = part
    return parts


def _same(numbers: Tensor, wanted: Tensor) -> bool:
    """Whether, rounded as the folder's are, they are the folder's, and finite."""
    rounded = numbers.to(wanted.dtype)
    return torch.equal(rounded, wanted) and bool(torch.isfinite(torch.stack(torch.aminmax(rounded))).all())


def _fill(model: nn.Module, read: Callable[[str, torch.dtype], Tensor]) -> None:
    """Put `read(name, type)` in the place of every floating-point parameter; those that are shared stay so."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    new: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_floating_point() or id(parameter) in new:
                continue
            if parameter not in made:
                tensor = read(f"{path}.{name}".lstrip("."), parameter.dtype)
                made[parameter] = nn.Parameter(tensor, requires_grad=False)
                new.add(id(made[parameter]))
            module.register_parameter(name, made[parameter])


def _unfit(folder: Path, problems: list[str]) -> InputError:
    return InputError(
        f"{folder}: its tensors can't be kept in blocks:\n{listed(problems, 2)}",
        fix="set base_weights: bfloat16",
    )
