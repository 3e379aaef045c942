"""linear_divergence: values and gradients of KL(base ‖ tuned) through whole logits, in less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.kernels import divergence as kernel
from deltaw.kernels.divergence import divergence_of, linear_divergence, linear_divergence_plain
from deltaw.kernels.weight import DenseWeight
from tests.kernels.test_logprobs import VARIANTS, D, V, options

R = 13


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, DenseWeight]:
    tuned, base = (torch.randn(R, D, dtype=dtype, requires_grad=True) for _ in range(2))
    return tuned, base, DenseWeight(torch.randn(V, D, dtype=dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_in_float64(variant: dict[str, Any]) -> None:
    tuned, base, head = case(torch.float64)
    chosen = options(variant, torch.float64)
    assert torch.autograd.gradcheck(lambda h: linear_divergence(h, base.detach(), head, **chosen), (tuned,))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("chunk_rows", "block_rows"), [(1, 1), (4, 3), (1000, 4), (1000, 1000)])
def test_equals_the_plain_twin_whatever_the_chunk(
    variant: dict[str, Any], chunk_rows: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 8 * V * chunk_rows)
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 8 * V * block_rows)
    tuned, base, head = case(torch.float64)
    chosen, weights = options(variant, torch.float64), torch.linspace(-1, 2, R, dtype=torch.float64)
    fast, plain = (call(tuned, base, head, **chosen) for call in (linear_divergence, linear_divergence_plain))
    torch.testing.assert_close(fast, plain)
    grads = [torch.autograd.grad((weights * kl).sum(), (tuned, base), allow_unused=True) for kl in (fast, plain)]
    torch.testing.assert_close(grads[0][0], grads[1][0])
    assert grads[0][1] is grads[1][1] is None, "the base is what it is"


def test_it_is_zero_where_nothing_moved_and_positive_elsewhere() -> None:
    tuned, base, head = case(torch.float64)
    (gradient,) = torch.autograd.grad(linear_divergence(base, base, head).sum(), base)
    assert linear_divergence(base, base, head).abs().max() < 1e-12 and gradient.abs().max() < 1e-12
    assert (linear_divergence(tuned, base, head) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_the_truth_as_the_plain_twin(dtype: torch.dtype) -> None:
    tuned, base, head = case(torch.float64)
    truth = linear_divergence_plain(tuned, base, head)
    wanted = torch.autograd.grad(truth.sum(), tuned)[0]
    narrow = tuned.detach().to(dtype).requires_grad_()
    errors, off = [], []
    for call in (linear_divergence, linear_divergence_plain):
        kl = call(narrow, base.to(dtype), DenseWeight(head.dense().to(dtype)))
        assert kl.dtype == torch.float32
        errors.append(float((kl - truth).detach().abs().max()))
        off.append(float((torch.autograd.grad(kl.sum(), narrow)[0] - wanted).abs().max()))
    assert errors[0] <= errors[1] + 1e-3 and off[0] <= off[1] + 4e-2


def test_the_logits_are_never_whole() -> None:
    """The largest tensor that is made has as many rows as a chunk, not R."""
    vocabulary, rows = 4096, 64
    tuned, base = (torch.randn(rows, D) for _ in range(2))
    head = DenseWeight(torch.randn(vocabulary, D))
    sizes: list[int] = []

    class Watching(DenseWeight):
        def matmul(self, x_TN: Tensor, bias_M: Tensor | None = None) -> Tensor:
            sizes.append(len(x_TN))
            return super().matmul(x_TN, bias_M)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CHUNK_BYTES", 4 * vocabulary * 8)
        linear_divergence(tuned.requires_grad_(), base, Watching(head.dense())).sum().backward()
    assert max(sizes) == 8 and sum(sizes) == 2 * rows


def test_of_logits_that_are_there() -> None:
    tuned, base, head = case(torch.float64)
    logits = [x @ head.dense().T for x in (tuned, base)]
    torch.testing.assert_close(divergence_of(*logits), linear_divergence(tuned, base, head))
