"""The GPU kernel that copies and multiplies by thin factors."""

import pytest
import torch

from deltaw.kernels import triton as gpu
from tests.kernels.triton.budget import DEVICE, DTYPES, randn

ON_CHIP = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter takes a bfloat16's bits for a number in dot")


@pytest.mark.parametrize("dtype", [pytest.param(one, marks=ON_CHIP if one == torch.bfloat16 else ()) for one in DTYPES])
@pytest.mark.parametrize(("rows", "columns", "ranks"), [(37, 61, 16), (1, 128, 48), (70, 300, 32), (0, 5, 16)])
def test_ranked(rows: int, columns: int, ranks: int, dtype: torch.dtype) -> None:
    x, wide = randn(rows, columns + 3, dtype=dtype)[:, 2:-1], randn(rows, columns + ranks + 5, dtype=dtype)
    out, behind = wide[:, : columns + ranks], wide[:, columns + ranks :].clone()
    for a in (randn(columns, ranks, dtype=dtype), randn(ranks, columns + 8, dtype=dtype)[:, :columns].T):
        wide[:, : columns + ranks] = float("nan")
        assert gpu.ranked(x, a, out).data_ptr() == wide.data_ptr()
        assert torch.equal(out[:, :columns], x) and torch.equal(wide[:, columns + ranks :], behind)
        truth = x.double() @ a.double()
        off = (out[:, columns:].double() - truth).norm() / truth.norm().clamp_min(1e-30)
        assert off <= 4 * torch.finfo(dtype).eps


def test_ranked_refuses_rows_that_it_would_have_to_copy() -> None:
    with pytest.raises(ValueError, match="side by side"):
        gpu.ranked(randn(8, 4).T, randn(8, 16), randn(4, 24))
