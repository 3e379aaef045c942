"""Updates in stacks: each row gets what it gets from its own update, whatever stands beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.kernels import stacked
from deltaw.kernels.lora import Factors, Projection, lora_linears_plain
from deltaw.kernels.segments import Segment
from deltaw.kernels.stacked import Places, Spread, Stacks, stacked_linears
from deltaw.kernels.weight import DenseWeight

N, OUTPUTS = 6, (5, 4)


@settings(max_examples=60, deadline=None)
@given(
    slots=st.lists(st.none() | st.integers(0, 3), min_size=1, max_size=9),
    ranks=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=4),
    bias=st.booleans(),
    in_order=st.booleans(),
    few=st.sampled_from([-1, 99]),
)
def test_each_row_gets_its_own_update(
    slots: list[int | None], ranks: list[tuple[int, int]], bias: bool, in_order: bool, few: int
) -> None:
    """By bags and by batched products. Ranks differ between updates and projections; 0: it isn't on that one."""
    generator = torch.Generator().manual_seed(len(slots))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    if in_order:  # without None, as many rows to each: no row is moved
        slots = [slot for slot in range(len({*slots} - {None})) for _ in range(2)] or [0]
    x_TN = random(len(slots), N)
    layers = [(DenseWeight(random(m, N)), random(m) if bias else None) for m in OUTPUTS]
    most = [max(rank[number] for rank in ranks) for number in range(2)]
    stacks = Stacks.zeros(2, N, list(zip(most, OUTPUTS, strict=True)), x_TN).enlarged(4)
    updates: list[dict[int, Factors]] = [{}, {}]
    for slot, both in enumerate(ranks):
        for number, rank in enumerate(both):
            if rank:
                updates[number][slot] = Factors(random(rank, N), random(OUTPUTS[number], rank), 0.5 + slot)
            stacks.put(slot, number, *updates[number].get(slot, (None, None, 1.0)))
    segments = tuple(Segment(slot, at, at + 1) for at, slot in enumerate(slots) if slot is not None)
    projections = [Projection(*layer, one, segments) for layer, one in zip(layers, updates, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacked, "FEW", few)
        places = Places.of(slots, x_TN.device)
    assert (places.rows_P is None) or not in_order
    assert (places.bags is None) == (few < 1 or not any(slot is not None for slot in slots))
    wanted = lora_linears_plain(x_TN, projections)
    width = max(map(slots.count, {*slots} - {None}), default=0) + 1
    at = [4 * width if slot is None else slot * width + slots[:row].count(slot) for row, slot in enumerate(slots)]
    in_tensor = Places(4, width, spread=Spread(4, width, torch.tensor(at)))
    for one in (places, in_tensor):
        for got, its in zip(stacked_linears(x_TN, layers, stacks, one), wanted, strict=True):
            torch.testing.assert_close(got, its)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_slot_that_is_given_again_keeps_nothing(rank: int) -> None:
    stacks = Stacks.zeros(1, N, [(3, 4)], torch.zeros(()))
    stacks.put(0, 0, torch.ones(3, N), torch.ones(4, 3), 2.0)
    stacks.put(0, 0, torch.ones(rank, N), torch.ones(4, rank), 2.0)
    low = torch.ones(1, 1, N) @ stacks.a_SNK @ stacks.bs_SRM[0]
    torch.testing.assert_close(low, torch.full((1, 1, 4), 2.0 * rank * N))


@pytest.mark.parametrize("shape", [(5, 12), (5, 9), (12, 5)])
def test_few_rows_get_what_many_get(shape: tuple[int, int]) -> None:
    weight, bias_M = DenseWeight(torch.randn(shape)), torch.randn(shape[0])
    for rows in (1, 7, 8, 12, 32, 33):
        x_TN = torch.randn(rows, shape[1])
        for bias in (None, bias_M):
            got = weight.few(x_TN, bias)
            torch.testing.assert_close(got, weight.matmul(x_TN, bias))
            assert got.is_contiguous()  # it is added to in place, by views


def test_places_of_unlike_segments_are_not_dense() -> None:
    cpu = torch.device("cpu")
    assert Places.of([0] * 20 + [1] * 20, cpu).dense and Places.of([None, 0], cpu).dense
    assert Places.of([0] * 20 + [1] * 15 + [None], cpu).dense
    assert not Places.of([0] * 90 + [1, 2, 3], cpu).dense and not Places.of([9] * 20, cpu).dense
