"""Grouped products: their plain twin's numbers and gradients, rows that go where the router sends them."""

import pytest
import torch
from torch import Tensor

from deltaw.kernels.grouped import Grouped, Routes, Stack, gather, grouped_linear, grouped_linear_plain, route, spread
from deltaw.kernels.segments import NOBODY, Segment

E, K, T, M, N = 5, 2, 11, 6, 4
SEGMENTS = (Segment(3, 0, 4), Segment(NOBODY, 4, 6), Segment(1, 6, 9))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def routes(segments: tuple[Segment, ...] | None = None, *, to: int = E) -> Routes:
    """Of random experts, the first without rows."""
    experts_TK = torch.randint(1, to, (T, K), generator=torch.Generator().manual_seed(1))
    return route(experts_TK, E, segments)


def grouped(numbers: dict[int, int], *, bias: bool = True) -> Grouped:
    """Updates by number, of these ranks."""
    updates = {
        number: Stack(
            draw(E, rank, N, seed=number).requires_grad_(), draw(E, M, rank, seed=number + 10).requires_grad_(), 1.5
        )
        for number, rank in numbers.items()
    }
    w_EMN = draw(E, N, M, seed=5).transpose(1, 2)  # as a model stores it that says is_transposed
    return Grouped(w_EMN, draw(E, M, seed=6) if bias else None, updates)


def results(function: object, one: Grouped, way: Routes, x_SN: Tensor, low_SN: Tensor | None) -> list[Tensor]:
    inputs = [x for x in (x_SN, low_SN) if x is not None]
    inputs += [factor for update in one.updates.values() for factor in update[:2]]
    y_SM = function(x_SN, one, way, low_SN)  # type: ignore[operator]
    gradients = torch.autograd.grad((y_SM * draw(*y_SM.shape, seed=8)).sum(), inputs, allow_unused=True)
    return [y_SM, *(g if g is not None else torch.zeros_like(x) for g, x in zip(gradients, inputs, strict=True))]


@pytest.mark.parametrize("segments", [None, SEGMENTS, (Segment(1, 0, T),), ()])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("to", [E, E + 2])  # some beyond the last: nobody's
def test_the_twin_gives_the_same(segments: tuple[Segment, ...] | None, apart: bool, to: int) -> None:
    way = routes(segments, to=to)
    one = grouped({1: 2} if segments is None else {1: 2, 3: 3}, bias=apart)
    x_SN = spread(draw(T, N), way).requires_grad_()
    low_SN = (x_SN.detach() * 0.5).requires_grad_() if apart else None
    got, wanted = (results(f, one, way, x_SN, low_SN) for f in (grouped_linear, grouped_linear_plain))
    for mine, its in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, its)
    with torch.no_grad():
        assert torch.equal(grouped_linear(x_SN, one, way, low_SN), got[0])
    assert not got[0][way.taken :].any()


def test_a_token_gets_what_its_experts_give() -> None:
    """Against one product for each token and each of its experts, in the router's own order."""
    experts_TK = torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(1))
    way, one, x_TN = route(experts_TK, E), grouped({1: 2}), draw(T, N).requires_grad_()
    y_TM = gather(grouped_linear(spread(x_TN, way), one, way), way)
    a_ERN, b_EMR, scale = one.updates[1]
    w_EMN = one.w_EMN + scale * (b_EMR @ a_ERN)
    wanted = torch.stack(
        [sum(w_EMN[e] @ x + one.bias_EM[e] for e in es) for es, x in zip(experts_TK, x_TN, strict=True)]
    )
    torch.testing.assert_close(y_TM, wanted)
    inputs = (x_TN, a_ERN, b_EMR)
    got, its = (torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for y in (y_TM, wanted))
    for mine, other in zip(got, its, strict=True):
        torch.testing.assert_close(mine, other)


def test_rows_stand_in_one_order_whoever_else_is_in_the_pass() -> None:
    experts_TK = torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(2))
    together = route(experts_TK, E, SEGMENTS)
    for number, start, end in SEGMENTS:
        alone = route(experts_TK[start:end], E)
        mine = torch.cat([together.order_S[a:b] for _, a, b in together.spans(number)]) if number >= 0 else None
        if mine is not None:
            assert torch.equal(mine - start * K, alone.order_S)
    assert sorted(together.order_S.tolist()) == list(range(T * K))
    assert sum(end - start for _, start, end in together.experts) == T * K


def test_segments_outside_the_rows_are_refused() -> None:
    with pytest.raises(ValueError):
        route(torch.zeros(3, K, dtype=torch.int64), E, (Segment(0, 0, 4),))
