"""Products with thin factors, where the matrix beside them has to be read for something else as well.

    with_product             [x  x a]: a copy of x, and its product behind it
    product_behind           the same in x's own place, which has room behind it
    gated_with_product       [v  v a] of v = act(g) ∘ u
    gated_back_with_product  [dg du  dg s + du s′] and v again, of D = ∂L/∂v
    add_sums                 out += scale · wideᵀ thin, for several

A product with R columns takes as long as its matrix takes to be read. A kernel that reads or makes the matrix anyway
can take the product on the way (kernels/triton): whether it does so sooner than two kernels hangs on sizes and chip, so
a GPU is asked (quickest.py).

Letters: T rows, N columns of a matrix, K of its thin factor, I inner size, C and R of a sum.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.device import on_gpu
from deltaw.kernels.lora import gated, gated_back
from deltaw.kernels.quickest import Way, quickest
from deltaw.kernels.room import roomy

HALF = (torch.bfloat16, torch.float16)
MOST = 64  # columns of a thin factor that a kernel holds
BLOCKS = (128, 256)  # columns that it takes at a time, where it only copies
GATED = (64, 128)  # and where it has more to hold


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

    def apart() -> Tensor:
        x_TX[:, :N].copy_(x_TN)
        return product_behind(x_TX, a_NK)

    ways: list[Callable[[], Tensor]] = [apart]
    if _asks(x_TN, K):
        from deltaw.kernels.triton import ranked

        ways += [partial(ranked, x_TN, a_NK, x_TX, block) for block in BLOCKS]
    return ways[_number("with_product", x_TN, (N, K), ways)]()


def product_behind(x_TX: Tensor, a_NK: Tensor) -> Tensor:
    """[x  x a] of an x [T, N] with room for K columns or more behind it."""
    N, K = a_NK.shape
    x_TX = x_TX[:, : N + K]
    torch.mm(x_TX[:, :N], a_NK, out=x_TX[:, N:])
    return x_TX


def gated_with_product(g_TI: Tensor, u_TI: Tensor, activation: str, a_IK: Tensor) -> Tensor:
    """[v  v a] [T, I + K]."""
    (T, size), K = g_TI.shape, a_IK.shape[1]
    v_TX = roomy(T, size, K, g_TI)

    def apart() -> Tensor:
        gated(g_TI, u_TI, activation, out=v_TX[:, :size])
        return product_behind(v_TX, a_IK)

    ways: list[Callable[[], Tensor]] = [apart]
    if _asks(g_TI, K):
        from deltaw.kernels.triton import gated_ranked

        ways += [partial(gated_ranked, g_TI, u_TI, activation, a_IK, v_TX, block) for block in GATED]
    return ways[_number("gated", g_TI, (size, K, activation), ways)]()


def gated_back_with_product(
    d_TI: Tensor, g_TI: Tensor, u_TI: Tensor, activation: str, s_MK: Tensor, out_TX: Tensor
) -> Tensor:
    """v [T, I]; dg, du and their product with s [2I, K] are written to `out` [T, 2I + K]. D may be overwritten."""
    size, K = g_TI.shape[1], s_MK.shape[1]
    v_TI = torch.empty(g_TI.shape, dtype=g_TI.dtype, device=g_TI.device)
    out = v_TI, out_TX[:, :size], out_TX[:, size : 2 * size]

    def apart() -> object:
        gated_back(d_TI, g_TI, u_TI, activation, out=out)
        return product_behind(out_TX, s_MK)

    ways: list[Way] = [apart]
    if _asks(g_TI, K):
        from deltaw.kernels.triton import gated_ranked_back

        given = d_TI, g_TI, u_TI, activation, s_MK, v_TI, out_TX
        ways += [partial(gated_ranked_back, *given, block) for block in GATED]
    ways[_number("gated_back", g_TI, (size, K, activation), ways)]()
    return v_TI


def add_sums(sums: Sequence[Sum]) -> None:
    """Take them all, of the same rows."""
    first = sums[0]
    whole = all(one.out_CR.dtype == torch.float32 and one.thin_TR.shape[1] <= MOST for one in sums)
    if not (whole and _asks(first.wide_TC, first.thin_TR.shape[1])):
        _add_each(sums)
        return
    from deltaw.kernels.triton import factor_sums

    ways = (_add_each, factor_sums)

    def trials() -> list[Way]:  # on other sums: each try would add to these
        scratch = [one._replace(out_CR=torch.zeros_like(one.out_CR)) for one in sums]
        return [partial(way, scratch) for way in ways]

    sizes = tuple((one.out_CR.shape, one.out_CR.stride()) for one in sums)
    ways[quickest("sums", len(first.wide_TC), sizes, trials)](sums)


def _asks(x: Tensor, ranks: int) -> bool:
    """Whether there are kernels to ask about."""
    return on_gpu(x) and x.dtype in HALF and ranks <= MOST


def _number(what: str, x: Tensor, sizes: tuple[object, ...], ways: Sequence[Way]) -> int:
    return quickest(what, len(x), (*sizes, x.dtype), lambda: ways) if len(ways) > 1 else 0


def _add_each(sums: Sequence[Sum]) -> None:
    """By products; on a GPU they aren't rounded on the way."""
    for wide_TC, thin_TR, out_CR, scale in sums:
        if out_CR.stride(0) == 1:  # written in the order in which it lies
            wide_TC, thin_TR, out_CR = thin_TR, wide_TC, out_CR.T
        if wide_TC.dtype == out_CR.dtype:
            out_CR.addmm_(wide_TC.T, thin_TR, alpha=scale)
        elif wide_TC.is_cuda and out_CR.dtype == torch.float32:
            torch.addmm(out_CR, wide_TC.T, thin_TR, out_dtype=torch.float32, alpha=scale, out=out_CR)
        else:
            out_CR.add_((wide_TC.T @ thin_TR).to(out_CR.dtype), alpha=scale)
