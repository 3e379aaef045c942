"""The SVD of B A from the thin factors; truncated and randomised SVD, which know their errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.linalg.svd import product_singular_values, product_svd, randomised_svd, truncated_svd, two_norm

sizes = st.integers(1, 12)


@settings(deadline=None, max_examples=60)
@given(m=sizes, n=sizes, r=sizes, seed=st.integers(0, 99))
def test_equals_the_dense_svd(m: int, n: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((m, r), (r, n)))
    u, s, vt = product_svd(b, a)
    k = min(m, n, r)
    assert (u.shape, s.shape, vt.shape) == ((m, k), (k,), (k, n))
    torch.testing.assert_close(u @ torch.diag(s) @ vt, b @ a)
    torch.testing.assert_close(s, torch.linalg.svdvals(b @ a)[:k])
    torch.testing.assert_close(u.T @ u, torch.eye(k, dtype=torch.float64))


def test_zero_update_has_zero_spectrum() -> None:
    _, s, _ = product_svd(torch.zeros(5, 2), torch.randn(2, 4))
    assert not s.any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="inner dimensions"):
        product_svd(torch.zeros(5, 2), torch.zeros(3, 4))


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, r=sizes, batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_singular_values_alone_and_in_batches(m: int, n: int, r: int, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(batch, *s, generator=generator, dtype=torch.float64) for s in ((m, r), (r, n)))
    s = product_singular_values(b, a)
    torch.testing.assert_close(s, product_svd(b, a)[1])
    torch.testing.assert_close(s, torch.linalg.svdvals(b @ a)[..., : min(m, n, r)])


def decaying(m: int, n: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Singular values 1, 0.8, 0.64, … times `scale`."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q for d in (m, n))
    return scale * (u * 0.8 ** torch.arange(k)) @ v.T


@pytest.mark.parametrize("call", [truncated_svd, randomised_svd])
@pytest.mark.parametrize("scale", [1.0, 1e-160, 1e160])
@pytest.mark.parametrize(("m", "n", "k"), [(30, 20, 4), (20, 30, 20), (1, 7, 1), (5, 1, 1), (1, 1, 1), (40, 40, 39)])
def test_an_approximation_knows_its_error(call, scale: float, m: int, n: int, k: int) -> None:
    x = decaying(m, n, scale)
    got = call(x, k) if call is truncated_svd else call(x, k, generator=torch.Generator().manual_seed(0))
    assert (got.u_MK.shape, got.s_K.shape, got.vt_KN.shape) == ((m, k), (k,), (k, n))
    left = (x - got.dense()) / scale
    spectrum = 0.8 ** torch.arange(min(m, n), dtype=torch.float64)
    best = spectrum[k:].square().sum().sqrt()
    assert float(got.error_frobenius / scale) == pytest.approx(float(left.norm()), rel=1e-6, abs=1e-13)
    assert float(left.norm()) <= 1.01 * float(best) + 1e-13
    two = float(torch.linalg.matrix_norm(left, 2))
    assert 0.9 * two - 1e-13 <= float(got.error_two / scale) <= two + 1e-13


def slow(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An n x n matrix with σᵢ = i^-½, and σ."""
    u, v = (torch.linalg.qr(torch.randn(n, n)).Q for _ in range(2))
    sigma = torch.arange(1.0, n + 1) ** -0.5
    return (u * sigma) @ v.T, sigma


def test_randomised_misses_by_no_more_than_a_percent_in_both_norms() -> None:
    x, sigma = slow(400)
    got = randomised_svd(x, 20)
    assert float(torch.linalg.matrix_norm(x - got.dense(), 2)) <= 1.01 * float(sigma[20])
    assert float(got.error_frobenius) <= 1.002 * float(sigma[20:].norm())
    assert float((got.s_K / sigma[:20] - 1).abs().max()) < 1e-3


def test_on_a_flat_spectrum_too_but_for_the_two_norm() -> None:
    x = torch.randn(200, 150)
    best, got = truncated_svd(x, 20), randomised_svd(x, 20)
    assert float(best.error_frobenius) <= float(got.error_frobenius) <= 1.01 * float(best.error_frobenius)
    assert float(best.error_two) <= float(torch.linalg.matrix_norm(x - got.dense(), 2)) <= 1.1 * float(best.error_two)


@pytest.mark.parametrize("x", [torch.randn(300, 200, generator=torch.Generator().manual_seed(1)), slow(200)[0]])
def test_the_two_norm_is_approached_from_below(x: torch.Tensor) -> None:
    true = float(torch.linalg.matrix_norm(x, 2))
    assert 0.99 * true <= float(two_norm(x)) <= 1.00001 * true
    assert float(two_norm(x[:1])) == pytest.approx(float(x[0].norm()))


def test_the_error_of_a_large_float32_matrix_is_summed_without_loss() -> None:
    x = torch.randn(2000, 2000)
    got = randomised_svd(x, 1, power=0)
    assert float(got.error_frobenius) == pytest.approx(float((x - got.dense()).double().norm()), rel=1e-6)


def test_batches_and_the_zero_matrix() -> None:
    x = torch.stack([decaying(9, 7), torch.zeros(9, 7, dtype=torch.float64)])
    for got in (truncated_svd(x, 3), randomised_svd(x, 3)):
        assert got.error_frobenius.shape == got.error_two.shape == (2,)
        assert float(got.s_K[1].abs().sum()) == float(got.error_frobenius[1]) == float(got.error_two[1]) == 0
        torch.testing.assert_close(got.s_K[0], 0.8 ** torch.arange(3, dtype=torch.float64))


@pytest.mark.parametrize("call", [truncated_svd, randomised_svd])
def test_a_rank_that_does_not_exist_is_refused(call) -> None:
    for k in (0, 4):
        with pytest.raises(ValueError, match=r"1\.\.3"):
            call(torch.ones(3, 5), k)
    with pytest.raises(ValueError, match="NaN"):
        call(torch.full((3, 3), float("nan")), 1)
