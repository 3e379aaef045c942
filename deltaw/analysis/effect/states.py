"""The states in which a trained update is tried: times a factor, cut to a rank, or off in one layer or kind of module.

    scale    f ΔW, f from 0 (the base) beyond 1 (as trained)
    rank     the best update of rank k in each module (Eckart-Young), nothing trained again
    kind     ΔW off in all modules of a kind, on in all others
    layer    ΔW off in all modules of a layer

Effects of switching off don't add up: two layers that do the same are each of no use while the other is on.
A state is worn for the length of a block, in the layers that are there: nothing is rebuilt and the base isn't touched.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from deltaw.adapter.algebra import pad
from deltaw.adapter.attach import Attached
from deltaw.analysis.words import columns_of, place
from deltaw.base.stand_in import disabled
from deltaw.factors import LowRank
from deltaw.updates import Plain, Update

SCALES = (0.25, 0.5, 0.75, 1.25)
RANKS = (1, 2, 4, 8, 16)

Group = Literal["scale", "rank", "kind", "layer"]
Trained = Mapping[str, Any]  # what each layer's update is, as a value
NAMES: dict[Group, str] = {
    "scale": "other scales", "rank": "lower ranks", "kind": "kinds of module off", "layer": "layers off",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class State:
    """One of a group: `name` tells it from the others, `off` are the modules without their update."""

    group: Group
    name: str
    off: tuple[str, ...] = ()
    change: Callable[[Any], Update] | None = None

    @contextmanager
    def worn(self, attached: Attached, trained: Trained) -> Iterator[None]:
        """The adapter in this state inside the block, as it was trained after it."""
        with disabled([attached.layers[path] for path in self.off]):
            try:
                if self.change is not None:
                    for path, layer in attached.layers.items():
                        if isinstance(trained[path], Plain):  # trained tokens and whole modules stay as they are
                            layer.set_factors(self.change(trained[path]))
                yield
            finally:
                if self.change is not None:
                    for path, layer in attached.layers.items():
                        layer.set_factors(trained[path])


def states_of(attached: Attached, trained: Trained, *, deep: bool) -> list[State]:
    """All that this adapter can be tried in, the most telling groups first; `deep` adds what is off, module by module.
    DoRA has no multiples, and only LoRA's factors are cut."""
    states = []
    if not attached.spec.magnitude:
        states += [State("scale", f"{factor:g}", change=_times(factor)) for factor in SCALES]
    if all(isinstance(update, LowRank) for update in trained.values() if isinstance(update, Plain)):
        most = max((update.rank for update in trained.values() if isinstance(update, LowRank)), default=0)
        states += [State("rank", f"{rank}", change=_cut(rank)) for rank in RANKS if rank < most]
    if deep:
        kinds = columns_of(attached.layers)
        groups: dict[tuple[Group, str], list[str]] = {("kind", kind): [] for kind in kinds.values()}
        for path in attached.layers:
            groups["kind", kinds[path]].append(path)
        layers = {path: layer for path in attached.layers if (layer := place(path)[0]) is not None}
        for path in sorted(layers, key=lambda path: layers[path]):
            groups.setdefault(("layer", f"{layers[path]}"), []).append(path)
        states += [State(group, name, tuple(paths)) for (group, name), paths in groups.items()]
    return states


def _times(factor: float) -> Callable[[Any], Update]:
    return lambda update: update.times(factor)


def _cut(rank: int) -> Callable[[LowRank], Update]:
    return lambda update: pad(update.truncate(rank=min(rank, update.rank)), update.rank)
