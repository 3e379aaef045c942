"""The GPU kernels that take the factors' gradients."""

import pytest
import torch

from deltaw.kernels import triton as gpu
from tests.kernels.triton.budget import DEVICE, DTYPES, randn

ON_CHIP = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter takes a bfloat16's bits for a number in dot")
KINDS = [pytest.param(one, marks=ON_CHIP if one == torch.bfloat16 else ()) for one in DTYPES]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(70, (61,), 16), (600, (40, 130, 64, 8), 3), (1, (5, 5), 40)])
def test_sums(rows: int, columns: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    sums, wanted = [], []
    for number, width in enumerate(columns):
        wide, thin = randn(rows, width + 3, dtype=dtype)[:, 2:-1], randn(rows, rank + 8, dtype=dtype)[:, :rank]
        out = randn(rank, width).T if number == 0 else randn(width, rank)
        wanted.append((out.double(), (0.5 + number) * wide.double().T @ thin.double()))
        sums.append((wide, thin, out, 0.5 + number))
    gpu.factor_sums(sums)
    for (_, _, out, _), (before, added) in zip(sums, wanted, strict=True):
        assert (out.double() - before - added).norm() <= 4e-6 * added.norm() + 1e-6 * before.norm()


def test_sums_are_the_same_each_time() -> None:
    wide, thin = randn(3000, 100), randn(3000, 16)
    outs = [torch.zeros(100, 16, device=DEVICE) for _ in range(2)]
    for out in outs:
        gpu.factor_sums([(wide, thin, out, 1.0)])
    assert torch.equal(*outs)


def test_no_rows_add_nothing() -> None:
    out = randn(5, 16)
    before = out.clone()
    gpu.factor_sums([(randn(0, 5), randn(0, 16), out, 1.0)])
    assert torch.equal(out, before)
