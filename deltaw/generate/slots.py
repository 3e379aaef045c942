"""Our own slots for keys and values: rows of any length join, decode side by side and leave, and none is padded.

Where attention stands in (adapter/stand_ins.py), a pass carries one of two things to it (`Pass.cache`):

    Filling     prompts laid end to end, as in training: packed attention, and their keys and values go to their slots;
    Going on    one token per row: its key and value go to its slot, and it attends to what the slot holds.

Slots of one capacity stand on a shelf, which has one tensor per layer, [2, S, K, C, E]. Rows of a shelf are read
together up to the longest of them, so that a short row doesn't pay for a long one: capacities go up by half from 64,
and a row that has filled its slot moves to the next shelf. The rows in use are a shelf's first ones: the last takes the
place of one that leaves. What no row has written is zero, always: it is multiplied by a probability of 0, which leaves
no zero of a NaN.

The model is run with one row per sequence ([R, 1]) and not with all rows as one sequence, since angles that depend on a
document's company (base/angles.py) are asked for by row.

`Slots.hold` tries it, like everything here: the model's own decoding, a row at a time, must come to the same logits
when rows join, grow and leave. An attention without a stand-in shows there, too: it would see one token alone.

Rejected: pages of fixed size with a table per row (PagedAttention): on a CPU gathering the pages costs what reading
them costs, and on a GPU it takes a kernel of its own.

Letters: T tokens of prompts, R rows, S slots, H query heads, K key/value heads, C capacity, E head size, V vocabulary.
"""

import inspect
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapter.ready import Ready
from deltaw.adapter.stand_ins import FusedAttention
from deltaw.base.attention import is_packed
from deltaw.base.batch import Batch, Pass, passing_of
from deltaw.base.frozen import InParts, dtype_of
from deltaw.base.probe import REFUSALS
from deltaw.generate.cache import Cache, Row, segments_for
from deltaw.generate.sampling import Sampling
from deltaw.generate.together import Trial
from deltaw.kernels.attention import Documents, packed_attention
from deltaw.kernels.bags import making
from deltaw.kernels.decode import cached_attention

SMALLEST = 64  # places of a slot
PIECE = 4096  # tokens of prompts in a pass; a longer prompt has a pass of its own


class Shelf:
    """Slots of one capacity. `rows` are those in use, by place."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self.rows: list[Row] = []
        self.stored: dict[nn.Module, Tensor] = {}  # by layer: [2, S, K, C, E], keys and values

    def of(self, layer: nn.Module, like_TKE: Tensor) -> Tensor:
        """The keys and values of a layer."""
        if layer not in self.stored:
            self.stored[layer] = like_TKE.new_zeros(2, self.size, like_TKE.shape[1], self.capacity, like_TKE.shape[2])
        return self.stored[layer]

    def add(self, rows: Sequence[Row]) -> None:
        """Give each a slot."""
        if len(self.rows) + len(rows) > self.size:
            self.size = max(len(self.rows) + len(rows), self.size * 5 // 4)
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

    def remove(self, row: Row) -> None:
        """The last row takes its place, and leaves zeros."""
        place = self.rows.index(row)
        for stored in self.stored.values():
            stored[:, place] = stored[:, len(self.rows) - 1]
            stored[:, len(self.rows) - 1] = 0
        self.rows[place] = self.rows[-1]
        self.rows.pop()


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


@dataclass(frozen=True)
class Filling:
    """What a pass over prompts carries to attention."""

    documents: Documents
    parts: Sequence[Part]

    def attention(
        self,
        layer: nn.Module,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        for part in self.parts:
            part.store(layer, k_TKE, v_TKE)
        return packed_attention(q_THE, k_TKE, v_TKE, self.documents, scale=scale, window=window, softcap=softcap)


class GoingOn:
    """What a step of one token per row carries to attention."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.ends = [(min(ats) + 1, max(ats) + 1) for ats in (part.ats.tolist() for part in parts)]
        self.biases: dict[tuple[int, int | None], Tensor | None] = {}  # by part and window

    def attention(
        self,
        layer: nn.Module,
        q_RHE: Tensor,
        k_RKE: Tensor,
        v_RKE: Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        scale = q_RHE.shape[2] ** -0.5 if scale is None else scale
        out_RHE = torch.empty_like(q_RHE) if len(self.parts) > 1 else q_RHE
        for number, part in enumerate(self.parts):
            stored = part.store(layer, k_RKE, v_RKE)
            shortest, longest = self.ends[number]
            first = 0 if window is None else max(0, shortest - window)
            k_RKLE, v_RKLE = stored[:, : len(part.places), :, first:longest]
            bias_RL = self._bias(number, window, q_RHE.dtype)
            out = cached_attention(q_RHE[part.rows], k_RKLE, v_RKLE, bias_RL, scale=scale, softcap=softcap)
            if len(self.parts) == 1 and isinstance(part.rows, slice):
                return out
            out_RHE[part.rows] = out
        return out_RHE

    def _bias(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """−∞ where a row doesn't see, for all layers of one window."""
        shortest, longest = self.ends[number]
        if shortest == longest:
            return None  # what lies before the window isn't read
        if (number, window) not in self.biases:
            ats_R1 = self.parts[number].ats[:, None]
            at_L = torch.arange(0 if window is None else max(0, shortest - window), longest, device=ats_R1.device)
            hidden_RL = at_L > ats_R1 if window is None else (at_L > ats_R1) | (at_L <= ats_R1 - window)
            bias_RL = torch.zeros(hidden_RL.shape, dtype=dtype, device=ats_R1.device)
            self.biases[number, window] = bias_RL.masked_fill_(hidden_RL, -torch.inf)
        return self.biases[number, window]


class Slots(Cache):
    """Rows in slots of our own. Only for a model of which `Slots.hold` says that it may."""

    share = 8

    def __init__(self, model: nn.Module, *, alone: bool = False) -> None:
        """`alone`: there is never more than one row."""
        self.model, self.alone = model, alone
        self.device = next(model.parameters()).device
        self.shelves: dict[int, Shelf] = {}  # by capacity
        self.shelf_of: dict[Row, Shelf] = {}
        parts = any(isinstance(module, InParts) for module in model.modules())  # their weights come and go
        self.ready = None if parts else Ready(model)

    @property
    def tokens(self) -> int:
        return sum(row.reach for row in self.shelf_of)

    def first(self, waiting: Sequence[Row], tokens: int) -> list[Row]:
        chosen: list[Row] = []
        piece = 0
        for row in waiting:
            piece, tokens = piece + len(row.prompt), tokens - row.reach
            if (tokens < 0 and (chosen or self.shelf_of)) or (piece > PIECE and chosen):
                break
            chosen.append(row)
        return chosen

    def join(self, rows: Sequence[Row]) -> Tensor:
        ordered = sorted(rows, key=lambda row: row.update or 0)
        starts = [0, *accumulate(len(row.prompt) for row in ordered)]
        tokens_T = torch.tensor([token for row in ordered for token in row.prompt], device=self.device)
        batch = Batch.of(tokens_T, starts)
        ends_R = torch.tensor([starts[ordered.index(row) + 1] - 1 for row in rows], device=self.device)
        segments = segments_for([row.update for row in ordered], starts)
        try:
            parts = self._given(ordered, batch)
            this = Pass(documents=batch.documents, segments=segments, cache=Filling(batch.documents, parts))
            return self._run(this, tokens_T[None], batch.positions_T[None], logits_to_keep=ends_R)[0]
        except BaseException:
            for row in rows:
                self.leave(row)
            raise

    def _given(self, rows: Sequence[Row], batch: Batch) -> list[Part]:
        """Give the rows, which are the batch's documents, slots, and say which tokens go where."""
        by_capacity: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            by_capacity.setdefault(_capacity(len(row.prompt) + 1), []).append(number)
        parts = []
        for capacity, numbers in by_capacity.items():
            shelf = self.shelves.setdefault(capacity, Shelf(capacity))
            first = len(shelf.rows)
            shelf.add([rows[number] for number in numbers])
            self.shelf_of |= {rows[number]: shelf for number in numbers}
            spans = [torch.arange(batch.starts[n], batch.starts[n + 1], device=self.device) for n in numbers]
            length_N = torch.tensor([len(span) for span in spans], device=self.device)
            places_T = torch.arange(first, len(shelf.rows), device=self.device).repeat_interleave(length_N)
            tokens_T = torch.cat(spans)
            everything = len(numbers) == len(rows)
            parts.append(Part(shelf, slice(None) if everything else tokens_T, places_T, batch.positions_T[tokens_T]))
        return parts

    def steps(self) -> Iterator[tuple[list[Row], Tensor]]:
        if not self.shelf_of:
            return
        self._grow()
        rows: list[Row] = []
        parts = []
        for shelf in self.shelves.values():
            which = slice(len(rows), len(rows := [*rows, *shelf.rows]))
            ats_R = torch.tensor([row.place for row in shelf.rows], device=self.device)
            parts.append(Part(shelf, which, torch.arange(len(shelf.rows), device=self.device), ats_R))
        updates = [row.update for row in rows]
        segments = segments_for(updates, range(len(rows) + 1))
        if self.ready is not None:
            self.ready.begin(updates, self.device)
        ids_R1 = torch.tensor([[row.last] for row in rows], device=self.device)
        positions_R1 = torch.tensor([[row.place] for row in rows], device=self.device)
        this = Pass(segments=segments, cache=GoingOn(parts), ready=self.ready)
        yield rows, self._run(this, ids_R1, positions_R1)[:, -1]

    def _grow(self) -> None:
        """Move rows that have filled their slots to larger ones."""
        for row, shelf in list(self.shelf_of.items()):
            if row.place >= shelf.capacity:
                capacity = _capacity(row.place + 1)
                larger = self.shelves.setdefault(capacity, Shelf(capacity))
                larger.take(row, shelf)
                self.leave(row)
                self.shelf_of[row] = larger

    def leave(self, row: Row) -> None:
        shelf = self.shelf_of.pop(row, None)
        if shelf is not None:
            shelf.remove(row)
            if not shelf.rows:
                del self.shelves[shelf.capacity]

    def _run(self, this: Pass, ids: Tensor, positions: Tensor, **options: Tensor) -> Tensor:
        with passing_of(self.model).running(this), making(self.alone):
            out = self.model(input_ids=ids, position_ids=positions, use_cache=False, return_dict=True, **options)
        logits: Tensor = out.logits
        return logits

    @staticmethod
    def hold(model: nn.Module) -> bool:
        """Whether rows in slots get what they get alone, as the model, in eval mode, is now. Tried once per model."""
        stand_ins = [module for module in model.modules() if isinstance(module, FusedAttention)]
        if not stand_ins or not is_packed(model) or not all(stand_in.enabled for stand_in in stand_ins):
            return False
        dtype = dtype_of(model)
        if _tried.get(stand_ins[0], (None,))[0] != dtype:
            _tried[stand_ins[0]] = dtype, _holds(model)
        return _tried[stand_ins[0]][1]


_tried: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()  # spares the passes


@torch.no_grad()
def _holds(model: nn.Module) -> bool:
    """Two rows join, go on, one leaves, and another joins the one that is left, which takes the same step again."""
    if not {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters):
        return False
    try:
        trial = Trial(model)
        truth_2RV = torch.stack([trial.logits([ids])[:, 0] for ids in (trial.short, trial.long)], 1)
        slots, token = Slots(model), int(trial.other[0])
        short, long, again = (
            Row(n, ids.tolist(), Sampling(), set(), n, room=2)
            for n, ids in enumerate((trial.short, trial.long, trial.short))
        )
        first_RV = slots.join([short, long])
        short.new, long.new, again.new = [token], [token], []
        ((_, second_RV),) = slots.steps()
        slots.leave(short)
        third_V = slots.join([again])[0]
        again.new = [token]
        ((rows, fourth_RV),) = slots.steps()
    except REFUSALS:
        return False
    own_2RV = torch.stack([first_RV, second_RV]).double()
    late_2RV = torch.stack([torch.stack([third_V, first_RV[1]]), fourth_RV[[rows.index(again), rows.index(long)]]])
    return all(trial.apart(mine, truth_2RV) <= trial.units for mine in (own_2RV, late_2RV.double()))


def _capacity(tokens: int) -> int:
    """The size of the smallest slot that holds so many."""
    capacity = SMALLEST
    while capacity < tokens:
        capacity += capacity // 2
    return capacity
