"""What step k trains on, as a pure function of (lengths, seed, epoch, k).

    epoch -> steps -> batches -> documents

An epoch is shuffled by (seed, epoch). A step takes documents in that order until the next would not fit
into `tokens_per_step`; it is cut into batches of at most `tokens_per_batch`, whose gradients are summed. A
document longer than either stands alone. So `tokens_per_batch` changes the memory and the speed and nothing
else. Where several processes train together each takes some of the batches (`dealt`), which are cut smaller where they
would be fewer than these; the documents of a step are the same at every number of processes.

Where examples of a step begin alike, and the model can be run so, their beginning is computed once (sharing.py): the
step's examples are the same, its batches are cut by what is computed, and hold more of them.

How many steps some epochs have is counted, since the order of the documents makes one epoch a step longer than
another, in exact arithmetic: 1.1 epochs of 10 steps are 11, and not the 12 that ceil makes of 11.000000000000002.
Beyond `EPOCHS` epochs or `DOCUMENTS` documents those that were counted stand for the others, so that any number is
answered at once.

Nothing is remembered between steps: the loader's whole state is (epoch, step), which comes out with every item and says
where to go on *after* it. To resume is to pass it back. Rejected: saving the generator's state (more to save, and a
resumed run would have to replay it), and packing the next step in another thread meanwhile (packing takes 0.2 ms; on
two cores the demo fell from 392 to 324 tokens/s by it, since OpenMP gives a second thread a team of its own, which
spins).
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import overload

import numpy as np

from deltaw.base.batch import Batch
from deltaw.data.example import Example
from deltaw.data.examples import lengths_of, units_of
from deltaw.data.sharing import Shared
from deltaw.data.weighed import Weighed

EPOCHS, DOCUMENTS = 1_000, 2_000_000  # whose steps are counted one by one
Step = list[list[int]]  # batches of example numbers
Item = tuple[list[Batch], "LoaderState"]


@dataclass(frozen=True, slots=True)
class LoaderState:
    """The next step to take. `LoaderState(**json)` and `dataclasses.asdict` are each other's inverse."""

    epoch: int = 0
    step: int = 0


class Plan(Sequence[Step]):
    """The steps of one epoch: every example number exactly once. Kept as the numbers' order and the places where it is
    cut; a step's batches are made when it is asked for. Raises ValueError on no lengths."""

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        tokens_per_step: int,
        tokens_per_batch: int,
        seed: int,
        epoch: int,
        ranks: int = 1,
    ) -> None:
        if not len(lengths):
            raise ValueError("an epoch needs at least one example")
        self._lengths, self._tokens_per_batch, self._ranks = np.asarray(lengths), tokens_per_batch, ranks
        self._order = shuffled(len(lengths), seed, epoch).astype(np.uint32)
        self._cuts = _cuts(self._lengths[self._order], tokens_per_step)

    def __len__(self) -> int:
        return len(self._cuts) - 1

    @overload
    def __getitem__(self, number: int) -> Step: ...
    @overload
    def __getitem__(self, number: slice) -> list[Step]: ...
    def __getitem__(self, number: int | slice) -> Step | list[Step]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        return _for_all(self._ranks, fill(self.numbers(number), self._lengths, self._tokens_per_batch), self._lengths)

    def numbers(self, step: int) -> np.ndarray:
        """The example numbers of a step, in the order of the epoch."""
        begin = range(len(self))[step]
        return self._order[self._cuts[begin] : self._cuts[begin + 1]]


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch."""
    # RandomState and not default_rng: NumPy promises the same stream for ever only for the former.
    words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, epoch]
    return np.random.RandomState(words).permutation(count)


def fill(numbers: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Consecutive groups whose lengths sum to at most `capacity`, or that hold one number."""
    numbers = np.asarray(numbers, np.int64)
    cuts = _cuts(np.asarray(lengths)[numbers], capacity)
    return [numbers[begin:end].tolist() for begin, end in pairwise(cuts.tolist())]


def _cuts(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Where the groups of `fill` begin, and the end."""
    ends = np.cumsum(lengths, dtype=np.int64)
    cuts = array("q", [0])
    while cuts[-1] < len(ends):
        begin = cuts[-1]
        before = int(ends[begin - 1]) if begin else 0
        cuts.append(max(begin + 1, int(ends.searchsorted(before + capacity, "right"))))
    return np.frombuffer(cuts, np.int64)


def _for_all(ranks: int, batches: Step, lengths: np.ndarray) -> Step:
    """The batches of a step; where they are fewer than the ranks, smaller ones of about equal length, at least one
    document each: as many as there are ranks, or documents."""
    numbers = [number for batch in batches for number in batch]
    parts = min(ranks, len(numbers))
    if len(batches) >= parts:
        return batches
    ends = np.cumsum([lengths[number] for number in numbers])
    cuts, total = [0], int(ends[-1])
    for part in range(1, parts):
        nearest = int(np.searchsorted(ends, total * part / parts))  # its document: cut before or after, which is nearer
        behind = nearest + (ends[nearest] - total * part / parts <= lengths[numbers[nearest]] / 2)
        cuts.append(min(max(int(behind), cuts[-1] + 1), len(numbers) - parts + part))
    return [numbers[a:b] for a, b in pairwise([*cuts, len(numbers)])]


def dealt(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """The numbers of the batches that each rank takes: the largest first, each to whom has the least so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        rank = min(range(ranks), key=lambda r: (tokens[r], r))
        shares[rank].append(number)
        tokens[rank] += sizes[number]
    return [sorted(share) for share in shares]


class Units:
    """Examples as they are kept together: each alone, or the two of a pair."""

    def __init__(self, examples: Sequence[Example]) -> None:
        every = lengths_of(examples)
        self._starts = units_of(examples)
        self._single = len(self._starts) == len(every)
        self._ends = np.append(self._starts[1:], len(every))
        self.lengths = self.summed(every)
        """Tokens of each."""

    def __len__(self) -> int:
        return len(self._starts)

    def summed(self, values: np.ndarray) -> np.ndarray:
        """A number of each example, added up by unit."""
        return values if self._single else np.add.reduceat(values, self._starts)

    def examples_of(self, units: Sequence[int]) -> list[int]:
        """The numbers of the examples of these units."""
        if self._single:
            return list(units)
        return [number for unit in units for number in range(self._starts[unit], self._ends[unit])]

    def shared(self, examples: Sequence[Example], units: Sequence[int]) -> Shared | None:
        """What the examples of these units share (sharing.py); None where it doesn't pay."""
        sizes = [] if self._single else [int(self._ends[unit] - self._starts[unit]) for unit in units]
        return Shared.of([examples[number] for number in self.examples_of(units)], sizes)


class Loader:
    """Iterates for ever over (the batches of a step, the state to resume at after it). The two answers of a pair
    are one document to the plan, and so in one batch. `shares`: whether examples that begin alike share what is
    computed of it; `weighed`: the examples with what a reference says of them."""

    def __init__(
        self,
        examples: Sequence[Example],
        tokens_per_step: int,
        tokens_per_batch: int,
        seed: int,
        start: LoaderState = LoaderState(),
        ranks: int = 1,
        shares: bool = False,
        weighed: Weighed | None = None,
    ) -> None:
        self._units = Units(examples)
        lengths = self._units.lengths
        self._weighed = weighed or Weighed(examples)

        @lru_cache(maxsize=2)
        def steps_of(epoch: int) -> Plan:
            sizes = {"tokens_per_step": tokens_per_step, "tokens_per_batch": tokens_per_batch}
            return Plan(lengths, **sizes, seed=seed, epoch=epoch, ranks=ranks)

        self._steps_of, self._start = steps_of, start
        self._lengths, self._seed, self._tokens_per_step = lengths, seed, tokens_per_step
        self._tokens_per_batch, self._ranks, self._shares = tokens_per_batch, ranks, shares
        if start.epoch < 0 or not 0 <= start.step < self.steps_in_epoch(start.epoch):
            raise ValueError(f"{start} is not a position in these {len(lengths)} examples")

    def __iter__(self) -> Iterator[tuple[list[Batch], LoaderState]]:
        state = self._start
        while True:
            batches, state = self._packed(state)
            yield batches, state

    def _packed(self, at: LoaderState) -> tuple[list[Batch], LoaderState]:
        """The batches of the step at `at`, and where the next one is."""
        steps = self._steps_of(at.epoch)
        numbers = steps.numbers(at.step).tolist()
        batches = self._shared(numbers)
        batches = batches or [self._weighed.packed(self._units.examples_of(batch)) for batch in steps[at.step]]
        last = at.step + 1 == len(steps)
        return batches, LoaderState(at.epoch + 1, 0) if last else LoaderState(at.epoch, at.step + 1)

    def _shared(self, units: Sequence[int]) -> list[Batch]:
        """The batches of a step whose examples share their beginnings; none where they don't."""
        shared = self._units.shared(self._weighed.examples, units) if self._shares else None
        every = self._units.examples_of(units)
        parts = shared.batches(self._tokens_per_batch, self._ranks) if shared else []
        return [self._weighed.dressed(part.pack(), [every[number] for number in part.numbers]) for part in parts]

    def steps_in_epoch(self, epoch: int) -> int:
        """How many steps epoch `epoch` (from 0) has; the order of the documents makes it differ a little."""
        return len(self._steps_of(epoch))

    def total_steps(self, epochs: float) -> int:
        """Steps in `epochs` epochs, the last of which may be a part; at least one."""
        asked = Fraction(repr(epochs))  # the number that was written, not the binary one beside it
        counted = max(1, min(EPOCHS, DOCUMENTS // len(self._lengths)))
        whole = min(int(asked), counted)
        steps = Fraction(sum(self._count(epoch) for epoch in range(whole)))
        if whole < int(asked):
            steps *= asked / whole
        elif part := asked - whole:
            steps += part * self._count(whole)
        return max(1, math.ceil(steps))

    def _count(self, epoch: int) -> int:
        """The steps of an epoch without their batches, and without keeping them."""
        order = shuffled(len(self._lengths), self._seed, epoch)
        return len(_cuts(self._lengths[order], self._tokens_per_step)) - 1


class Ahead:
    """What an iterator gives, the next item fetched early where somebody has the time (`fetch`)."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._fetched: list[Item] = []

    def fetch(self) -> list[Batch]:
        """The batches of the next item, which is kept."""
        if not self._fetched:
            self._fetched.append(next(self._items))
        return self._fetched[0][0]

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        self.fetch()
        return self._fetched.pop()
