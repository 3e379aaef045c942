"""linear_logprobs and linear_cross_entropy: values and gradients of logits + log-softmax, in less memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaw.kernels import logprobs as kernel
from deltaw.kernels.logprobs import IGNORE, Logprobs, linear_cross_entropy, linear_logprobs, linear_logprobs_plain
from deltaw.kernels.weight import DenseWeight

T, D, V = 23, 8, 31
VARIANTS: list[dict[str, Any]] = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 0.3, "softcap": 2.0, "bias": True}]
Objective = Callable[[Logprobs], Tensor]


def case(dtype: torch.dtype, trained: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = torch.randn(T, D, dtype=dtype, requires_grad=True), torch.randn(V, D, dtype=dtype)
    labels = torch.randint(V, (T,))
    labels[torch.randperm(T)[trained:]] = IGNORE
    return hidden, head, labels


def options(variant: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    chosen = {name: value for name, value in variant.items() if name != "bias"}
    return {**chosen, "bias_V": torch.randn(V, dtype=dtype)} if "bias" in variant else chosen


def preference(logprobs: Logprobs) -> Tensor:
    """What each token counts depends on all of them, as with DPO: the first tokens against the others."""
    return -torch.nn.functional.logsigmoid(0.7 * (logprobs.logp_K[:6].sum() - logprobs.logp_K[6:].sum()) / 10)


OBJECTIVES: dict[str, Objective] = {
    "cross-entropy": lambda logprobs: 3 * logprobs.loss,
    "weighted": lambda logprobs: -(logprobs.logp_K * torch.linspace(-1, 2, len(logprobs.logp_K))).sum(),
    "preference": preference,
    "both": lambda logprobs: logprobs.loss / 15 + preference(logprobs),  # ORPO's shape
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_in_float64(variant: dict[str, Any]) -> None:
    """Of each log-probability and of their sum, and so of any function of them."""
    hidden, head, labels = case(torch.float64)
    chosen = options(variant, torch.float64)
    assert torch.autograd.gradcheck(lambda h: tuple(linear_logprobs(h, DenseWeight(head), labels, **chosen)), (hidden,))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("chunk_rows", "block_rows"), [(1, 1), (4, 3), (9, 1), (1000, 4), (1000, 1000)])
def test_equals_the_plain_twin_whatever_the_chunk(
    objective: str, variant: dict[str, Any], chunk_rows: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 8 * V * chunk_rows)
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 8 * V * block_rows)
    hidden, head, labels = case(torch.float64)
    chosen = options(variant, torch.float64)
    fast, plain = (
        call(hidden, DenseWeight(head), labels, **chosen) for call in (linear_logprobs, linear_logprobs_plain)
    )
    for got, wanted in zip(fast, plain, strict=True):
        torch.testing.assert_close(got, wanted)
    grads = [torch.autograd.grad(OBJECTIVES[objective](logprobs), hidden)[0] for logprobs in (fast, plain)]
    torch.testing.assert_close(*grads)
    assert not grads[0][labels == IGNORE].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_within_the_plain_twins(objective: str, variant: dict[str, Any], dtype: torch.dtype) -> None:
    """|fast − truth| ≤ |plain − truth| + one rounding, truth being the plain twin in float64. Not in float32:
    what rounds there is the order in which a product is summed."""
    hidden, head, labels = case(dtype)
    chosen = options(variant, dtype)
    exact = {name: value.double() if isinstance(value, Tensor) else value for name, value in chosen.items()}

    def run(call: Callable[..., Logprobs], h: Tensor, w: Tensor, chosen: dict[str, Any]) -> list[Tensor]:
        leaf = h.detach().requires_grad_()
        logprobs = call(leaf, DenseWeight(w), labels, **chosen)
        return [*logprobs, torch.autograd.grad(OBJECTIVES[objective](logprobs), leaf)[0]]

    truth = run(linear_logprobs_plain, hidden.double(), head.double(), exact)
    fast, plain = (run(call, hidden, head, chosen) for call in (linear_logprobs, linear_logprobs_plain))
    for f, p, t in zip(fast, plain, truth, strict=True):
        rounding = torch.finfo(dtype).eps * t.abs().max()
        assert (f - t).abs().max() <= (p - t).abs().max() + rounding


def test_cross_entropy_is_minus_the_sum_of_the_log_probabilities_with_the_same_gradient() -> None:
    hidden, head, labels = case(torch.float32)
    loss, count = linear_cross_entropy(hidden, head, labels)
    logp = linear_logprobs(hidden, DenseWeight(head), labels).logp_K
    torch.testing.assert_close(loss, -logp.sum())
    assert count == len(logp) == 15 and loss.dtype == logp.dtype == torch.float32
    grads = [torch.autograd.grad(value, hidden)[0] for value in (loss / 7, -logp.sum() / 7)]
    assert torch.equal(*grads)  # one product for both, scaled by the same number


@pytest.mark.parametrize("call", [linear_logprobs, linear_logprobs_plain])
def test_no_label_gives_zero_of_zero(call: Callable[..., Logprobs]) -> None:
    hidden, head, _ = case(torch.float32)
    logp, loss = call(hidden, DenseWeight(head), torch.full((T,), IGNORE))
    (loss + logp.sum()).backward()
    assert (float(loss.detach()), len(logp)) == (0.0, 0)
    assert hidden.grad is not None and not hidden.grad.any()


def test_without_gradients_the_numbers_are_the_same() -> None:
    hidden, head, labels = case(torch.bfloat16)
    with torch.no_grad():
        alone = linear_logprobs(hidden, DenseWeight(head), labels)
    for got, wanted in zip(alone, linear_logprobs(hidden, DenseWeight(head), labels), strict=True):
        assert torch.equal(got, wanted) and not got.requires_grad


def test_accumulation_over_unequal_masks_equals_the_whole() -> None:
    """Sums and counts add up: two parts with 3 and 12 labels give the gradient of all 15 at once."""
    hidden, head, labels = case(torch.float64)
    whole, count = linear_cross_entropy(hidden, head, labels)
    (expected,) = torch.autograd.grad(whole / count, hidden)
    cut = int((labels != IGNORE).nonzero()[3])
    parts = [linear_cross_entropy(hidden[s], head, labels[s]) for s in (slice(0, cut), slice(cut, T))]
    assert [n for _, n in parts] == [3, 12]
    total = sum(n for _, n in parts)
    (got,) = torch.autograd.grad(sum(loss / total for loss, _ in parts), hidden)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("softcap", [None, 300.0])
def test_a_label_that_the_model_rules_out(softcap: float | None) -> None:
    """Its probability is zero in float32; its log-probability is the difference of the logits all the same."""
    hidden, head = torch.eye(2, requires_grad=True), torch.tensor([[200.0, 0.0], [0.0, 0.0], [-20.0, 0.0]])
    labels = torch.tensor([2, IGNORE])
    fast, plain = (
        call(hidden, DenseWeight(head), labels, softcap=softcap) for call in (linear_logprobs, linear_logprobs_plain)
    )
    torch.testing.assert_close(fast.logp_K, plain.logp_K)
    assert float(fast.loss.detach()) > 180
