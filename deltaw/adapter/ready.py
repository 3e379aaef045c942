"""What steps of decoding have ready: each layer's weight at hand, its updates in stacks, the angles of the step.

A step of one token per row is bound by reading weights and by the calls that it takes to do so. What is the same in
every step isn't asked for again: which modules there are, their weights, which rows take which update. The updates that
rows take have slots, and their factors are copied into stacks (kernels/stacked.py) when one gets its slot; a slot whose
update no row takes any more is the next one's. So an adapter's factors are held twice while rows take it.

A copy may be out of date: a step goes on with what an update is now. In each step the versions of its parameters, its
scale and its switch are compared with those that were copied (some 10 µs for 16 updates of three layers). Where
adapters have been put on or taken off (`Carried.changes`), a number may be another update's: copies stay of those that
their layers still have, so that an adapter that comes doesn't make all others be copied again.

Where a layer's update is none that the kernels know, or the layer isn't given all rows, `linears` leaves it to others.

Letters: T rows, N inputs, M outputs, E head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapter.layer import AdaptedLinear
from deltaw.adapter.layer_update import AdaptedLayer, Carried, LayerUpdate
from deltaw.base.frozen import weight_of
from deltaw.kernels.lora import Factors
from deltaw.kernels.segments import NOBODY
from deltaw.kernels.stacked import Places, Stacks, stacked_linears
from deltaw.kernels.weight import Weight


class Ready:
    """For one engine; `begin` says which rows a pass has."""

    def __init__(self, model: nn.Module, *, doubling: bool = False) -> None:
        """`doubling`: stacks have room for powers of two of updates."""
        self.model, self.doubling = model, doubling
        self.carried: Carried | None = None
        self.changes = -1
        self.numbers: list[int] = []  # of the updates, by slot
        self.rows: list[int | None] | None = None
        self.count: int | None = None  # of the rows of the pass
        self.places = Places(0, 0)
        self.groups: dict[nn.Module, _Group] = {}  # by the first of its modules
        self._angles: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def begin(self, updates: Sequence[int | None], device: torch.device, others: Sequence[int | None] = ()) -> None:
        """The rows of the pass that follows, by the number of the update that each takes (None: the first; `NOBODY`).
        `others`: updates of rows that aren't in it, which keep their slots. Raises ValueError for a number that the
        model doesn't carry."""
        self._angles = {}
        self._look()
        rows = list(updates)
        if rows != self.rows:
            places = Places.of(self._slots(rows, others), device)
            self.rows, self.count, self.places = rows, len(rows), places

    def slots(self, updates: Sequence[int | None], others: Sequence[int | None] = ()) -> list[int | None]:
        """The same for a pass whose places its caller knows: the slot of each row's update. `stand` says them."""
        self._look()
        self.rows = None
        return self._slots(updates, others)

    def stand(self, count: int, places: Places) -> None:
        """The pass that follows has so many rows, there."""
        self._angles = {}
        self.rows, self.count, self.places = None, count, places

    def _slots(self, updates: Sequence[int | None], others: Sequence[int | None]) -> list[int | None]:
        """By row. Updates that no row takes any more lose theirs."""
        first = self.carried.first if self.carried else NOBODY
        wanted = [first if update is None else update for update in updates]
        all_rows = dict.fromkeys([*wanted, *(first if update is None else update for update in others)])
        live = [number for number in all_rows if number != NOBODY] if self.carried else []
        if self.carried:
            self.carried.check(live)
        free = [slot for slot, number in enumerate(self.numbers) if number not in live]
        for number in live:
            if number not in self.numbers:
                if free:
                    self.numbers[free.pop(0)] = number
                else:
                    self.numbers.append(number)
        while self.numbers and self.numbers[-1] not in live:
            self.numbers.pop()
        slot_of = {number: slot for slot, number in enumerate(self.numbers)}
        return [slot_of.get(number) for number in wanted]

    def _look(self) -> None:
        """Let go of what isn't there any more where adapters have been put on or taken off."""
        if self.carried is None or not self.carried.numbers:
            layers = (module for module in self.model.modules() if isinstance(module, AdaptedLinear))
            self.carried, self.changes = next((layer.carried for layer in layers), None), -1
        changes = self.carried.changes if self.carried else 0
        if changes != self.changes:
            self.changes, self.rows = changes, None
            self.groups = {first: group for first, group in self.groups.items() if group.look()}

    def linears(self, modules: tuple[nn.Module, ...], x_TN: Tensor) -> list[Tensor] | None:
        """Each module of one x, [T, M]; None where that is for the modules to do."""
        group = self.groups.get(modules[0])
        if group is None or group.modules != modules:
            group = self.groups[modules[0]] = _Group(modules)
        if self.count is None or not group.fits or (group.adapted and x_TN.shape[0] != self.count):
            return None
        if group.adapted and not group.refresh(self.numbers, self.room, x_TN):
            return None
        return stacked_linears(x_TN, group.layers, group.stacks, self.places)

    @property
    def room(self) -> int:
        """How many updates the stacks have room for, at least."""
        count = len(self.numbers)
        return 1 << (count - 1).bit_length() if self.doubling and count else count

    @property
    def stacks(self) -> list[Stacks | None]:
        """Those of all groups. A pass that is recorded reads these very ones for ever."""
        return [group.stacks for group in self.groups.values()]

    @property
    def current(self) -> bool:
        """Whether the stacks hold what the updates are now."""
        return all(not group.adapted or group.current(self.numbers) for group in self.groups.values())

    @property
    def complete(self) -> bool:
        """Whether the last pass took all that it has of updates from the stacks."""
        own = {module for group in self.groups.values() if group.current(self.numbers) for _, module in group.adapted}
        return all(module in own for module in self.model.modules() if isinstance(module, AdaptedLayer))

    def angles(self, angles: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and, the first half negative, sin, [T, 1, E], once for all layers that are given the same."""
        known = self._angles.get(id(angles))
        if known is None:
            cos_T1E, sin_T1E = (angle.flatten(0, 1).unsqueeze(1).to(dtype) for angle in angles)
            one, two = sin_T1E.chunk(2, -1)
            known = self._angles[id(angles)] = (angles, cos_T1E, torch.cat([-one, two], -1))
        return known[1:]


class _Group:
    """Modules that read one x."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self.modules = modules
        bases = [module.base.module if isinstance(module, AdaptedLinear) else module for module in modules]
        self.layers: list[tuple[Weight, Any]] = [(weight_of(base), base.bias) for base in bases]
        self.adapted = [(at, module) for at, module in enumerate(modules) if isinstance(module, AdaptedLinear)]
        self.fits = all(module.sees_all for _, module in self.adapted)
        self.stacks: Stacks | None = None
        self.held: list[_Held | None] = []  # by slot
        self.numbers: list[int] = []  # of the step before, by slot
        self.seen: _Seen | None = None  # all of theirs: asked one by one, 16 adapters take as long as their products

    def look(self) -> bool:
        """Let go of updates that their layers don't have any more, and of stacks that are wider than the others need.
        Whether anything is left."""
        self.seen = None
        self.fits = all(module.sees_all for _, module in self.adapted)
        self.held = [one if one and one.updates == self._updates(one.number) else None for one in self.held]
        ranks = [0] * len(self.modules)
        for one in self.held:
            ranks = [max(pair) for pair in zip(ranks, self._ranks(one), strict=True)]
        if self.stacks is not None and ranks != self.stacks.ranks:
            self.stacks, self.held = None, []
        return any(self.held)

    def _updates(self, number: int) -> list[LayerUpdate | None]:
        return [layer.update(number) for _, layer in self.adapted]

    def _ranks(self, held: "_Held | None") -> list[int]:
        """By projection, that of an update; 0 where it isn't, or is switched off."""
        ranks = [0] * len(self.modules)
        for (at, _), one in zip(self.adapted, held.factors() if held else [None] * len(self.adapted), strict=True):
            ranks[at] = 0 if one is None else len(one.a_RN)
        return ranks

    def current(self, numbers: Sequence[int]) -> bool:
        """Whether the stacks hold these updates as they are now."""
        return numbers == self.numbers and self.seen is not None and self.seen.current()

    def refresh(self, numbers: Sequence[int], room: int, x_TN: Tensor) -> bool:
        """Have the factors of these updates in their slots, as they are now, of at least `room`. False where one has
        none."""
        if self.stacks is not None and self.stacks.a_SNK.dtype != x_TN.dtype:
            self.stacks, self.held, self.seen = None, [], None
        if self.current(numbers):
            return True
        self.seen = None
        if self.stacks is not None and room > len(self.stacks.a_SNK):
            self.stacks = self.stacks.enlarged(max(room, len(self.stacks.a_SNK) * 5 // 4))
        for slot, number in enumerate(numbers):
            known = self.held[slot] if slot < len(self.held) else None
            if known is not None and known.number == number and known.seen.current():
                continue
            held = _Held(number, self._updates(number))
            if not self._put(slot, held, room, x_TN):
                return False
            self.held[slot : slot + 1] = [held]
        live = [held for held in self.held[: len(numbers)] if held is not None]
        self.numbers, self.seen = list(numbers), _Seen([update for held in live for update in held.seen.updates])
        return True

    def _put(self, slot: int, held: "_Held", slots: int, x_TN: Tensor) -> bool:
        factors = held.factors()
        if any(f is None and update and update.enabled for f, update in zip(factors, held.updates, strict=True)):
            return False
        ranks = self._ranks(held)
        before = [0] * len(ranks) if self.stacks is None else self.stacks.ranks
        if self.stacks is None or any(rank > old for rank, old in zip(ranks, before, strict=True)):
            self._widen([max(pair) for pair in zip(ranks, before, strict=True)], slots, x_TN)
        assert self.stacks is not None
        for (at, _), one in zip(self.adapted, factors, strict=True):
            self.stacks.put(slot, at, *(one or (None, None, 1.0)))
        return True

    def _widen(self, ranks: list[int], slots: int, x_TN: Tensor) -> None:
        """Stacks for higher ranks, with what is held."""
        shapes = [(rank, weight.shape[0]) for rank, (weight, _) in zip(ranks, self.layers, strict=True)]
        self.stacks = Stacks.zeros(max(slots, len(self.held)), x_TN.shape[1], shapes, x_TN)
        for slot, held in enumerate(self.held):
            for (at, _), one in zip(self.adapted, held.factors(), strict=True) if held else ():
                self.stacks.put(slot, at, *(one or (None, None, 1.0)))


class _Held:
    """Updates of one number, and what they were when they were copied."""

    def __init__(self, number: int, updates: list[LayerUpdate | None]) -> None:
        self.number, self.updates = number, updates
        self.seen = _Seen([update for update in updates if update is not None])

    def factors(self) -> list[Factors | None]:
        """Theirs; None where there is none, where it is switched off, and where the kernels don't know it."""
        return [update.kernel_factors() if update and update.enabled else None for update in self.updates]


class _Seen:
    """Some updates, and what they were."""

    def __init__(self, updates: list[LayerUpdate]) -> None:
        self.updates = updates
        tensors = [tensor for one in updates for tensor in (*one.trained().values(), *one.constants().values())]
        self.tensors = [tensor for tensor in tensors if not tensor.is_inference()]  # others have no version
        self.state = self._state()

    def _state(self) -> tuple[list[int], list[object]]:
        return [one._version for one in self.tensors], [(one.enabled, one.strength) for one in self.updates]

    def current(self) -> bool:
        """Whether they are what they were."""
        return self.state == self._state()
