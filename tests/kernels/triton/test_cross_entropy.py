"""The cross-entropy's GPU kernel."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.kernels import triton as gpu
from deltaw.kernels.logprobs import capped
from deltaw.kernels.triton.cross_entropy import VOCABULARY
from tests.kernels.triton.budget import DEVICE, DTYPES, Values, assert_within_budget, randn


def cross_entropy(scale: float, softcap: float | None) -> Callable[..., Values]:
    def run(z: Tensor, labels: Tensor) -> Values:
        leaf = z.detach().requires_grad_()
        wide = torch.promote_types(z.dtype, torch.float32)
        losses = F.cross_entropy(capped(scale * leaf.to(wide), softcap), labels, reduction="none")
        return [losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]]

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 300, 3 * VOCABULARY + 5])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (0.3, 2.0)])
def test_cross_entropy(size: int, scale: float, softcap: float | None, dtype: torch.dtype) -> None:
    z, labels = randn(5, size, dtype=dtype) * 4, torch.randint(size, (5,)).to(DEVICE)
    d = z.clone()
    losses = gpu.cross_entropy_(d, labels, scale, softcap)
    assert (losses.dtype, d.dtype) == (torch.float32, dtype)
    assert_within_budget([losses, d], cross_entropy(scale, softcap), z, labels)


def test_cross_entropy_of_hard_rows() -> None:
    """Logits a thousand apart, and words ruled out by −∞, also for a whole block."""
    z = randn(3, VOCABULARY + 50)
    z[0] *= 1000
    z[1, 1:] = -torch.inf
    z[2, :VOCABULARY] = -torch.inf
    labels = torch.tensor([int(z[0].argmin()), 0, VOCABULARY + 1], device=DEVICE)
    d = z.clone()
    losses = gpu.cross_entropy_(d, labels)
    assert_within_budget([losses, d], cross_entropy(1.0, None), z, labels)


def test_cross_entropy_of_a_label_outside_is_not_a_number() -> None:
    losses = gpu.cross_entropy_(randn(3, 10), torch.tensor([10, -1, 4], device=DEVICE))
    assert losses.isnan().tolist() == [True, True, False]


def test_cross_entropy_writes_its_own_rows_only() -> None:
    whole = randn(4, 40)
    before = whole.clone()
    gpu.cross_entropy_(whole[:, 5:30], torch.zeros(4, dtype=torch.long, device=DEVICE))
    assert torch.equal(whole[:, :5], before[:, :5]) and torch.equal(whole[:, 30:], before[:, 30:])
    with pytest.raises(ValueError, match="contiguous"):
        gpu.cross_entropy_(randn(10, 3).T, torch.zeros(3, dtype=torch.long))
