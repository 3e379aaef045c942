"""linear_cross_entropy: same loss and gradient as logits + cross-entropy, in less memory."""

import pytest
import torch

from deltaw.kernels import loss as kernel
from deltaw.kernels.loss import IGNORE, linear_cross_entropy, linear_cross_entropy_plain

T, D, V = 23, 8, 31
VARIANTS = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 0.3, "softcap": 2.0, "bias": True}]


def case(dtype: torch.dtype, trained: int = 15) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, head = torch.randn(T, D, dtype=dtype, requires_grad=True), torch.randn(V, D, dtype=dtype)
    labels = torch.randint(V, (T,))
    labels[torch.randperm(T)[trained:]] = IGNORE
    return hidden, head, labels


def options(variant: dict, dtype: torch.dtype) -> dict:
    chosen = {name: value for name, value in variant.items() if name != "bias"}
    return {**chosen, "bias_V": torch.randn(V, dtype=dtype)} if "bias" in variant else chosen


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_in_float64(variant: dict) -> None:
    hidden, head, labels = case(torch.float64)
    chosen = options(variant, torch.float64)
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, head, labels, **chosen)[0], (hidden,))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("chunk_rows", "block_rows"), [(1, 1), (4, 3), (9, 1), (1000, 4), (1000, 1000)])
def test_equals_the_plain_twin_whatever_the_chunk(variant: dict, chunk_rows: int, block_rows: int, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 8 * V * chunk_rows)
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 8 * V * block_rows)
    hidden, head, labels = case(torch.float64)
    chosen = options(variant, torch.float64)
    fast, count = linear_cross_entropy(hidden, head, labels, **chosen)
    plain, plain_count = linear_cross_entropy_plain(hidden, head, labels, **chosen)
    torch.testing.assert_close(fast.float(), plain.float())
    assert count == plain_count == 15
    (fast_grad,) = torch.autograd.grad(3 * fast, hidden)
    (plain_grad,) = torch.autograd.grad(3 * plain, hidden)
    torch.testing.assert_close(fast_grad, plain_grad, rtol=1e-5, atol=1e-6)


def test_error_in_bfloat16_is_within_the_plain_twins() -> None:
    hidden, head, labels = case(torch.bfloat16)

    def run(call, h, w):
        leaf = h.detach().requires_grad_()
        loss, _ = call(leaf, w, labels)
        return loss, torch.autograd.grad(loss, leaf)[0]

    truth = run(linear_cross_entropy_plain, hidden.double(), head.double())
    fast, plain = run(linear_cross_entropy, hidden, head), run(linear_cross_entropy_plain, hidden, head)
    for f, p, t in zip(fast, plain, truth, strict=True):
        rounding = torch.finfo(torch.bfloat16).eps * t.abs().max()
        assert (f - t).abs().max() <= (p - t).abs().max() + rounding


def test_no_label_gives_zero_of_zero() -> None:
    hidden, head, _ = case(torch.float32)
    loss, count = linear_cross_entropy(hidden, head, torch.full((T,), IGNORE))
    loss.backward()
    assert (float(loss.detach()), count) == (0.0, 0)
    assert not hidden.grad.any()


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
    """Its probability is zero in float32; its loss is the difference of the logits all the same."""
    hidden, head = torch.eye(2, requires_grad=True), torch.tensor([[200.0, 0.0], [0.0, 0.0], [-20.0, 0.0]])
    fast, _ = linear_cross_entropy(hidden, head, torch.tensor([2, IGNORE]), softcap=softcap)
    plain, _ = linear_cross_entropy_plain(hidden, head, torch.tensor([2, IGNORE]), softcap=softcap)
    torch.testing.assert_close(fast, plain)
    assert float(fast.detach()) > 180
