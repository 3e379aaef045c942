"""Where keys and values of rows lie: slots of one capacity on a shelf, which has one tensor per layer, [2, S, K, C, E].

The rows in use are a shelf's first ones, so that they are read together as a view: the last takes the place of one that
leaves. What no row has written is zero, always: it is multiplied by a probability of 0, which leaves no zero of a NaN.
But the first place of a slot that no row has may hold anything (captured.py): its next row writes it before it reads.

Letters: T tokens, S slots, K key/value heads, C capacity, E head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.generate.cache import Row

SMALLEST = 64  # places of a slot
SMALL = 16_384  # places of a shelf that may have more slots than it needs


class Shelf:
    """Slots of one capacity. `rows` are those in use, by place; `moves`, how often its tensors have been made anew.
    `doubling`: while it is small it has a power of two of slots, so that it moves seldom."""

    def __init__(self, capacity: int, *, doubling: bool = False) -> None:
        self.capacity, self.size, self.moves = capacity, 0, 0
        self.doubling = doubling
        self.rows: list[Row] = []
        self.stored: dict[nn.Module, Tensor] = {}  # by layer: [2, S, K, C, E], keys and values

    @property
    def small(self) -> bool:
        return self.size * self.capacity <= SMALL

    def of(self, layer: nn.Module, like_TKE: Tensor) -> Tensor:
        """The keys and values of a layer."""
        if layer not in self.stored:
            self.stored[layer] = like_TKE.new_zeros(2, self.size, like_TKE.shape[1], self.capacity, like_TKE.shape[2])
        return self.stored[layer]

    def add(self, rows: Sequence[Row]) -> None:
        """Give each a slot."""
        if len(self.rows) + len(rows) > self.size:
            self.size = max(len(self.rows) + len(rows), self.size * 5 // 4)
            if self.doubling and power_of_two(self.size) * self.capacity <= SMALL:
                self.size = power_of_two(self.size)
            self.moves += 1
            for layer, old in self.stored.items():
                self.stored[layer] = old.new_zeros(2, self.size, *old.shape[2:])
                self.stored[layer][:, : old.shape[1]] = old
        self.rows += rows

    def take(self, row: Row, other: "Shelf") -> None:
        """Give a row of another shelf a slot, with what it holds."""
        self.add([row])
        for layer, old in other.stored.items():
            new = self.of(layer, old[0, :, :, 0])
            new[:, len(self.rows) - 1, :, : other.capacity] = old[:, other.rows.index(row)]

    def write(self, row: Row, first: int, stored: Mapping[nn.Module, Tensor]) -> None:
        """Put keys and values [2, K, N, E] into a row's slot, from the place `first` on."""
        place = self.rows.index(row)
        for layer, part in stored.items():
            self.of(layer, part[0].transpose(0, 1))[:, place, :, first : first + part.shape[2]] = part

    def read(self, row: Row) -> dict[nn.Module, Tensor]:
        """What a row's slot holds, by layer: [2, K, C, E]. Views."""
        place = self.rows.index(row)
        return {layer: stored[:, place] for layer, stored in self.stored.items()}

    def remove(self, row: Row) -> None:
        """The last row takes its place, and leaves zeros."""
        place = self.rows.index(row)
        for stored in self.stored.values():
            stored[:, place] = stored[:, len(self.rows) - 1]
            stored[:, len(self.rows) - 1] = 0
        self.rows[place] = self.rows[-1]
        self.rows.pop()


def power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()


@dataclass(frozen=True)
class Part:
    """A shelf's part of a pass: for each token its row in the pass, its place on the shelf, and where in its slot."""

    shelf: Shelf
    rows: Tensor | slice
    places: Tensor
    ats: Tensor

    def store(self, layer: nn.Module, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Keys and values into their slots. The layer's tensor."""
        stored = self.shelf.of(layer, k_TKE)
        stored[:, self.places, :, self.ats] = torch.stack([k_TKE[self.rows], v_TKE[self.rows]], 1)
        return stored
