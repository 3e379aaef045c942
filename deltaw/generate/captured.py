"""Steps of decoding that are recorded once on a GPU and replayed (kernels/graphs.py): the host can't launch a small
model's step as fast as the device runs it.

What a step's work depends on is its `Size`, or lies in tensors that stay where they are:

    rows       of each shelf, filled up to a power of two, or to all of its slots, by rows that nobody reads: token 0 in
               the first place of a slot that no row has. Whoever gets it writes that place before anything reads it
    places     all that a slot of the shelf has are read; which a row sees is made on the device from its position.
               So slots' capacities are powers of two here, too, from `SMALLEST` on: few sizes are met in a row's life
    inputs     one tensor [3, B] of int64: each row's token, its position, and where it stands among the updates
    updates    how many the stacks have room for and the most rows of one, both powers of two. Which row takes which is
               in the inputs (`Spread`, kernels/stacked.py); rows that all take the first one need nothing
    results    logits [B, V], good until the next step. Tokens are chosen outside

A size is recorded when it is met for the third time, since a recording takes as long as three steps. It isn't used
unless it gives the logits of its work, run as it is, to the bit, and these are the step's own within rounding. What
moves makes other sizes: a shelf that has grown or is another one, adapters that come or go, more room for updates. The
stacks are read where they lie, so whether these are still theirs, and hold what the updates are now, is looked at while
the device works: if not, the step is taken again as it is, which only writes what it has written. The `GRAPHS` sizes
that were used last are kept. An empty shelf stays while it is small (slots.py): a new one would be other tensors.

Not recorded: models whose weights come and go, or whose rows can't be in slots; those of which a layer takes its
updates otherwise than from the stacks (DoRA, experts, a head); work that waits for the device (experts that are chosen,
frequencies that grow with the longest row). Then decoding goes on as before, and a line says why. Prompts run as they
are: no two are alike.

Rejected: a graph for each shelf, which would read the weights as many times. Lengths that are rounded up below a
slot's capacity: more graphs, and reading is the small part. Graphs that outlive their engine: they would have to
follow what training does to the model in between.

Letters: B rows, filled up, V vocabulary.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.adapter.ready import Ready
from deltaw.base.passing import Pass
from deltaw.base.probe import rounding
from deltaw.errors import first_line
from deltaw.generate.cache import Row
from deltaw.generate.going import GoingOn
from deltaw.generate.shelf import Part, Shelf, power_of_two
from deltaw.kernels.graphs import Record
from deltaw.kernels.stacked import Places, Spread, Stacks

SMALLEST = 256  # places of a slot
OFTEN = 3  # times that a size is met before it is recorded
GRAPHS = 16  # kept at most

Run = Callable[[Pass, Tensor, Tensor], Tensor]  # what it carries, ids [B, 1], positions [B, 1] -> logits [B, V]


class Size(NamedTuple):
    """All that a step's work depends on beside tensors that stay. `shelves`: each with its moves and its rows, filled
    up; `updates` [S, C] as in `Places`; `spread`: where rows stand is in the inputs; `changes`: of the model's updates,
    with which its layers may have been made anew."""

    changes: int
    shelves: tuple[tuple[Shelf, int, int], ...]
    updates: tuple[int, int]
    spread: bool

    @staticmethod
    def of(shelves: Sequence[Shelf], slots: Sequence[int | None], ready: Ready) -> "Size":
        """`slots`: of each row's update."""
        parts = tuple((shelf, shelf.moves, min(shelf.size, power_of_two(len(shelf.rows)))) for shelf in shelves)
        taken = Counter(slot for slot in slots if slot is not None)
        if not taken:
            return Size(ready.changes, parts, (0, 0), False)
        if taken == {0: len(slots)}:
            return Size(ready.changes, parts, (1, sum(rows for *_, rows in parts)), False)
        return Size(ready.changes, parts, (ready.room, power_of_two(max(taken.values()))), True)

    @property
    def rows(self) -> int:
        return sum(rows for *_, rows in self.shelves)

    def inputs(self, slots: Sequence[int | None]) -> list[list[int]]:
        """[3, B]."""
        S, C = self.updates
        tokens, ats, places, taken, nobody = [], [], [], Counter[int](), S * C
        left = iter(slots)
        for shelf, _, count in self.shelves:
            filler = [0] * (count - len(shelf.rows))
            tokens += [row.last for row in shelf.rows] + filler
            ats += [row.place for row in shelf.rows] + filler
            for _, slot in zip(shelf.rows, left, strict=False):
                places.append(nobody if slot is None else slot * C + taken[slot])
                taken.update([] if slot is None else [slot])
            places += [nobody] * len(filler)
        return [tokens, ats, places]

    def places(self, places_B: Tensor) -> Places:
        return Places(*self.updates, spread=Spread(*self.updates, places_B) if self.spread else None)


@dataclass(frozen=True, eq=False)
class Graph:
    """A recorded step: `stacks` are those that it reads."""

    inputs: Tensor
    replay: Callable[[], object]
    logits: Tensor
    stacks: list[Stacks | None]

    def reads(self, stacks: Sequence[Stacks | None]) -> bool:
        return len(stacks) == len(self.stacks) and all(map(lambda a, b: a is b, stacks, self.stacks))


@cache
def say(why: str) -> None:
    """Why steps aren't captured: once, however many engines find the same."""
    print(f"steps of decoding aren't captured, so they are slower on this device: {why:.200}", file=sys.stderr)


class Captured:
    """The steps of one engine's slots. `run` runs the model; `plain` takes a step as it is; `held`: whether the shelf
    is the slots' still."""

    def __init__(
        self,
        run: Run,
        plain: Callable[[Sequence[Shelf]], Tensor],
        held: Callable[[Shelf], bool],
        ready: Ready,
        record: Record,
        say: Callable[[str], None] = say,
    ) -> None:
        self._run, self._plain, self._held, self._ready, self._record, self._say = run, plain, held, ready, record, say
        self.graphs: dict[Size, Graph] = {}  # the last used last
        self.why_not = ""
        self._met: Counter[Size] = Counter()
        self._last: Size | None = None

    def step(self, shelves: Sequence[Shelf], others: Sequence[Row]) -> Tensor:
        """Logits [R, V] of the rows of shelves that have some. `others`: rows that keep their updates' slots."""
        if self.why_not:
            return self._plain(shelves)
        updates = [row.update for shelf in shelves for row in shelf.rows]
        slots = self._ready.slots(updates, [row.update for row in others])
        size = Size.of(shelves, slots, self._ready)
        if size != self._last:
            self.let_go()
            self._last = size
        graph = self.graphs.pop(size, None)
        if graph is not None:
            graph.inputs.copy_(torch.tensor(size.inputs(slots)))
            graph.replay()
            if graph.reads(self._ready.stacks):  # else they have moved, and it is of no more use
                self.graphs[size] = graph
                if self._ready.current:
                    return _real(size, graph.logits)
        own_RV = self._plain(shelves)
        self._met[size] += 1
        if graph is None and self._met[size] >= OFTEN:
            try:
                self._recorded(size, slots, own_RV)
            except Exception as error:
                short = isinstance(error, torch.OutOfMemoryError)
                self.why_not = "there isn't memory enough to record them" if short else first_line(error)
                self._say(self.why_not)
                self.release()
        return own_RV

    def _recorded(self, size: Size, slots: Sequence[int | None], own_RV: Tensor) -> None:
        """Record a size of which a step gave these logits. Raises RuntimeError where the recording gives others."""
        inputs = torch.tensor(size.inputs(slots), device=own_RV.device)

        def work() -> Tensor:
            return self._work(size, inputs)

        truth_RV = _real(size, work())
        if not self._ready.complete:
            raise RuntimeError("a layer takes its updates otherwise than decoding has them ready")
        if not bool(truth_RV.isfinite().all()):
            return  # nothing can be compared
        replay, logits_BV = self._record(work)
        replay()
        own, truth = own_RV.double(), truth_RV.double()
        off = float((truth - own).square().mean().sqrt() / own.std())
        if not (torch.equal(_real(size, logits_BV), truth_RV) and off <= 2 * self._rounding(size)):
            raise RuntimeError(f"a recorded step isn't the step itself: its logits are off by {off:.1e}")
        while len(self.graphs) >= GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        self.graphs[size] = Graph(inputs, replay, logits_BV, self._ready.stacks)

    def _work(self, size: Size, inputs: Tensor) -> Tensor:
        """Logits [B, V]."""
        tokens_B, ats_B, places_B = inputs
        parts, ends = list[Part](), []
        for shelf, _, count in size.shelves:
            rows = slice(at := parts[-1].rows.stop if parts else 0, at + count)  # type: ignore[union-attr]
            parts.append(Part(shelf, rows, torch.arange(count, device=inputs.device), ats_B[rows]))
            ends.append((1, shelf.capacity))
        self._ready.stand(size.rows, size.places(places_B))
        this = Pass(cache=GoingOn(parts, ends), ready=self._ready)
        return self._run(this, tokens_B[:, None], ats_B[:, None])

    @staticmethod
    def _rounding(size: Size) -> float:
        """What two roundings of a step differ by."""
        return max(rounding(next(iter(size.shelves[0][0].stored.values())).dtype), 1e-6)

    def let_go(self) -> None:
        """Of sizes that won't come back, and of the memory that they hold: their shelves' too."""

        def lives(size: Size) -> bool:
            still = all(shelf.moves == moves and self._held(shelf) for shelf, moves, _ in size.shelves)
            return still and size.changes == self._ready.changes

        self._last = None
        for kept in (self.graphs, self._met):
            for size in [size for size in kept if not lives(size)]:
                del kept[size]

    def release(self) -> None:
        """Give up what was recorded."""
        if self.graphs and (device := next(iter(self.graphs.values())).inputs.device).type == "cuda":
            torch.cuda.synchronize(device)  # it may be running
        self.graphs.clear()
        self._met.clear()
        self._last = None


def _real(size: Size, logits_BV: Tensor) -> Tensor:
    """Those of rows that are there."""
    parts = logits_BV.split([count for *_, count in size.shelves])
    some = [part_RV[: len(shelf.rows)] for part_RV, (shelf, *_) in zip(parts, size.shelves, strict=True)]
    return some[0] if len(some) == 1 else torch.cat(some)
