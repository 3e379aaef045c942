"""A matrix's name -> the matrix, checked: from a file, or a weight of a base.

    M.npy                      NumPy's format, real numbers
    M.csv                      one row per line; commas, semicolons, tabs or blanks between numbers; names in line 1
    file.safetensors:tensor    any type of real numbers
    BASE:module.path           a base as `deltaw train` takes it, e.g. builtin:smollm2-135m:model.layers.0.mlp.up_proj

float32 stays, narrower types become it; float64, integers, booleans and text become float64. What the entries were
rounded to before is kept beside them, since it decides what of a matrix is noise (linalg/rank.py): the type in the
file; a narrower one that has every entry, for somebody widened them; in a text the decimals that its numbers have.
Integers that float64 can't hold are kept as they are, too, for a small matrix; for a large one the description says
that they aren't.

Sizes are looked at before numbers are read, and what isn't a matrix of finite numbers is one InputError that names the
place. An .npy file is mapped, so a pickle inside is refused by its type and never opened; other formats than these are
not guessed. Text is read by hand: pyarrow, numpy and csv give numbers or cells, but not which line is at fault and
how many decimals a number was written with, and csv has no blanks as a separator.

Letters: M rows, N columns.
"""

import contextlib
import difflib
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from deltaw.base.linear_weights import LinearWeights
from deltaw.base.source import PICKLES, find_base
from deltaw.errors import InputError, first_line, listed
from deltaw.files.safetensors import read_header, read_tensor
from deltaw.linalg.rounding import Rounding
from deltaw.show.progress import QUIET, Display

MAX_BYTES = 20_000_000_000  # as float32: beyond it no full SVD ends
MAX_TEXT_BYTES = 1_000_000_000
MANY = 100  # entries from which on their last digits tell what they were rounded to
EXACT, EXACT_SIDE = 2.0**53, 64  # beyond it float64 has gaps; fractions of so many rows take seconds
WIDE = torch.float32, torch.float64
NARROWER = torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32
INTEGERS = "integers"
FORMS = "a matrix is M.npy, M.csv, file.safetensors:tensor, or BASE:module.path"


class Matrix(NamedTuple):
    """The entries as float32 or float64, a short description, and what a float can't say of them."""

    x_MN: Tensor
    source: str
    rounding: Rounding = Rounding()
    integers: list[list[int]] | None = None  # the entries of a small matrix of integers


def read_matrix(name: str, display: Display = QUIET) -> Matrix:
    """`display` shows a line before a base is converted.

    Raises InputError: a name that leads to no matrix (with near misses), an unreadable file, what isn't a matrix of
    finite real numbers, more than 20 GB as float32.
    """
    if match := re.fullmatch(r"(.+?\.safetensors)(?::(.*))?", name, re.DOTALL):
        matrix = _safetensors(_file(match[1]), match[2] or "")
    elif name.endswith(".npy"):
        matrix = _npy(_file(name))
    elif name.endswith(".csv"):
        matrix = _csv(_file(name))
    else:
        matrix = _of_base(name, display)
    bad = ~torch.isfinite(matrix.x_MN)
    if bad.any():
        row, column = (int(place) for place in bad.nonzero()[0])
        value = float(matrix.x_MN[row, column])
        raise InputError(
            f"{name}: row {row + 1}, column {column + 1} is {value}; {int(bad.sum()):,} entries aren't finite"
        )
    return matrix


def _of_floats(x_MN: Tensor, stored: torch.dtype, source: str) -> Matrix:
    """`x_MN` [M, N] of the type `stored` or, widened already, of another."""
    narrow = next((dtype for dtype in NARROWER if _fills(x_MN, dtype)), stored) if stored in WIDE else stored
    wide_MN = x_MN.to(torch.float64 if narrow == torch.float64 else torch.float32)
    if narrow in WIDE or _small_integers(wide_MN, narrow):
        return Matrix(wide_MN, source)
    return Matrix(wide_MN, source, Rounding.to(narrow))


def _fills(x_MN: Tensor, dtype: torch.dtype) -> bool:
    """Whether a narrower type has all entries, which are many, and about half of the smaller ones use its last bit, as
    numbers rounded to it do. (Multiples of a quarter, say, don't.)"""
    narrow_MN = x_MN.to(dtype)
    if x_MN.dtype == dtype or not bool((narrow_MN.to(x_MN.dtype) == x_MN).all()):
        return False
    sizes = x_MN.abs().flatten()
    smaller = (sizes > 0) & (sizes <= sizes[sizes > 0].median()) if bool(sizes.any()) else sizes > 0
    bits = narrow_MN.flatten().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize])[smaller]
    return len(bits) >= MANY // 2 and abs(float((bits & 1).double().mean()) - 0.5) < 0.2


def _small_integers(x_MN: Tensor, dtype: torch.dtype) -> bool:
    """Whether all entries are integers that `dtype` has without a gap: those were meant, not rounded."""
    return bool((x_MN == x_MN.round()).all()) and float(x_MN.abs().max()) <= 2 / torch.finfo(dtype).eps


def _of_integers(x_MN: numpy.ndarray, source: str) -> Matrix:
    """Any integers: as float64, and as they are where that rounds them."""
    wide_MN = x_MN.astype(numpy.float64)
    with numpy.errstate(invalid="ignore"):  # 2⁶³ fits in no int64: the largest ones were rounded up to it
        top = float(numpy.iinfo(x_MN.dtype).max) if x_MN.dtype.kind != "b" else 2.0
        exact = (wide_MN < max(top, EXACT)) & (wide_MN.astype(x_MN.dtype) == x_MN)
    rows = [[int(value) for value in row] for row in x_MN.tolist()] if max(x_MN.shape) <= EXACT_SIDE else None
    return _integers(torch.from_numpy(wide_MN), source, rows, bool(exact.all()))


def _integers(x_MN: Tensor, source: str, rows: list[list[int]] | None, exact: bool) -> Matrix:
    """`rows`: the entries of a small matrix; `exact`: float64 has them, too."""
    note = "" if rows or exact else ", integers above 2⁵³ rounded to float64"
    return Matrix(x_MN, source + note, Rounding(INTEGERS), rows)


def _file(name: str) -> Path:
    with contextlib.suppress(OSError, ValueError):  # a name too long for a path, or with a NUL
        if (path := Path(name).expanduser()).is_file():
            return path
    raise InputError(f"{name:.200}: no such file", fix=_near(name))


def _near(name: str) -> str:
    """What to do about a file that isn't there."""
    path, names = Path(name).expanduser(), []
    with contextlib.suppress(OSError, ValueError):
        names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    near = difflib.get_close_matches(path.name, names, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else FORMS


def _size(shape: Sequence[int], where: object) -> None:
    """Raises InputError unless `shape` is a matrix's, with entries, and not too large."""
    if len(shape) != 2:
        raise InputError(f"{where}: has {len(shape)} dimensions, {tuple(shape)}; a matrix has two")
    if 0 in shape:
        raise InputError(f"{where}: is empty, shape {tuple(shape)}")
    if 4 * math.prod(shape) > MAX_BYTES:
        raise InputError(f"{where}: {shape[0]:,} x {shape[1]:,} is too large to decompose", fix="cut a part out of it")


def _npy(path: Path) -> Matrix:
    try:
        x_MN = numpy.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a stranger's header makes NumPy raise nearly anything
        reason = first_line(error)
        raise InputError(
            f"{path}: not an array of plain numbers: {reason:.200}", fix="write it with numpy.save"
        ) from None
    _size(x_MN.shape, path)
    if x_MN.dtype.kind not in "fiub":
        raise InputError(f"{path}: holds {x_MN.dtype} values, not real numbers")
    if x_MN.dtype.kind in "iub":
        return _of_integers(numpy.array(x_MN, order="C", subok=False), path.name)
    wide = numpy.float32 if x_MN.dtype.itemsize <= 4 else numpy.float64
    stored = torch.float16 if x_MN.dtype.itemsize == 2 else torch.float32 if wide == numpy.float32 else torch.float64
    return _of_floats(torch.from_numpy(numpy.array(x_MN, dtype=wide, order="C", subok=False)), stored, path.name)


def _csv(path: Path) -> Matrix:
    """float64, and what the text says beyond it."""
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes of text", fix="save it as .npy")
    values, width, names, rows = array("d"), 0, False, 0
    places, large = Counter[tuple[str, int]](), dict[int, int]()
    try:
        for number, cells in _lines(path):
            row = [_number(cell) for cell in cells]
            if not rows and not names and any(cells) and all(value is None for value in row):
                names = True
                continue
            for cell, value in zip(cells, row, strict=True):
                if value is None or not math.isfinite(value):
                    problem = (
                        f"{cell!r:.60} isn't a finite number" if cell else f"cell {cells.index(cell) + 1} is empty"
                    )
                    fix = "write numbers with a decimal point; only the first line may hold names"
                    raise InputError(f"{path}, line {number}: {problem}", fix=fix)
                places[_decimals(cell)] += value != 0
                if abs(value) >= EXACT and (whole := _integer(cell)) is not None:
                    large[len(values)] = whole
                values.append(value)
            if rows and len(row) != width:
                raise InputError(f"{path}, line {number}: has {len(row)} numbers, the first row has {width}")
            width, rows = len(row), rows + 1
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text", fix="save it as UTF-8") from None
    _size((rows, width), path)
    x_MN = torch.frombuffer(values, dtype=torch.float64).view(rows, width).clone()
    source = path.name + ", its first line taken as names" * names
    if not large:
        return Matrix(x_MN, source, _decimal_rounding(places))
    small = max(rows, width) <= EXACT_SIDE and bool((x_MN == x_MN.round()).all())
    whole_numbers = [large.get(i, int(value)) for i, value in enumerate(values)] if small else []
    lines = [whole_numbers[i : i + width] for i in range(0, len(whole_numbers), width)] or None
    return _integers(x_MN, source, lines, all(whole == values[i] for i, whole in large.items()))


def _decimals(cell: str) -> tuple[str, int]:
    """("fixed", digits after the point), or ("scientific", those before the exponent)."""
    mantissa, exponent, _ = cell.lower().partition("e")
    return "scientific" if exponent else "fixed", len(mantissa.partition(".")[2])


def _decimal_rounding(places: Counter[tuple[str, int]]) -> Rounding:
    """Numbers that a program wrote have all the same decimals (trailing zeros may be cut); those by hand are meant."""
    kind, digits = max(places, key=lambda place: (place[1], places[place]))
    if digits == 0 or digits > 14 or places.total() < MANY or places[kind, digits] < 0.6 * places.total():
        return Rounding()
    half = 0.5 * 10.0**-digits
    name = f"{digits} decimals" if kind == "fixed" else f"{digits + 1} digits"
    return Rounding(name, absolute=half) if kind == "fixed" else Rounding(name, relative=half)


def _integer(cell: str) -> int | None:
    """A cell of an integer, however it is written."""
    try:
        exact = Decimal(cell)
        return int(exact) if exact == exact.to_integral_value() else None
    except ArithmeticError:
        return None


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


def _safetensors(path: Path, name: str) -> Matrix:
    shapes = read_header(path).shapes
    if name not in shapes:
        near = difflib.get_close_matches(name, shapes, n=2, cutoff=0.6)
        some = near or [key for key, shape in shapes.items() if len(shape) == 2] or list(shapes)
        what = f"holds no tensor {name!r:.120}" if name else "name one of its tensors"
        raise InputError(f"{path}: {what}", fix="name one like this:\n" + listed([f"{path}:{key}" for key in some], 2))
    _size(shapes[name], f"{path}: {name}")
    x_MN, source = read_tensor(path, name), f"{name} of {path.name}"
    if x_MN.is_complex():
        raise InputError(f"{path}: {name} holds {str(x_MN.dtype).removeprefix('torch.')} values, not real numbers")
    if not x_MN.is_floating_point():
        return _of_integers(x_MN.numpy(), source)
    with contextlib.suppress(RuntimeError):  # types of less than a byte
        return _of_floats(x_MN, x_MN.dtype, source)
    raise InputError(f"{path}: {name} holds {str(x_MN.dtype).removeprefix('torch.')} values, which can't be read")


def _of_base(name: str, display: Display) -> Matrix:
    base, _, path = name.rpartition(":")
    if base in ("", "builtin"):
        base, path = name, ""
    if not path and not (name.startswith("builtin:") or name.endswith(".gguf") or _is_folder(name)):
        if any(Path(name).match(pattern) for pattern in PICKLES):
            raise InputError(f"{name!r:.200}: pickles run code when they are opened", fix=FORMS)
        raise InputError(f"{name!r:.200}: no matrix has such a name", fix=_near(name))
    weights = LinearWeights(find_base(base, display=display).directory)
    if not path:
        some = listed([f"{base}:{path}" for path in weights], 2)
        raise InputError(f"{name}: is a base; name one of its weights", fix="name one like this:\n" + some)
    _size(weights.shape(path), name)
    return _of_floats(*weights.read(path), f"{path} of {base}")


def _is_folder(name: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(name) and Path(name).expanduser().is_dir()
    return False
