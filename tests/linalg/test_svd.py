"""product_svd: the SVD of B A from the thin factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.linalg.svd import product_svd

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
