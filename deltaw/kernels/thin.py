"""Products with thin factors, where the matrix beside them has to be read for something else as well.

    with_product     [x  x a]: a copy of x, and its product behind it
    product_behind   the same in x's own place, which has room behind it
    add_sums         out += scale · wideᵀ thin, for several

A product with R columns takes as long as its matrix takes to be read. On a GPU one kernel copies a narrow matrix and
takes the product on the way, and another takes all sums of a group at once (kernels/triton): one by one they are
launches of some microseconds, of which a small model's step has hundreds. What is wide keeps the library's products,
which read it at the memory's speed. `NARROW` and `BYTES` are where the two were about even on an H100.

Letters: T rows, N columns of a matrix, K of its thin factor, C and R of a sum.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.device import HALF, on_gpu
from deltaw.kernels.room import roomy

MOST = 64  # columns of a thin factor that a kernel holds
NARROW = 4096  # columns that a matrix must have fewer of
BYTES = 2**26  # that all sums together may read


class Sum(NamedTuple):
    """scale · wideᵀ thin, to be added to `out` [C, R]."""

    wide_TC: Tensor
    thin_TR: Tensor
    out_CR: Tensor
    scale: float


def with_product(x_TN: Tensor, a_NK: Tensor) -> Tensor:
    """[x  x a] [T, N + K]."""
    (T, N), K = x_TN.shape, a_NK.shape[1]
    x_TX = roomy(T, N, K, x_TN)
    if _is_narrow(x_TN) and K <= MOST:
        from deltaw.kernels.triton import ranked

        return ranked(x_TN, a_NK, x_TX)
    x_TX[:, :N].copy_(x_TN)
    return product_behind(x_TX, a_NK)


def product_behind(x_TX: Tensor, a_NK: Tensor) -> Tensor:
    """[x  x a] of an x [T, N] with room for K columns or more behind it."""
    N, K = a_NK.shape
    x_TX = x_TX[:, : N + K]
    torch.mm(x_TX[:, :N], a_NK, out=x_TX[:, N:])
    return x_TX


def add_sums(sums: Sequence[Sum]) -> None:
    """Take them all, of the same rows; the first one's matrix is what the others were made of."""
    reads = sum(one.wide_TC.numel() * one.wide_TC.element_size() for one in sums)
    fit = all(one.out_CR.dtype == torch.float32 and one.thin_TR.shape[1] <= MOST for one in sums)
    if _is_narrow(sums[0].wide_TC) and fit and reads <= BYTES:
        from deltaw.kernels.triton import factor_sums

        factor_sums(sums)
        return
    for one in sums:
        _add(one)


def _is_narrow(x_TN: Tensor) -> bool:
    """Whether kernels are made for it."""
    return on_gpu(x_TN) and x_TN.dtype in HALF and x_TN.shape[1] < NARROW


def _add(one: Sum) -> None:
    """By a product; on a GPU it isn't rounded on the way."""
    wide_TC, thin_TR, out_CR, scale = one
    if out_CR.stride(0) == 1:  # written in the order in which it lies
        wide_TC, thin_TR, out_CR = thin_TR, wide_TC, out_CR.T
    if wide_TC.dtype == out_CR.dtype:
        out_CR.addmm_(wide_TC.T, thin_TR, alpha=scale)
    elif wide_TC.is_cuda and out_CR.dtype == torch.float32:
        torch.addmm(out_CR, wide_TC.T, thin_TR, out_dtype=torch.float32, alpha=scale, out=out_CR)
    else:
        out_CR.add_((wide_TC.T @ thin_TR).to(out_CR.dtype), alpha=scale)
