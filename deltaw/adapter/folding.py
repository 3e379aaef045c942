"""A model's fused blocks with their factors folded into the weights' own storage: what a GPU trains on.

`fold` looks at the attention blocks and gated MLPs that the kernels stand in for (stand_ins.py) and joins what reads
one input: query, key and value; output; gate and up; down (kernels/joined.py). The base's weights move there, row for
row the numbers that they were, so nothing is in memory twice, and whoever reads a weight meanwhile reads a view. Inside
`Folded.on()` the stand-ins compute with the joined matrices; outside, everything is as ever. `undo` gives each weight a
storage of its own again.

Only plain LoRA is folded, without dropout, and only matrices that are dense. A block that has anything else is left as
it is, and is slower by what kernels/joined.py says. Other adapters on the model (a sweep's other runs) are idle inside:
what is folded is one adapter's, and a pass that says which rows take which isn't for `on()`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deltaw.adapter.attach import Attached
from deltaw.adapter.layer import AdaptedLinear, LoRAUpdate
from deltaw.adapter.stand_ins import FusedAttention, FusedMLP
from deltaw.base.passing import Passing, passing_of
from deltaw.kernels.joined import Joined
from deltaw.kernels.lora import Factors
from deltaw.kernels.spread import Spread

GROUPS = {
    FusedAttention: (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    FusedMLP: (("gate_proj", "up_proj"), ("down_proj",)),
}


class Folded:
    """Joined matrices by the modules whose weights they are."""

    def __init__(self, passing: Passing, joined: dict[tuple[nn.Module, ...], Joined]) -> None:
        self._passing, self._joined = passing, joined
        self._spread = Spread([place for one in joined.values() for place in one.places])
        self._rooms: dict[int, int] = {}
        for one in joined.values():
            self._rooms[one.inputs] = max(one.room, self._rooms.get(one.inputs, 0))

    def of(self, modules: tuple[nn.Module | None, ...]) -> Joined | None:
        """The matrix of these modules, in this order."""
        return self._joined.get(modules)  # type: ignore[arg-type]

    def room(self, columns: int) -> int:
        """The most columns that a matrix of so many inputs wants behind them."""
        return self._rooms.get(columns, 0)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the stand-ins use the joined matrices, with the factors as they are now."""
        self._spread.spread()
        self._passing.folded = self
        try:
            yield
        finally:
            self._passing.folded = None

    def collect(self) -> dict[Tensor, Tensor]:
        """By factor: where its gradient is added up from now on, zeros at first."""
        found: dict[Tensor, Tensor] = {}
        for joined in self._joined.values():
            found |= joined.collect()
        return found

    @torch.no_grad()
    def undo(self) -> None:
        """Put every weight back into a storage of its own."""
        self._spread = Spread(())
        while self._joined:  # one after the other: each gives its memory back
            modules, _ = self._joined.popitem()
            for module in modules:
                weight = _weight(module)
                assert weight is not None
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def fold(attached: Attached) -> Folded | None:
    """Fold what can be folded, in place; None where nothing can."""
    joined: dict[tuple[nn.Module, ...], Joined] = {}
    like: Tensor | None = None  # the first one's weights: all factors are written in their dtype, by one launch
    for stand_in in attached.stand_ins.values():
        groups = next((groups for kind, groups in GROUPS.items() if isinstance(stand_in, kind)), ())
        for names in groups:
            modules = tuple(stand_in._modules[name] for name in names)
            if (one := _joined(modules, attached.number, like)) is not None:
                joined[modules] = one  # type: ignore[index]
                like = one.whole
    return Folded(passing_of(attached.model), joined) if joined else None


def _joined(modules: Sequence[nn.Module | None], number: int, like: Tensor | None) -> Joined | None:
    """The matrix of these modules, to which their weights have moved; None where they can't be joined, or aren't in
    the dtype and on the device of `like`."""
    weights, updates = [_weight(module) for module in modules], [_update(module, number) for module in modules]
    biases = [getattr(_linear(module), "bias", None) for module in modules]
    whole = [weight for weight in weights if weight is not None]
    if len(whole) < len(weights) or not all(foldable for foldable, _ in updates) or not any(f for _, f in updates):
        return None
    like = whole[0] if like is None else like
    same = all((weight.dtype, weight.device) == (like.dtype, like.device) for weight in whole)
    if not same or len({bias is None for bias in biases}) > 1 or len({id(weight) for weight in whole}) < len(whole):
        return None
    joined = Joined(whole, biases, [factors for _, factors in updates])
    for weight, view in zip(whole, joined.views, strict=True):
        weight.data = view
    return joined


def _linear(module: nn.Module | None) -> nn.Module | None:
    return module.base.module if isinstance(module, AdaptedLinear) else module


def _weight(module: nn.Module | None) -> nn.Parameter | None:
    """The parameter of a plain frozen linear layer, with an update beside it or not; None of anything else."""
    linear = _linear(module)
    plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not linear.weight.requires_grad
    return linear.weight if plain else None  # type: ignore[union-attr, return-value]


def _update(module: nn.Module | None, number: int) -> tuple[bool, Factors | None]:
    """(whether what acts beside the weight can be folded, its factors or None where there is nothing)."""
    if not isinstance(module, AdaptedLinear):
        return True, None
    update = module.update(number)
    if update is None:
        return True, None
    if type(update) is not LoRAUpdate or update.dropout or not update.enabled:
        return False, None
    return True, update.kernel_factors()
