"""The errors of rounding are as large as it is said, in sum and in their largest singular value."""

import pytest
import torch

from deltaw.linalg.rounding import noise, precision


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
