"""Low-rank updates of many rows in two calls: for steps of decoding, where each update has few rows.

The factors of S updates stand in stacks, A [S, N, K] of all the projections that read one x, B [S, R, M] of each, and

    h = x A_s        y += h B_s            for a row x that takes the update s

so that a step costs the same calls whatever the number of adapters. A row's h is a weighted sum of the N rows of A_s,
weights being x, and so is what is added to y: that is what an embedding bag computes, for rows of any update side by
side, and it reads the factors once at the speed of memory. Scales are folded into B. An update of a smaller rank, or
that isn't on the layer, is zeros.

Where an update has many rows, or on a GPU, rows are spread over [S, C], C to each, for batched products, which read its
factors once for all of them. One core of a Zen 5, 576 x 48 of A and 16 x 1536 of B, µs:

    updates x rows of each           16 x 1   16 x 2   4 x 4   16 x 8   1 x 16   1 x 64
    float32   A   bags                   58       69      25      155       18       54
                  batched products      105      128      34      181       15       44
              B   bags                   52       68      27      165       21       71
                  batched products       76       86      28      144       13       36
    bfloat16  A   bags                   33       50      18      113       15       44
                  batched products      105      103      35      112       20       23
              B   bags                   37       54      19      116       15       46
                  batched products      134      126      43      139       20       30

Both stacks are kept with the summed dimension before the last: the transposed ones take 1.5 times (A) and 4 times as
long (B) as batched products. Rejected: one product of all rows with all stacks, masked afterwards (twice a bag's time).

Forward alone: in training each update has many rows, and lora.py goes segment by segment.

Letters: T rows, S updates in a stack, C rows to each, N inputs, M outputs, R rank, K the sum of the ranks, P rows that
take an update.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.weight import Weight

FEW = 4  # rows of an update, for which bags are faster


class Bags:
    """Rows as bags: row t is the sum of the rows s N … (s + 1) N of a table [S N, K], weighted by x. An update's number
    is `slots` of the row; a row without one is an empty bag."""

    def __init__(self, slots: Sequence[int | None], device: torch.device) -> None:
        self.slots_P = torch.tensor([slot for slot in slots if slot is not None], dtype=torch.int32, device=device)
        taken = [slot is not None for slot in slots]
        self.taken_T = None if all(taken) else torch.tensor(taken, device=device)
        starts = [0, *accumulate(taken)][: len(taken)]
        self.starts_T = torch.tensor(starts, dtype=torch.int32, device=device)
        self.places: dict[int, tuple[Tensor, Tensor]] = {}  # by N

    def sums(self, x_TN: Tensor, table_SNK: Tensor) -> Tensor:
        """[T, K], zeros where a row takes none."""
        n = x_TN.shape[1]
        if n not in self.places:
            each_N = torch.arange(n, dtype=torch.int32, device=x_TN.device)
            self.places[n] = (self.slots_P[:, None] * n + each_N).view(-1), self.starts_T * n
        x_PN = x_TN if self.taken_T is None else x_TN[self.taken_T]
        table = table_SNK.flatten(0, 1)
        sums_TK: Tensor = torch.embedding_bag(table, *self.places[n], False, 0, False, x_PN.reshape(-1))[0]
        return sums_TK


class Spread:
    """Rows that stand in [S, C] where a tensor says, at S C those that take no update. Nothing else depends on which
    rows take which, so a pass that is recorded may be replayed for others. Places that no row has hold anything: they
    are of no row's update."""

    def __init__(self, updates: int, width: int, places_T: Tensor) -> None:
        self.updates, self.width, self.places_T = updates, width, places_T
        self.sums: dict[int, Tensor] = {}  # by M: of all places, and zeros behind them

    def low(self, x_TN: Tensor, a_SNK: Tensor) -> Tensor:
        """[S, C, K]."""
        x_PN = x_TN.new_empty(self.updates * self.width + 1, x_TN.shape[1])
        x_PN[self.places_T] = x_TN
        return torch.bmm(x_PN[:-1].view(self.updates, self.width, -1), a_SNK)

    def add(self, y_TM: Tensor, h_SCR: Tensor, b_SRM: Tensor) -> None:
        """y += H B, in place."""
        if (m := y_TM.shape[1]) not in self.sums:
            self.sums[m] = y_TM.new_zeros(self.updates * self.width + 1, m)
        torch.bmm(h_SCR, b_SRM, out=self.sums[m][:-1].view(self.updates, self.width, -1))
        y_TM += self.sums[m][self.places_T]


class Places(NamedTuple):
    """Where the rows of a pass stand: in `bags`, as `spread` says, or in [S, C]. `rows_P`: those that take an update,
    and `places_P` where each stands; None: all do, in order, C to each."""

    updates: int
    width: int
    rows_P: Tensor | None = None
    places_P: Tensor | None = None
    bags: Bags | None = None
    spread: Spread | None = None

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
        if device.type == "cpu" and 0 < len(rows) <= FEW * len(counts):
            return Places(updates, width, bags=Bags(slots, device))
        if list(slots) == [slot for slot in range(updates) for _ in range(width)]:
            return Places(updates, width)
        places = [slots[row] * width + at for row, at in zip(rows, within, strict=True)]  # type: ignore[operator]
        return Places(updates, width, torch.tensor(rows, device=device), torch.tensor(places, device=device))

    @property
    def dense(self) -> bool:
        """Whether most places have a row: else going update by update (lora.py) takes less."""
        return self.rows_P is None or self.updates * self.width <= 2 * self.rows_P.shape[0]

    def low(self, x_TN: Tensor, a_SNK: Tensor) -> Tensor:
        """H = x A, as `add` takes it: [T, K] or [S, C, K]."""
        if self.bags is not None:
            return self.bags.sums(x_TN, a_SNK)
        if self.spread is not None:
            return self.spread.low(x_TN, a_SNK)
        if self.rows_P is None or self.places_P is None:
            return torch.bmm(x_TN.view(self.updates, self.width, -1), a_SNK)
        x_PN = x_TN.new_zeros(self.updates * self.width, x_TN.shape[1])
        x_PN[self.places_P] = x_TN[self.rows_P]
        return torch.bmm(x_PN.view(self.updates, self.width, -1), a_SNK)

    def add(self, y_TM: Tensor, h: Tensor, b_SRM: Tensor) -> None:
        """y += H B, in place."""
        if self.bags is not None:
            y_TM += self.bags.sums(h, b_SRM)
        elif self.spread is not None:
            self.spread.add(y_TM, h, b_SRM)
        elif self.rows_P is None or self.places_P is None:
            y_TM.view(self.updates, self.width, -1).baddbmm_(h, b_SRM)
        else:
            y_TM.index_add_(0, self.rows_P, torch.bmm(h, b_SRM).flatten(0, 1)[self.places_P])


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
    if stacks is None or not places.updates or not sum(stacks.ranks):
        return ys
    h = places.low(x_TN, stacks.a_SNK[: places.updates])
    at = 0
    for y_TM, b_SRM in zip(ys, stacks.bs_SRM, strict=True):
        if rank := b_SRM.shape[1]:
            places.add(y_TM, h[..., at : at + rank], b_SRM[: places.updates])
            at += rank
    return ys
