"""What the algebra of updates costs: spectra from factors against the dense way, randomised against full SVD.

    python -m benchmarks.algebra [--rounds 3] [--out FOLDER] [--small]      -> benchmarks/algebra.csv

Spectra: every module of a rank-64 adapter on a model of Llama-8B's shape, 32 layers of seven, singular values alone and
with their vectors, from random factors; a layer's factors are made outside the timing. The dense way is what PEFT's
`convert_to_lora` does with each module, `torch.linalg.svd(ΔW, full_matrices=False)`. It is timed once on one module of
each shape, ΔW already formed, and multiplied by how often the shape occurs.

Randomised: rank 64 of 4096 x 4096, of a matrix whose singular values fall as i^-½ and of a Gaussian one, whose flat
spectrum is the hardest. Trained weights lie on both sides of i^-½: of 576 directions it has 90 % of the energy in 288,
SmolLM2-135M's first q_proj in 68, its first down_proj in 388. An error is that of the approximation over that of the
best one of this rank, which the full SVD gives; its 2-norm is an estimate from below (linalg/svd.py).

All of it in one process, in turns: a round is the spectra and both randomised SVDs; the full SVDs come once, at the
end. Modules of one shape in a batch took as long as one by one.

Letters: M outputs, N inputs, R rank, k the rank of an approximation.
"""

import argparse
import csv
import datetime
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.results import Row, Target, cpu, read_rows
from benchmarks.tables import shown, table
from deltaw.linalg.svd import product_singular_values, product_svd, randomised_svd
from deltaw.show.progress import Display
from deltaw.version import VERSION

ROOT = Path(__file__).parents[1]
COLUMNS = (
    "date", "machine", "threads", "round", "what", "matrix", "rank", "modules", "seconds", "error_frobenius",
    "error_two", "python", "torch", "deltaw",
)  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """What is decomposed: a layer's modules as (M, N), how many layers, and the side of the square matrices."""

    layers: int
    shapes: tuple[tuple[int, int], ...]
    rank: int
    side: int


FULL = Size(32, ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 2, (4096, 14336)), 64, 4096)
SMALL = Size(2, ((64, 64), (16, 64), (16, 64), (64, 64), *[(224, 64)] * 2, (64, 224)), 4, 96)


def measure(size: Size, rounds: int, say: Callable[[str], None]) -> Iterator[Row]:
    """A row for each thing that was timed in each round; the full SVDs have round 1 alone."""
    torch.manual_seed(0)
    square = {"Gaussian": torch.randn(size.side, size.side), "i^-½": falling(size.side)}
    near: list[tuple[int, str, float, Tensor, Tensor]] = []
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}: spectra, randomised SVDs")
        modules = size.layers * len(size.shapes)
        for what, seconds in zip(("values", "vectors"), spectra(size), strict=True):
            yield row(number, what, "all modules", size.rank, seconds, modules=modules)
        for name, x_MN in square.items():
            got, seconds = timed(lambda x_MN=x_MN: randomised_svd(x_MN, size.rank))
            near.append((number, name, seconds, got.error_frobenius, got.error_two))
    for name, x_MN in square.items():
        say(f"full SVD, {name}")
        (_, sigma_K, _), seconds = timed(lambda x_MN=x_MN: torch.linalg.svd(x_MN, full_matrices=False))
        yield row(1, "full", name, size.rank, seconds)
        best = float(sigma_K[size.rank :].double().norm()), float(sigma_K[size.rank])
        for number, of, seconds, *errors in near:
            if of == name:
                ratios = [float(error) / least for error, least in zip(errors, best, strict=True)]
                yield row(number, "randomised", name, size.rank, seconds, errors=ratios)
    for (m, n), count in Counter(size.shapes).items():
        say(f"SVD of a dense update, {m} x {n}")
        delta_MN = torch.randn(m, size.rank) @ torch.randn(size.rank, n)
        _, seconds = timed(lambda delta_MN=delta_MN: torch.linalg.svd(delta_MN, full_matrices=False))
        yield row(1, "dense", f"{m} x {n}", size.rank, seconds, modules=count * size.layers)


def spectra(size: Size) -> tuple[float, float]:
    """Seconds for the singular values of all modules, and for their vectors with them; each layer has other factors."""
    values = vectors = 0.0
    for _ in range(size.layers):
        layer = [(torch.randn(m, size.rank), torch.randn(size.rank, n)) for m, n in size.shapes]
        values += timed(lambda layer=layer: [product_singular_values(b, a) for b, a in layer])[1]
        vectors += timed(lambda layer=layer: [product_svd(b, a) for b, a in layer])[1]
    return values, vectors


def falling(side: int) -> Tensor:
    """Random singular vectors, singular values i^-½."""
    u, v = (torch.linalg.qr(torch.randn(side, side)).Q for _ in range(2))
    return (u * torch.arange(1.0, side + 1) ** -0.5) @ v.T


def timed(call: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def row(
    number: int, what: str, matrix: str, rank: int, seconds: float, *, modules: int = 1, errors: Any = ("", "")
) -> Row:
    values = {
        "date": datetime.date.today().isoformat(),
        "machine": cpu(),
        "threads": torch.get_num_threads(),
        "round": number,
        "what": what,
        "matrix": matrix,
        "rank": rank,
        "modules": modules,
        "seconds": seconds,
        "error_frobenius": errors[0],
        "error_two": errors[1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deltaw": VERSION,
    }
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in values.items()}


def write(folder: Path, rows: Sequence[Row]) -> Path:
    """The whole of `folder`/benchmarks/algebra.csv."""
    path = folder / "benchmarks" / "algebra.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return path


def read(folder: Path) -> list[Row]:
    """What `write` wrote; nothing where it never was run."""
    path = folder / "benchmarks" / "algebra.csv"
    return read_rows(path) if path.is_file() else []


def of(rows: Sequence[Row], what: str, matrix: str | None = None) -> list[Row]:
    return [one for one in rows if one["what"] == what and matrix in (None, one["matrix"])]


def middle(rows: Sequence[Row], what: str, matrix: str | None = None, column: str = "seconds") -> float:
    """The median over the rounds."""
    return statistics.median(float(one[column]) for one in of(rows, what, matrix))


def dense_seconds(rows: Sequence[Row]) -> float:
    """Of the dense way for all modules: one of each shape, times how many have it."""
    return sum(float(one["seconds"]) * int(one["modules"]) for one in of(rows, "dense"))


def targets(rows: Sequence[Row]) -> list[Target]:
    """Medians over the rounds, held to the bounds."""
    values, vectors = middle(rows, "values"), middle(rows, "vectors")
    ratio = dense_seconds(rows) / vectors
    listed = [
        Target("singular values of all modules", 5.0, values, at_most=True, unit="s"),
        Target("singular values and vectors of all modules", 5.0, vectors, at_most=True, unit="s"),
        Target("values and vectors, against SVDs of the dense updates", 100.0, ratio),
    ]
    for name in dict.fromkeys(one["matrix"] for one in of(rows, "randomised")):
        speed = middle(rows, "full", name) / middle(rows, "randomised", name)
        error = max(float(one["error_frobenius"]) for one in of(rows, "randomised", name))
        listed.append(Target(f"randomised SVD, {name}, against the full one", 20.0, speed))
        listed.append(Target(f"randomised SVD, {name}, Frobenius error over the best", 1.01, error, at_most=True))
    return listed


def section(rows: Sequence[Row]) -> str:
    """Of docs/performance.md; empty without rows."""
    if not rows:
        return ""
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("python", "torch", "deltaw"))
    dense = [[one["matrix"], one["modules"], f"{float(one['seconds']):.2f} s"] for one in of(rows, "dense")]
    near = [
        [name, f"{middle(rows, 'full', name):.2f} s", f"{middle(rows, 'randomised', name):.3f} s"]
        + [f"{middle(rows, 'randomised', name, column):.4f}" for column in ("error_frobenius", "error_two")]
        for name in dict.fromkeys(one["matrix"] for one in of(rows, "randomised"))
    ]
    parts = [
        "## Algebra of updates",
        f"Made by `python -m benchmarks.algebra` from `benchmarks/algebra.csv`. {first['date']}, {first['machine']}, "
        f"{first['threads']} threads, {versions}. {of(rows, 'values')[0]['modules']} modules of rank {first['rank']}; "
        f"medians of {len(of(rows, 'values'))} rounds.",
        table(["figure", "target", "measured", "met", "short by"], map(shown, targets(rows))),
        "The dense way is `torch.linalg.svd` of ΔW, which PEFT's `convert_to_lora` calls for every module. It was "
        f"timed on one module of each shape; the sum over all, {dense_seconds(rows):,.0f} s, is worked out from the "
        "counts:",
        table(["shape", "modules", "one SVD"], dense),
        "Errors are over those of the best approximation of the same rank; the 2-norm is estimated from below, and has "
        "no target:",
        table(["singular values", "full SVD", "randomised SVD", "Frobenius error", "2-norm error"], near),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algebra", description="Spectra and randomised SVDs.")
    parser.add_argument("--rounds", type=int, default=3, help="of everything but the full and the dense SVDs")
    parser.add_argument("--out", type=Path, help="benchmarks/algebra.csv goes there; build/bench with --small")
    parser.add_argument("--small", action="store_true", help="tiny matrices: to see that it runs")
    asked = parser.parse_args(arguments)
    if asked.rounds < 1:
        parser.error("--rounds must be at least 1")
    rows = list(measure(SMALL if asked.small else FULL, asked.rounds, Display().say))
    path = write(asked.out or (ROOT / "build" / "bench" if asked.small else ROOT), rows)
    print(section(rows) + f"\n{path}")


if __name__ == "__main__":
    main()
