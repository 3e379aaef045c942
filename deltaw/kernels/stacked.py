"""Low-rank updates of many rows in two batched products: for steps of decoding, where each update has few rows.

The factors of S updates stand in stacks, of all the projections that read one x. Rows are spread over [S, C], C to each
update, and

    H = x A      [S, C, K] = [S, C, N] [S, N, K]         y += H B      [S, C, M] += [S, C, R] [S, R, M]

so that a step costs the same calls whatever the number of adapters. Scales are folded into B. Both stacks are kept as
they are read, the summed dimension before the last: the transposed ones take 1.5 times (A) and 4 times as long (B), 16
updates of rank 16 on one core. An update of a smaller rank, or that isn't on the layer, is zeros.

Forward alone: in training each update has many rows, and lora.py goes segment by segment.

Letters: T rows, S updates in a stack, C rows to each, N inputs, M outputs, R rank, K the sum of the ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.weight import Weight


class Places(NamedTuple):
    """Where the rows of a pass stand in [S, C]. `rows_P`: those that take an update, and `places_P` where each stands;
    None: all do, in order, C to each."""

    updates: int
    width: int
    rows_P: Tensor | None = None
    places_P: Tensor | None = None

    @staticmethod
    def of(slots: Sequence[int | None], device: torch.device) -> "Places":
        """For rows that take the update in these slots of the stacks; None: none."""
        counts: dict[int, int] = {}
        rows, within = [], []
        for row, slot in enumerate(slots):
            if slot is not None:
                rows.append(row)
                within.append(counts.get(slot, 0))
                counts[slot] = within[-1] + 1
        updates, width = max(counts, default=-1) + 1, max(counts.values(), default=0)
        if list(slots) == [slot for slot in range(updates) for _ in range(width)]:
            return Places(updates, width)
        places = [slots[row] * width + at for row, at in zip(rows, within, strict=True)]  # type: ignore[operator]
        return Places(updates, width, torch.tensor(rows, device=device), torch.tensor(places, device=device))

    def spread(self, x_TN: Tensor) -> Tensor:
        """[S, C, N], zeros where no row stands."""
        if self.rows_P is None or self.places_P is None:
            return x_TN.view(self.updates, self.width, -1)
        x_PN = x_TN.new_zeros(self.updates * self.width, x_TN.shape[1])
        x_PN[self.places_P] = x_TN[self.rows_P]
        return x_PN.view(self.updates, self.width, -1)

    def add(self, y_TM: Tensor, h_SCR: Tensor, b_SRM: Tensor) -> None:
        """y += H B, in place."""
        if self.rows_P is None or self.places_P is None:
            y_TM.view(self.updates, self.width, -1).baddbmm_(h_SCR, b_SRM)
        else:
            y_TM.index_add_(0, self.rows_P, torch.bmm(h_SCR, b_SRM).flatten(0, 1)[self.places_P])


class Stacks(NamedTuple):
    """The factors of updates of projections that read one x: A of all side by side, B of each."""

    a_SNK: Tensor
    bs_SRM: tuple[Tensor, ...]

    @staticmethod
    def zeros(updates: int, inputs: int, shapes: Sequence[tuple[int, int]], like: Tensor) -> "Stacks":
        """For projections of these (rank, outputs)."""
        a_SNK = like.new_zeros(updates, inputs, sum(rank for rank, _ in shapes))
        return Stacks(a_SNK, tuple(like.new_zeros(updates, *shape) for shape in shapes))

    @property
    def ranks(self) -> list[int]:
        """By projection."""
        return [b_SRM.shape[1] for b_SRM in self.bs_SRM]

    def put(self, slot: int, number: int, a_RN: Tensor | None, b_MR: Tensor | None, scale: float) -> None:
        """The factors of one update of projection `number`; None: zeros."""
        at = sum(b_SRM.shape[1] for b_SRM in self.bs_SRM[:number])
        a_NR, b_RM = self.a_SNK[slot, :, at : at + self.bs_SRM[number].shape[1]], self.bs_SRM[number][slot]
        a_NR.zero_(), b_RM.zero_()
        if a_RN is not None and b_MR is not None:
            a_NR[:, : len(a_RN)] = a_RN.T
            b_RM[: len(a_RN)] = b_MR.T * scale

    def enlarged(self, updates: int) -> "Stacks":
        """With room for so many."""
        larger = [one.new_zeros(updates, *one.shape[1:]) for one in (self.a_SNK, *self.bs_SRM)]
        for new, old in zip(larger, (self.a_SNK, *self.bs_SRM), strict=True):
            new[: len(old)] = old
        return Stacks(larger[0], tuple(larger[1:]))


def stacked_linears(
    x_TN: Tensor, layers: Sequence[tuple[Weight, Tensor | None]], stacks: Stacks | None, places: Places
) -> list[Tensor]:
    """Each layer's x Wᵀ + bias, and what the stacks' updates add to it. The twin is `lora_linears_plain`."""
    ys = [weight.few(x_TN, bias_M) for weight, bias_M in layers]
    if stacks is None or not places.updates:
        return ys
    h_SCK = torch.bmm(places.spread(x_TN), stacks.a_SNK[: places.updates])
    at = 0
    for y_TM, b_SRM in zip(ys, stacks.bs_SRM, strict=True):
        if rank := b_SRM.shape[1]:
            places.add(y_TM, h_SCK[:, :, at : at + rank], b_SRM[: places.updates])
            at += rank
    return ys
