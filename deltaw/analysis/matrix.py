"""A matrix's name -> the matrix, checked: from a file, or a weight of a base.

    M.npy                      NumPy's format, real numbers
    M.csv                      a row a line, commas, semicolons, tabs or blanks between numbers; names in the first line
    file.safetensors:tensor    any floating type
    BASE:module.path           a base as `deltaw train` takes it, e.g. builtin:smollm2-135m:model.layers.0.mlp.up_proj

float32 stays, narrower types become it; float64, integers, booleans and text become float64. Sizes are looked at before
numbers are read, and what is no matrix of finite numbers is one InputError that names the place. An .npy file is
mapped, so a pickle inside is refused by its type and never opened; other formats than these are not guessed at.

Letters: M rows, N columns.
"""

import contextlib
import difflib
import math
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from deltaw.base.linear_weights import LinearWeights
from deltaw.base.source import PICKLES, find_base
from deltaw.base.weights import read_header, read_tensor
from deltaw.errors import InputError, listed

MAX_BYTES = 20_000_000_000  # as float32: beyond it no full SVD ends
MAX_TEXT_BYTES = 1_000_000_000
FORMS = "a matrix is M.npy, M.csv, file.safetensors:tensor, or BASE:module.path"


def read_matrix(name: str, progress: Callable[[str], None] | None = None) -> tuple[Tensor, str]:
    """float32 or float64 [M, N], and a short description. `progress` gets a line before a base is converted.

    Raises InputError: a name that leads to no matrix (with near misses), an unreadable file, what is no matrix of
    finite real numbers, more than 20 GB as float32.
    """
    if match := re.fullmatch(r"(.+?\.safetensors)(?::(.*))?", name, re.DOTALL):
        x_MN, said = _safetensors(_file(match[1]), match[2] or ""), f"{match[2]} of {Path(match[1]).name}"
    elif name.endswith(".npy"):
        x_MN, said = _npy(_file(name)), Path(name).name
    elif name.endswith(".csv"):
        x_MN, names = _csv(_file(name))
        said = Path(name).name + ", its first line taken as names" * names
    else:
        return _of_base(name, progress)  # finite already
    bad = ~torch.isfinite(x_MN)
    if bad.any():
        row, column = (int(place) for place in bad.nonzero()[0])
        value = float(x_MN[row, column])
        raise InputError(
            f"{name}: row {row + 1}, column {column + 1} is {value}; {int(bad.sum()):,} entries aren't finite"
        )
    return x_MN, said


def _file(name: str) -> Path:
    with contextlib.suppress(OSError, ValueError):  # a name too long for a path, or with a NUL
        if (path := Path(name).expanduser()).is_file():
            return path
    raise InputError(f"{name:.200}: no such file", fix=_near(name))


def _near(name: str) -> str:
    """What to do about a file that isn't there."""
    path, there = Path(name).expanduser(), []
    with contextlib.suppress(OSError, ValueError):
        there = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    near = difflib.get_close_matches(path.name, there, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else FORMS


def _size(shape: Sequence[int], where: object) -> None:
    """Raises InputError unless `shape` is a matrix's, with entries, and not too large."""
    if len(shape) != 2:
        raise InputError(f"{where}: has {len(shape)} dimensions, {tuple(shape)}; a matrix has two")
    if 0 in shape:
        raise InputError(f"{where}: is empty, shape {tuple(shape)}")
    if 4 * math.prod(shape) > MAX_BYTES:
        raise InputError(f"{where}: {shape[0]:,} x {shape[1]:,} is too large to decompose", fix="cut a part out of it")


def _npy(path: Path) -> Tensor:
    try:
        x_MN = numpy.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a stranger's header makes NumPy raise nearly anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{path}: no array of plain numbers: {reason:.200}", fix="write it with numpy.save") from None
    _size(x_MN.shape, path)
    if x_MN.dtype.kind not in "fiub":
        raise InputError(f"{path}: holds {x_MN.dtype} values, no real numbers")
    narrow = x_MN.dtype.kind == "f" and x_MN.dtype.itemsize <= 4
    return torch.from_numpy(numpy.array(x_MN, dtype=numpy.float32 if narrow else numpy.float64, order="C", subok=False))


def _csv(path: Path) -> tuple[Tensor, bool]:
    """float64 [M, N], and whether its first line was taken as names."""
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes of text", fix="save it as .npy")
    values, width, names, rows = array("d"), 0, False, 0
    try:
        for number, cells in _lines(path):
            row = [_number(cell) for cell in cells]
            if not rows and not names and any(cells) and all(value is None for value in row):
                names = True
                continue
            for cell, value in zip(cells, row, strict=True):
                if value is None or not math.isfinite(value):
                    said = f"{cell!r:.60} is no finite number" if cell else f"cell {cells.index(cell) + 1} is empty"
                    fix = "write numbers with a decimal point; only the first line may hold names"
                    raise InputError(f"{path}, line {number}: {said}", fix=fix)
            if rows and len(row) != width:
                raise InputError(f"{path}, line {number}: has {len(row)} numbers, the first row has {width}")
            values.extend(value for value in row if value is not None)
            width, rows = len(row), rows + 1
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text", fix="save it as UTF-8") from None
    _size((rows, width), path)
    return torch.frombuffer(values, dtype=torch.float64).view(rows, width).clone(), names


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, its cells), blank lines left out; the first line decides what separates them."""
    separator, begun = None, False
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                if not begun:
                    separator, begun = next((mark for mark in ";\t," if mark in line), None), True
                yield number, [cell.strip().strip('"') for cell in line.strip("\r\n ").split(separator)]


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _safetensors(path: Path, name: str) -> Tensor:
    shapes = read_header(path).shapes
    if name not in shapes:
        near = difflib.get_close_matches(name, shapes, n=2, cutoff=0.6)
        some = near or [key for key, shape in shapes.items() if len(shape) == 2] or list(shapes)
        what = f"holds no tensor {name!r:.120}" if name else "which of its tensors?"
        raise InputError(f"{path}: {what}", fix="name one like this:\n" + listed([f"{path}:{key}" for key in some], 2))
    _size(shapes[name], f"{path}: {name}")
    x_MN = read_tensor(path, name)
    if not x_MN.is_floating_point():
        raise InputError(f"{path}: {name} holds {str(x_MN.dtype).removeprefix('torch.')} values, no floating ones")
    return x_MN if x_MN.dtype == torch.float64 else x_MN.float()


def _of_base(name: str, progress: Callable[[str], None] | None) -> tuple[Tensor, str]:
    base, _, path = name.rpartition(":")
    if base in ("", "builtin"):
        base, path = name, ""
    if not path and not (name.startswith("builtin:") or name.endswith(".gguf") or _is_folder(name)):
        if any(Path(name).match(pattern) for pattern in PICKLES):
            raise InputError(f"{name!r:.200}: pickles run code when they are opened", fix=FORMS)
        raise InputError(f"{name!r:.200}: no matrix has such a name", fix=_near(name))
    weights = LinearWeights(find_base(base, progress=progress).directory)
    if not path:
        some = listed([f"{base}:{path}" for path in weights], 2)
        raise InputError(f"{name}: is a base; which of its weights?", fix="name one like this:\n" + some)
    _size(weights.shape(path), name)
    return weights[path], f"{path} of {base}"


def _is_folder(name: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(name) and Path(name).expanduser().is_dir()
    return False
