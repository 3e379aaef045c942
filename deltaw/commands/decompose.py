"""`deltaw decompose`: what a matrix is made of (analysis/decompose.py)."""

from deltaw.analysis.decompose import decompose, describe
from deltaw.analysis.matrix import read_matrix
from deltaw.show.progress import Display
from deltaw.show.result import Result


def decompose_named(matrix: str, *, rank: int | None, display: Display) -> Result:
    """`matrix`: a file, a tensor of one, or a module of a base (analysis/matrix.py)."""
    x = read_matrix(matrix, display)
    parts = decompose(x.x_MN, rank=rank, say=display.say, rounding=x.rounding, integers=x.integers)
    return Result(parts.to_json(), describe(parts, x.source))
