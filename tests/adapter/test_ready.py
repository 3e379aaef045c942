"""What a step of decoding has ready of its layers is what the layers are now, whatever happened to them since."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from deltaw.adapter.attach import Attached, attach, detach
from deltaw.adapter.ready import Ready
from deltaw.base.batch import segments_of
from deltaw.base.passing import Pass, passing_of
from deltaw.config import AdapterSpec
from deltaw.kernels.segments import NOBODY
from deltaw.kernels.stacked import Stacks
from tests.adapter.test_several import moved
from tests.architectures import tiny

NAMES = ("q_proj", "k_proj", "v_proj")
CPU = torch.device("cpu")


def put(model: nn.Module, seed: int, **changes: object) -> Attached:
    return moved(attach(model, AdapterSpec(**{"rank": 2, "alpha": 4, **changes})), seed)  # type: ignore[arg-type]


def projections(model: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(model.get_submodule(f"model.layers.0.self_attn.{name}") for name in NAMES)


@torch.no_grad()
def same(model: nn.Module, ready: Ready, updates: Sequence[int]) -> bool:
    """Whether the rows get from it what they get from the layers themselves."""
    modules, x_TN = projections(model), torch.randn(len(updates), 32)
    with passing_of(model).running(Pass(segments=segments_of(updates, range(len(updates) + 1)))):
        wanted = [module(x_TN) for module in modules]
    ready.begin(updates, CPU)
    got = ready.linears(modules, x_TN)
    return got is not None and all(torch.allclose(g, w, atol=1e-5) for g, w in zip(got, wanted, strict=True))


def test_rows_of_any_adapters_that_come_and_go() -> None:
    """Of unlike ranks, one that isn't on every layer, and none."""
    model = tiny("llama")
    ready = Ready(model)
    assert same(model, ready, [NOBODY, NOBODY])  # before there is an adapter
    one, two, three = put(model, 1), put(model, 2, rank=5), put(model, 3, targets=("k_proj",))
    a, b, c = one.number, two.number, three.number
    for rows in ([a, b], [b, a], [a, a, b, b], [c], [NOBODY, c, a, c], [b, NOBODY], [NOBODY], [a, b, c, a, NOBODY]):
        assert same(model, ready, rows), rows
    detach(two)
    again = put(model, 4)
    assert again.number == b and same(model, ready, [a, b, c])
    with pytest.raises(ValueError, match="number"):
        ready.begin([a, 17], CPU)


def test_slots_that_were_asked_for_in_between_are_known() -> None:
    model = tiny("llama")
    a, b, c = (put(model, seed).number for seed in range(3))
    ready = Ready(model)
    assert same(model, ready, [a, b])
    assert ready.slots([c]) == [0] and same(model, ready, [a, b])


def test_stacks_may_have_room_for_powers_of_two() -> None:
    model = tiny("llama")
    numbers = [put(model, seed).number for seed in range(3)]
    ready = Ready(model, doubling=True)
    for count in (1, 2, 3):
        assert same(model, ready, numbers[:count])
        assert ready.room == (1, 2, 4)[count - 1]
        assert all(stacks is not None and len(stacks.a_SNK) >= ready.room for stacks in ready.stacks)


def test_an_adapter_that_comes_or_goes_has_no_other_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    one, two = put(model, 1), put(model, 2)
    ready, rows = Ready(model), [one.number, two.number]
    assert same(model, ready, rows)
    copied: list[int] = []
    real = Stacks.put
    monkeypatch.setattr(Stacks, "put", lambda self, slot, *rest: (copied.append(slot), real(self, slot, *rest)))
    wide = put(model, 3, rank=5)
    assert same(model, ready, rows) and not copied
    assert same(model, ready, [wide.number, *rows]) and copied
    detach(wide)
    assert same(model, ready, rows)  # in stacks that are narrow again
    (group,) = ready.groups.values()
    assert group.stacks is not None and group.stacks.ranks == [2, 2, 2]
    copied.clear()
    detach(two)
    other = put(model, 4)
    assert other.number == two.number and same(model, ready, rows) and set(copied) == {1}


def test_updates_of_rows_outside_a_pass_keep_their_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that joins has no other row's factors copied again."""
    model = tiny("llama")
    a, b, c = (put(model, seed).number for seed in (1, 2, 3))
    ready = Ready(model)
    assert same(model, ready, [a, b])
    copied: list[int] = []
    real = Stacks.put
    monkeypatch.setattr(Stacks, "put", lambda self, slot, *rest: (copied.append(slot), real(self, slot, *rest)))
    ready.begin([c, c, c], CPU, [a, b])
    assert ready.linears(projections(model), torch.randn(3, 32)) is not None
    assert set(copied) == {2}
    copied.clear()
    assert same(model, ready, [a, b]) and not copied


def test_what_is_changed_in_place_is_seen_in_the_next_step() -> None:
    model = tiny("llama")
    one, two = put(model, 1), put(model, 2)
    ready, rows = Ready(model), [one.number, two.number]
    assert same(model, ready, rows)
    moved(one, 5)  # as an optimiser does
    assert same(model, ready, rows)
    for update in two.layers.values():
        update.scale = 7.0  # type: ignore[assignment]
    assert same(model, ready, rows)
    for attached in (two, one):
        for update in attached.layers.values():
            update.enabled = False
        assert same(model, ready, rows)


def test_updates_that_the_kernels_do_not_know_are_left_to_the_layers() -> None:
    model = tiny("llama")
    one, two = put(model, 1), put(model, 2, magnitude=True)
    ready = Ready(model)
    ready.begin([one.number, two.number], CPU)
    assert ready.linears(projections(model), torch.randn(2, 32)) is None
    assert same(model, ready, [one.number])
    assert ready.linears(projections(model), torch.randn(2, 32)) is None  # rows that aren't the pass's
