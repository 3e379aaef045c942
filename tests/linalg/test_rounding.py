"""The errors of rounding are as large as it is said, in sum and in their largest singular value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.linalg.rounding import noise, precision, survival, survived_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 200), (64, 512)])
@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_the_errors_are_as_large_as_foretold(dtype: torch.dtype, shape: tuple[int, int], skew: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(shape, generator=generator) * torch.exp(skew * torch.randn(shape[0], 1, generator=generator))
    rounded = exact.to(dtype).float()
    error = (rounded - exact).double()
    energy, edge = noise(rounded)
    assert energy == pytest.approx(float(error.square().sum()), rel=0.15)
    largest = float(torch.linalg.matrix_norm(error, 2))
    assert 0.5 * edge < largest <= edge  # the slack is for rows of very different sizes


def test_the_type_is_read_off_the_numbers() -> None:
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    assert precision(x) == torch.finfo(torch.float32).eps
    assert precision(x.bfloat16().float()) == precision(x.bfloat16()) == 2**-7
    assert precision(x.half().float()) == precision(x.half()) == 2**-10
    assert noise(torch.zeros(3, 3)) == (0.0, 0.0)


def bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().to(x.dtype)


def pair(seed: int, size: float, shape: tuple[int, int] = (40, 30)) -> tuple[torch.Tensor, torch.Tensor]:
    """W on bfloat16's grid and an update."""
    generator = torch.Generator().manual_seed(seed)
    w, delta = (torch.randn(shape, generator=generator) for _ in range(2))
    return bfloat16(w), size * delta


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.sampled_from([0.0, 1e-6, 1e-3, 1e-2, 1.0]), cut=st.integers(1, 39))
def test_what_survives_is_what_is_seen_and_adds_up(seed: int, size: float, cut: int) -> None:
    w, delta = pair(seed, size)
    seen = bfloat16(w + delta).double() - w.double()
    got = survival(w, delta, bfloat16)
    true = delta.double()
    along = float((seen * true).sum())
    norms = float(seen.norm() * true.norm())
    assert got.share == float((seen != 0).double().mean())
    assert got.cosine == pytest.approx(along / norms if norms else 0.0, abs=1e-4)  # of sums in float32
    assert got.kept == pytest.approx(along / float(true.norm()) ** 2 if size else 0.0, abs=1e-6)
    assert got.error == pytest.approx(float((seen - true).norm() / true.norm()) if size else 0.0, abs=1e-6)
    parts = [survival(w[rows], delta[rows], bfloat16) for rows in (slice(cut), slice(cut, None))]
    both = parts[0] + parts[1]
    assert (both.entries, both.changed) == (got.entries, got.changed)
    assert (both.seen, both.true, both.lost) == pytest.approx((got.seen, got.true, got.lost), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.sampled_from([1e-4, 1e-3, 1e-2, 1.0]))
def test_on_the_grid_the_errors_say_the_same(seed: int, size: float) -> None:
    w, delta = pair(seed, size)
    rounded = bfloat16(w + delta)
    got = survived_of(rounded - (w + delta), delta, int((rounded != w).sum()), w.numel())
    wanted = survival(w, delta, bfloat16)
    assert (got.changed, got.entries) == (wanted.changed, wanted.entries)
    tolerance = 1e-2 if size < 1e-3 else 1e-4  # float32 rounds the sum, too
    for name in ("cosine", "kept", "error"):
        assert getattr(got, name) == pytest.approx(getattr(wanted, name), abs=tolerance)


def test_an_update_below_half_a_step_is_gone() -> None:
    w, delta = torch.ones(8, 8), torch.full((8, 8), 1e-3)
    gone = survival(w, delta, bfloat16)
    assert (gone.share, gone.cosine, gone.kept, gone.error) == (0.0, 0.0, 0.0, pytest.approx(1.0))
    wide = survival(w.double(), delta.double(), lambda x: x.float().double())
    assert (wide.share, wide.kept) == (1.0, pytest.approx(1.0, abs=1e-4)) and wide.cosine > 0.999999
