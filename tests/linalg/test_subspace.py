"""Principal angles and subspace similarity, against rotations whose angles are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.linalg.subspace import principal_angles, project, random_similarity, range_basis, similarity


def basis(d: int, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64)).Q


@settings(deadline=None, max_examples=60)
@given(d=st.integers(2, 20), data=st.data(), seed=st.integers(0, 99))
def test_similarity_is_a_share(d: int, data: st.DataObject, seed: int) -> None:
    i, j = (data.draw(st.integers(1, d)) for _ in range(2))
    u, v = basis(d, i, seed), basis(d, j, seed + 1)
    phi = similarity(u, v)
    assert phi.shape == (i, j) and float(phi.min()) >= -1e-12 and float(phi.max()) <= 1 + 1e-12
    torch.testing.assert_close(phi, similarity(v, u).T)
    for a in range(1, i + 1):
        for b in range(1, j + 1):
            expected = (u[:, :a].T @ v[:, :b]).square().sum() / min(a, b)
            torch.testing.assert_close(phi[a - 1, b - 1], expected)
    torch.testing.assert_close(phi[-1, -1], principal_angles(u, v).cos().square().sum() / min(i, j))


def test_a_subspace_inside_another_and_one_beside_it() -> None:
    u = basis(9, 9, 0)
    assert float(similarity(u[:, :2], u[:, :5])[-1, -1]) == pytest.approx(1)
    assert float(similarity(u[:, :2], u[:, 2:5])[-1, -1]) == pytest.approx(0, abs=1e-12)
    turned = u[:, :3] @ basis(3, 3, 1)  # the same subspace
    assert float(similarity(u[:, :3], turned)[-1, -1]) == pytest.approx(1)
    assert float(principal_angles(u[:, :3], turned).max()) < 1e-12


@pytest.mark.parametrize("angle", [1e-12, 1e-6, 0.1, math.pi / 4, 1.2, math.pi / 2 - 1e-9])
def test_an_angle_is_found_to_full_precision(angle: float) -> None:
    u = torch.eye(5, 2, dtype=torch.float64)
    v = u.clone()
    v[0, 0], v[3, 0] = math.cos(angle), math.sin(angle)
    for one, two in ((u, v), (v, u), (u, v[:, :1]), (v[:, :1], u)):
        assert float(principal_angles(one, two).max()) == pytest.approx(angle, rel=1e-9)


def test_random_subspaces_have_the_baseline_on_average() -> None:
    d, i, j = 24, 4, 9
    draws = [similarity(basis(d, i, seed), basis(d, j, 1000 + seed)) for seed in range(400)]
    torch.testing.assert_close(torch.stack(draws).mean(0), random_similarity(i, j, d).double(), rtol=0.12, atol=0.01)


def test_range_and_projection() -> None:
    x = basis(8, 2, 0) @ torch.randn(2, 6, dtype=torch.float64)
    u = range_basis(x)
    assert u.shape == (8, 2)
    torch.testing.assert_close(u.T @ u, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(project(x, u), x)
    assert range_basis(torch.zeros(4, 3)).shape == (4, 0)
