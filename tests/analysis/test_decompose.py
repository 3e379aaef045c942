"""Ranks, factorisations and their errors on matrices known by construction; what people and programs are told."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.analysis import decompose as module
from deltaw.analysis.decompose import decompose, describe, spectrum
from deltaw.commands.decompose import decompose_named
from deltaw.errors import InputError
from deltaw.show.progress import Display

sizes = st.integers(1, 14)


def of_spectrum(m: int, n: int, sigma: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """[m, n] with these singular values and zeros."""
    generator = torch.Generator().manual_seed(0)
    r = len(sigma)
    u, v = (torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q for d in (m, n))
    return ((u * torch.tensor(sigma, dtype=torch.float64)) @ v.T).to(dtype)


@settings(deadline=None, max_examples=60)
@given(m=sizes, n=sizes, data=st.data(), scale=st.sampled_from([1.0, 1e-200, 1e200]))
def test_every_error_is_what_its_theorem_says(m: int, n: int, data: st.DataObject, scale: float) -> None:
    r = data.draw(st.integers(1, min(m, n)))
    k = data.draw(st.integers(1, min(m, n)))
    sigma = [scale * (1 + r - i) for i in range(r)]
    d = decompose(of_spectrum(m, n, sigma), rank=k)
    assert d.rank == d.column_rank == d.row_rank == d.full_rank.rank == r
    assert d.singular_values[:r] == pytest.approx(sigma)
    assert max(d.full_rank.error_frobenius, d.full_rank.error_two) < 1e-12
    total = math.hypot(*[value / scale for value in sigma])
    best = math.hypot(*[value / scale for value in sigma[k:]]) / total
    assert d.best_frobenius == pytest.approx(best, abs=1e-13)
    assert d.truncated.error_frobenius == pytest.approx(best, abs=1e-12)
    assert d.best_two == pytest.approx(sigma[k] / sigma[0] if k < r else 0, abs=1e-13)
    assert d.truncated.error_two == pytest.approx(d.best_two, abs=1e-12)
    assert d.best_frobenius - 1e-12 <= d.randomised.error_frobenius <= 1.1 * best + 1e-12
    assert d.best_two - 1e-12 <= d.randomised.error_two
    assert d.condition == (pytest.approx(sigma[0] / sigma[-1]) if r == min(m, n) else math.inf)


def test_counts_and_ranks() -> None:
    d = decompose(of_spectrum(20, 30, [3.0, 1.0, 1.0]), rank=2)
    assert (d.entries, d.saves_below) == (600, 12)
    assert (d.full_rank.numbers, d.full_rank.share) == (150, 0.25)
    assert d.truncated.numbers == d.randomised.numbers == 100
    assert d.stable_rank == pytest.approx(11 / 9)
    assert (d.rank_at_90, d.rank_at_99) == (2, 3)
    assert not d.exact and d.factors is None


def test_a_matrix_of_integers_is_factorised_exactly() -> None:
    d = decompose(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    assert d.exact and d.rank == 1 and d.factors == ((("1",), ("2",)), (("1", "2"),))
    assert d.full_rank.error_frobenius == d.full_rank.error_two == 0
    assert "│  1  │   │  1  2  │\n│  2  │" in describe(d, "it")
    assert "exactly 0" in describe(d, "it")


def test_fractions_multiply_to_the_matrix() -> None:
    rows = [[2, 4, 1], [3, 1, 5], [5, 5, 6], [0, 0, 0]]
    d = decompose(torch.tensor(rows, dtype=torch.float64))
    assert d.factors is not None and d.rank == 2
    p, qt = ([[Fraction(cell) for cell in row] for row in factor] for factor in d.factors)
    product = [[sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*qt, strict=True)] for row in p]
    assert product == rows
    assert "19/10" in str(d.factors)


@pytest.mark.parametrize("x", [torch.tensor([[0.5, 1.0]]), torch.full((2, 2), 2.0**53, dtype=torch.float64)])
def test_what_is_no_integer_or_may_have_been_rounded_is_not_called_exact(x: Tensor) -> None:
    d = decompose(x)
    assert not d.exact and d.factors is not None
    assert "to four digits" in describe(d, "it") and "exactly" not in describe(d, "it")


def test_integers_of_up_to_64_rows_are_exact() -> None:
    x = torch.randint(-9, 10, (64, 20), generator=torch.Generator().manual_seed(0)).double()
    assert decompose(x).exact and not decompose(torch.cat([x, x])).exact


def test_the_zero_matrix() -> None:
    d = decompose(torch.zeros(3, 2))
    assert d.rank == d.column_rank == d.full_rank.numbers == d.rank_at_90 == 0
    assert [one.error_frobenius for one in (d.full_rank, d.truncated, d.randomised)] == [0, 0, 0]
    assert "rank            0" in describe(d, "it") and "infinite" in describe(d, "it")
    json.dumps(d.to_json(), allow_nan=False)


def test_where_picking_columns_would_take_minutes_the_svd_gives_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    x = of_spectrum(20, 30, [3.0, 2.0, 1.0], torch.float32)
    monkeypatch.setattr(module, "PIVOT_WORK", 3 * 600)
    assert decompose(x).column_rank == 3
    monkeypatch.setattr(module, "PIVOT_WORK", 3 * 600 - 1)
    d = decompose(x)
    assert (d.rank, d.column_rank, d.row_rank, d.full_rank.rank) == (3, None, None, 3)
    assert d.full_rank.error_two < 1e-5
    assert "weren't picked" in describe(d, "it") and "None" not in describe(d, "it")


def test_a_large_matrixs_errors_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(60, 80)
    dense = decompose(x).randomised.error_two
    monkeypatch.setattr(module, "DENSE_SIDE", 10)
    assert 0.98 * dense <= decompose(x).randomised.error_two <= 1.0001 * dense


def test_what_takes_long_is_announced_first(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    decompose(torch.ones(4, 4), say=said.append)
    assert not said
    monkeypatch.setattr(module, "LONG_WORK", 6)
    decompose(torch.ones(4, 4), say=said.append)
    assert said[0].startswith("full SVD of 4 x 4") and said[1].startswith("picking 1 independent columns")


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_that_does_not_exist_is_refused(rank: int) -> None:
    with pytest.raises(InputError, match=f"rank {rank}: a 3 x 5 matrix has approximations of rank 1 to 3"):
        decompose(torch.ones(3, 5), rank=rank)


def test_more_than_float32_holds_is_refused() -> None:
    with pytest.raises(InputError, match="beyond float32"):
        decompose(torch.full((2, 2), 3e38))


def test_the_default_rank_is_eight_or_the_matrixs_own() -> None:
    assert decompose(torch.randn(20, 20)).truncated.rank == 8
    assert decompose(of_spectrum(9, 9, [1.0, 1.0])).truncated.rank == 2


def test_json_is_plain_and_whole() -> None:
    d = decompose(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    found = json.loads(json.dumps(d.to_json(), allow_nan=False))
    assert found["condition"] is None and found["rank"] == 1 and found["entries"] == 4 and found["saves_below"] == 1
    assert found["truncated"]["numbers"] == 4 and len(found["singular_values"]) == 2
    assert decompose(torch.eye(2)).to_json()["condition"] == 1


@pytest.mark.parametrize("count", [1, 2, 10, 64, 65, 1000])
def test_the_spectrum_is_drawn_in_at_most_64_columns(count: int) -> None:
    drawn = spectrum([10.0 ** (-4 * i / count) for i in range(count)])
    lines = drawn.splitlines()
    assert len(lines) == 10 and max(map(len, lines)) <= 64 + 11
    assert lines[0].startswith(" 1.00e+00 │█") and lines[-1].split() == ["1", str(count)][: min(2, count)]
    heights = [sum(line[i : i + 1] not in ("", " ") for line in lines[:8]) for i in range(11, 11 + min(64, count))]
    assert heights == sorted(heights, reverse=True) and heights[0] == 8 and heights[-1] >= 1


def test_a_flat_spectrum_is_full_to_the_top() -> None:
    assert all(line.count("█") == 12 for line in spectrum([2.0, 2.0, 2.0]).splitlines()[:8])


def test_from_a_name_to_what_is_read(tmp_path: Path) -> None:
    rng = numpy.random.default_rng(0)
    numpy.save(tmp_path / "x.npy", (rng.normal(size=(40, 3)) @ rng.normal(size=(3, 50))).astype("float32"))
    text = decompose_named(str(tmp_path / "x.npy"), rank=2, display=Display(quiet=True)).text
    assert text.startswith("x.npy: 40 x 50 = 2,000 entries, float32\n\nrank            3 ")
    assert "singular values σ₁ … σ₃, log scale; the other 37 are rounding" in text
    assert "no matrix of rank 2 has errors below" in text and "σ₃ / σ₁" in text
    assert "R below M N / (M + N) = 22.22: here P Qᵀ stores fewer" in text
    assert f"{100 * 270 / 2000:.3g} %" in text
    assert all(len(line) <= 110 for line in text.splitlines())
    with pytest.raises(InputError, match="rank 41"):
        decompose_named(str(tmp_path / "x.npy"), rank=41, display=Display(quiet=True))
