"""Attention of documents that continue others equals the same documents each whole: values and gradients, over random
trees, windows and soft caps."""

import math
import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.kernels import shared
from deltaw.kernels.attention import packed_attention, packed_attention_plain
from deltaw.kernels.documents import Documents
from deltaw.kernels.tree import Tree

HEADS = [(2, 1, 8), (6, 2, 4), (3, 3, 8)]


def random_tree(seed: int, documents: int = 7, longest: int = 12) -> tuple[list[int], list[int]]:
    """(starts, parents), laid out in the order of a walk."""
    draw = random.Random(seed)
    parents, chain = [], list[int]()
    for number in range(documents):
        depth = draw.randint(0, len(chain))
        chain = chain[:depth]
        parents.append(chain[-1] if chain else -1)
        chain.append(number)
    return [0, *accumulate(draw.randint(1, longest) for _ in range(documents))], parents


def tensors(T: int, heads: tuple[int, int, int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    H, K, E = heads
    return [torch.randn(T, n, E, generator=generator, dtype=torch.float64).to(dtype) + 0.5 for n in (H, K, K)]


def with_gradients(attention, inputs: list[Tensor], generator_seed: int) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(generator_seed), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out.double() * weights).sum(), inputs)]


def whole(inputs: list[Tensor], tree: Tree, options: dict) -> Tensor:
    """[T, H, E] from examples that share nothing, each attended to by itself: of a prefix's rows, the mean over them
    (they must agree, and gradients are then those of all, as where the loss is the sum)."""
    T = tree.starts[-1]
    total = inputs[0].new_zeros(inputs[0].shape)
    for number in range(len(tree.examples)):
        rows = torch.cat([torch.arange(a, b) for a, b in tree.whole(number)])
        out = packed_attention_plain(*(x[rows] for x in inputs), [0, len(rows)], **options)
        total = total.index_add(0, rows, out)
    counts = torch.tensor(tree.counts).repeat_interleave(torch.tensor(tree.starts).diff())
    assert len(counts) == T
    return total / counts[:, None, None]


@given(
    seed=st.integers(0, 10**6),
    heads=st.sampled_from(HEADS),
    window=st.sampled_from([None, None, 1, 3, 9, 20]),
    softcap=st.sampled_from([None, None, 5.0]),
    chunk=st.sampled_from([2**20, 40]),
)
@settings(max_examples=60, deadline=None)
def test_it_is_the_attention_of_each_example_alone(seed, heads, window, softcap, chunk):
    starts, parents = random_tree(seed)
    tree, options = Tree.of(starts, parents), {"window": window, "softcap": softcap}
    inputs = tensors(starts[-1], heads, torch.float64, seed)
    before, shared.BLOCK = shared.BLOCK, chunk
    try:
        documents = Documents(starts, parents=parents)
        got = with_gradients(lambda *x: packed_attention(*x, documents, **options), inputs, seed)
    finally:
        shared.BLOCK = before
    plain = with_gradients(lambda *x: packed_attention_plain(*x, starts, parents=parents, **options), inputs, seed)
    for mine, twin in zip(got, plain, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-9, atol=1e-9)
    if tree is not None:
        alone = with_gradients(lambda *x: whole(list(x), tree, options), inputs, seed)
        for mine, theirs in zip(plain, alone, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_it_is_off_no_more_than_examples_that_share_nothing(dtype, softcap):
    """By the norm of the error, against float64: rounding within one part as within the whole."""
    lengths, parents = [150, 3, 40, 70, 33, 64], [-1, 0, 0, 0, 3, -1]
    starts = [0, *accumulate(lengths)]
    tree = Tree.of(starts, parents)
    inputs = tensors(starts[-1], (6, 2, 64), dtype, 0)
    wide = [x.double() for x in inputs]
    truth = with_gradients(lambda *x: packed_attention_plain(*x, starts, parents=parents, softcap=softcap), wide, 1)
    documents = Documents(starts, parents=parents)
    mine = with_gradients(lambda *x: packed_attention(*x, documents, softcap=softcap), inputs, 1)
    rows = [torch.cat([torch.arange(a, b) for a, b in tree.whole(n)]) for n in range(len(tree.examples))]
    row_J, apart = torch.cat(rows), Documents([0, *accumulate(map(len, rows))])
    counts = torch.tensor(tree.counts).repeat_interleave(torch.tensor(starts).diff())[:, None, None]

    def unshared(q, k, v):
        out = packed_attention(q[row_J], k[row_J], v[row_J], apart, softcap=softcap)
        return out.new_zeros(q.shape).index_add(0, row_J, out) / counts

    plain = with_gradients(unshared, inputs, 1)
    for fast, twin, exact in zip(mine, plain, truth, strict=True):
        size = exact.norm()
        off, allowed = (fast.double() - exact).norm() / size, (twin.double() - exact).norm() / size
        assert off <= 1.3 * allowed + 10 * torch.finfo(dtype).eps ** 2 + 1e-7


@given(seed=st.integers(0, 10**6), window=st.sampled_from([None, 4]))
@settings(max_examples=20, deadline=None)
def test_gathered_keys_are_the_same_attention(seed, window):
    """What a GPU is given: each document's queries, and its ancestors' keys before its own, the last with the last."""
    starts, parents = random_tree(seed)
    documents = Documents(starts, parents=parents)
    if documents.tree is None:
        return
    inputs = tensors(starts[-1], (4, 2, 8), torch.float64, seed)

    def gathered(q, k, v):
        row_J, keys_S = documents.seen
        k, v, outs = k[row_J].repeat_interleave(2, 1), v[row_J].repeat_interleave(2, 1), []
        for number in range(len(parents)):
            of_queries, of_keys = slice(*starts[number : number + 2]), slice(*keys_S[number : number + 2].tolist())
            s = torch.einsum("qhe,khe->hqk", q[of_queries], k[of_keys]) / math.sqrt(q.shape[2])
            behind = torch.arange(s.shape[1])[:, None] + s.shape[2] - s.shape[1] - torch.arange(s.shape[2])
            seen = (behind >= 0) & (behind < (window or 10**6))
            p = s.masked_fill(~seen, -math.inf).softmax(-1)
            outs.append(torch.einsum("hqk,khe->qhe", p, v[of_keys]))
        return torch.cat(outs)

    mine = with_gradients(gathered, inputs, seed)
    plain = with_gradients(lambda *x: packed_attention_plain(*x, starts, parents=parents, window=window), inputs, seed)
    for got, twin in zip(mine, plain, strict=True):
        torch.testing.assert_close(got, twin, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parents", [[-1, 1], [0, -1], [-1, 0, -1, 0], [-1]])
def test_documents_out_of_order_are_refused(parents):
    starts = list(range(max(2, len(parents)) + 1))
    if parents == [-1]:
        assert Tree.of([0, 3], parents) is None
        return
    with pytest.raises(ValueError):
        Documents(starts, parents=parents)


def test_what_is_returned_lies_in_one_piece_and_a_gradient_may_lie_in_any_way():
    starts, parents = random_tree(3)
    inputs = [x.requires_grad_() for x in tensors(starts[-1], (4, 4, 8), torch.float64, 0)]
    weights = torch.randn(8, 4, starts[-1], dtype=torch.float64)
    outs = [
        packed_attention(*inputs, Documents(starts, parents=parents)),
        packed_attention_plain(*inputs, starts, parents=parents),
    ]
    assert outs[0].is_contiguous()
    grads = [torch.autograd.grad((out.permute(2, 1, 0) * weights).sum(), inputs) for out in outs]
    for mine, twin in zip(*grads, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-9, atol=1e-9)
