"""What a matrix's entries are, rounded to a type or to decimals, or integers of any size; and so which rank it has."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaw.analysis.decompose import Decomposition, decompose, describe
from deltaw.analysis.matrix import read_matrix
from deltaw.linalg.rounding import Rounding
from tests.tiny import tiny_base

PRIME = 2**61 - 1


def rank_modulo(rows: list[list[int]]) -> int:
    """The rank over the integers modulo a large prime: the true one unless the prime divides a minor."""
    left, rank = [[value % PRIME for value in row] for row in rows], 0
    for column in range(len(rows[0])):
        pivot = next((row for row in left if row[column]), None)
        if pivot is None:
            continue
        left.remove(pivot)
        inverse, rank = pow(pivot[column], -1, PRIME), rank + 1
        left = [[(x - row[column] * inverse * y) % PRIME for x, y in zip(row, pivot, strict=True)] for row in left]
    return rank


TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def decomposed(name: str) -> tuple[Decomposition, str]:
    x = read_matrix(name)
    return decompose(x.x_MN, rounding=x.rounding, integers=x.integers), x.source


def low_rank(m: int, r: int, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=generator) @ torch.randn(r, n, generator=generator)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("widened", [None, torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "r", "n"), [(60, 5, 40), (40, 5, 60), (300, 12, 200), (64, 3, 64), (20, 2, 500)])
def test_the_type_that_entries_were_rounded_to_decides_the_rank(
    tmp_path: Path, m: int, r: int, n: int, dtype: torch.dtype, widened: torch.dtype | None
) -> None:
    for seed in range(3):
        x = low_rank(m, r, n, seed).to(dtype)
        save_file({"x": x if widened is None else x.to(widened).clone()}, tmp_path / "x.safetensors")
        d, _ = decomposed(f"{tmp_path}/x.safetensors:x")
        assert d.rank == d.column_rank == d.row_rank == d.full_rank.rank == r
        assert d.stored == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", TYPES[:3])
def test_a_full_matrix_of_a_narrow_type_is_full(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    save_file({"x": x.to(dtype), "tiny": torch.eye(3, dtype=dtype) * 1e-3}, tmp_path / "x.safetensors")
    assert decomposed(f"{tmp_path}/x.safetensors:x")[0].rank == 40
    assert decomposed(f"{tmp_path}/x.safetensors:tiny")[0].rank == 3


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(2, 30), n=st.integers(2, 30), dtype=st.sampled_from(TYPES), scale=st.sampled_from([1e-3, 1.0, 100.0]),
    levels=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_rounding_moves_no_singular_value_further_than_said(
    m: int, n: int, dtype: torch.dtype, scale: float, levels: int, seed: int
) -> None:
    """Errors of independent entries; the other bound, that of the Frobenius norm, holds for any at all."""
    x = scale * torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rounded = x.to(dtype).double()
    assert float(torch.linalg.matrix_norm(rounded - x, 2)) <= Rounding.to(dtype).error(rounded) * (1 + 1e-3)
    decimals = x.round(decimals=levels)
    error = Rounding("", absolute=0.5 * 10.0**-levels).error(decimals)
    assert float(torch.linalg.matrix_norm(decimals - x, 2)) <= error * (1 + 1e-9)


def test_npy_float16_and_text_with_few_decimals(tmp_path: Path) -> None:
    x = low_rank(60, 5, 40, 0).numpy()
    numpy.save(tmp_path / "h.npy", x.astype(numpy.float16))
    numpy.save(tmp_path / "d.npy", x.astype(numpy.float64))
    numpy.savetxt(tmp_path / "fixed.csv", x, fmt="%.3f", delimiter=",")
    numpy.savetxt(tmp_path / "power.csv", x, fmt="%.4e", delimiter=";")
    cut = "\n".join(",".join(str(round(float(value), 3)) for value in row) for row in x)  # without trailing zeros
    (tmp_path / "cut.csv").write_text(cut)
    wanted = {
        "h.npy": "float16",
        "d.npy": "float32",
        "fixed.csv": "3 decimals",
        "power.csv": "5 digits",
        "cut.csv": "3 decimals",
    }
    for name, stored in wanted.items():
        d, _ = decomposed(str(tmp_path / name))
        assert (name, d.rank, d.stored) == (name, 5, stored)


def test_numbers_that_were_meant_are_not_taken_for_rounded(tmp_path: Path) -> None:
    """Small ones by hand, and grids that no type made: ratings in halves, multiples of a quarter, of 1/256."""
    (tmp_path / "x.csv").write_text("1.5,0,0\n0,0.01,0\n0,0,0.001")
    assert decomposed(str(tmp_path / "x.csv"))[0].rank == 3
    dice = numpy.random.default_rng(0)
    for top, step in ((11, 2), (256, 4), (256, 256)):
        numpy.save(tmp_path / "x.npy", dice.integers(1, top, (60, 50)) / step)
        d, _ = decomposed(str(tmp_path / "x.npy"))
        assert (d.rank, d.stored) == (50, "float64")
    save_file({"x": torch.tensor([[1.0, 2.0], [2.0, 5.0]], dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    d, _ = decomposed(f"{tmp_path}/x.safetensors:x")
    assert (d.rank, d.exact) == (2, True)


def test_a_weight_of_a_base_has_its_stored_type(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    file = next(base.glob("*.safetensors"))
    tensors = {name: x.bfloat16() for name, x in load_file(file).items()}
    tensors["model.layers.0.mlp.down_proj.weight"] = low_rank(*shape_of(tensors, 3), 0).bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    d, _ = decomposed(f"{base}:model.layers.0.mlp.down_proj")
    assert (d.rank, d.stored) == (3, "bfloat16")


def shape_of(tensors: dict[str, torch.Tensor], r: int) -> tuple[int, int, int]:
    m, n = tensors["model.layers.0.mlp.down_proj.weight"].shape
    return m, r, n


BIG = 2**53
LARGE = [[BIG + 1, BIG], [BIG, BIG - 1]]  # determinant −1; of rank 1 where float64 rounds it


@pytest.mark.parametrize("form", ["int64", "uint64", "csv", "csv with points", "safetensors"])
@pytest.mark.parametrize(
    ("rows", "rank"), [(LARGE, 2), ([LARGE[0], LARGE[0]], 1), ([[BIG + 1, 2], [2 * BIG + 2, 4]], 1)]
)
def test_integers_beyond_float64_are_exact(tmp_path: Path, form: str, rows: list[list[int]], rank: int) -> None:
    name = str(tmp_path / "x.npy")
    if form.startswith("csv"):
        name, point = str(tmp_path / "x.csv"), ".0" * form.endswith("points")
        Path(name).write_text("\n".join(",".join(f"{value}{point}" for value in row) for row in rows))
    elif form == "safetensors":
        save_file({"x": torch.tensor(rows)}, tmp_path / "x.safetensors")
        name = f"{tmp_path}/x.safetensors:x"
    else:
        numpy.save(name, numpy.array(rows, dtype=form))
    d, _ = decomposed(name)
    assert (d.rank, d.column_rank, d.row_rank, d.exact) == (rank, rank, rank, True)
    assert json.loads(json.dumps(d.to_json(), allow_nan=False))["rank"] == rank and describe(d, "x")


@settings(deadline=None, max_examples=40)
@given(data=st.data(), m=st.integers(1, 6), n=st.integers(1, 6), r=st.integers(1, 6))
def test_integers_of_any_size_have_their_exact_rank(
    tmp_path_factory, data: st.DataObject, m: int, n: int, r: int
) -> None:
    whole = st.integers(-(2**30), 2**30)
    p = numpy.array(data.draw(st.lists(st.lists(whole, min_size=r, max_size=r), min_size=m, max_size=m)), dtype=object)
    q = numpy.array(data.draw(st.lists(st.lists(whole, min_size=n, max_size=n), min_size=r, max_size=r)), dtype=object)
    path = tmp_path_factory.getbasetemp() / "whole.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in (p @ q).tolist()))
    d, _ = decomposed(str(path))
    assert d.exact and d.rank == rank_modulo((p @ q).tolist()) and d.rank <= r


@pytest.mark.parametrize("value", [2**53 + 1, 2**63 - 1, -(2**53) - 1])
def test_large_matrices_of_such_integers_are_said_to_be_rounded(tmp_path: Path, value: int) -> None:
    x = numpy.full((70, 70), value)
    numpy.save(tmp_path / "x.npy", x)
    numpy.savetxt(tmp_path / "x.csv", x, fmt="%d", delimiter=",")
    for name in ("x.npy", "x.csv"):
        assert "rounded to float64" in read_matrix(str(tmp_path / name)).source
    numpy.save(tmp_path / "x.npy", numpy.full((70, 70), 2**60))  # float64 has it
    assert "rounded" not in read_matrix(str(tmp_path / "x.npy")).source
