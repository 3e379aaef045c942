"""packed_attention: equal to masked attention over all pairs, for any cut into documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.kernels import documents as kernel
from deltaw.kernels.attention import packed_attention, packed_attention_plain
from deltaw.kernels.documents import Documents

H, K, E = 4, 2, 8
OPTIONS = [{}, {"window": 4}, {"softcap": 2.0}, {"window": 3, "softcap": 1.5, "scale": 0.2}]


def starts_of(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def qkv(total: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(total, heads, E, dtype=dtype, requires_grad=True) for heads in (H, K, K))


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    option=st.sampled_from(OPTIONS),
    chunk=st.integers(2, 50),
)
def test_equals_the_plain_twin(lengths: list[int], option: dict, chunk: int) -> None:
    before, kernel.CHUNK = kernel.CHUNK, chunk
    try:
        starts = starts_of(lengths)
        inputs = qkv(starts[-1])
        grad = torch.randn(starts[-1], H, E, dtype=torch.float64)
        fast = packed_attention(*inputs, Documents(starts), **option)
        plain = packed_attention_plain(*inputs, starts, **option)
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)
        pairs = zip(torch.autograd.grad(fast, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True)
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    finally:
        kernel.CHUNK = before


@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option: dict) -> None:
    starts = starts_of([3, 1, 5])
    documents = Documents(starts)
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention(q, k, v, documents, **option), qkv(9))


def test_error_in_bfloat16_is_within_the_plain_twins() -> None:
    starts = starts_of([30, 7, 150])
    inputs, grad = qkv(starts[-1], torch.bfloat16), torch.randn(starts[-1], H, E).bfloat16()

    def run(call, values):
        leaves = [v.detach().requires_grad_() for v in values]
        out = call(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    truth = run(lambda *x: packed_attention_plain(*x, starts), [x.double() for x in inputs])
    fast = run(lambda *x: packed_attention(*x, Documents(starts)), inputs)
    plain = run(lambda *x: packed_attention_plain(*x, starts), inputs)
    for f, p, t in zip(fast, plain, truth, strict=True):
        rounding = torch.finfo(torch.bfloat16).eps * t.abs().max()
        assert (f - t).abs().max() <= (p - t).abs().max() + rounding


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=30), in_chunks=st.booleans())
def test_every_token_has_one_place(lengths: list[int], in_chunks: bool) -> None:
    layout = Documents(starts_of(lengths)).layout(3, in_chunks=in_chunks)
    rows = torch.arange(sum(lengths) * 3)
    assert torch.equal(rows[layout.gather][layout.scatter], rows)
    assert sorted([*layout.scatter.tolist(), *layout.filler.tolist()]) == list(range(len(layout.gather)))
    assert len(layout.gather) <= 3 * kernel.FILL * sum(lengths) + 3 * len(lengths)


def test_empty_document_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Documents([0, 3, 3])


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_what_is_returned_may_be_written_to(lengths: list[int]) -> None:
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, v = (torch.randn(starts[-1], heads, 4, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    grads = []
    for out in (packed_attention(q, k, v, Documents(starts)), packed_attention_plain(q, k, v, starts).contiguous()):
        out.mul_(2).add_(1)
        out[0] += out[-1].detach()
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)
