"""Rows that are measured, in batches: beginnings that they share are computed once, as in training (data/sharing.py);
where they share nothing, rows of like length stand together. On a GPU, where documents are packed, they stay in the
order in which they come: so every batch has about as many documents and labels, and one recorded pass serves them all
(scoring.py).

Beginnings are looked for among `NEAR` neighbours, so that not all rows of a large set are in memory. Whatever is
measured is a sum by row or by label, so it doesn't depend on how rows are batched, but for rounding.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from deltaw.base.batch import Batch
from deltaw.base.forward import Forward
from deltaw.data.loader import Units, fill
from deltaw.data.weighed import Weighed

NEAR = 4096  # rows among which beginnings are looked for
TOKENS_AT_ONCE = 4096  # that are computed


def batches(
    forward: Forward, weighed: Weighed, units: Sequence[int] | None = None, *, at_once: int = TOKENS_AT_ONCE
) -> Iterator[tuple[list[int], Batch]]:
    """(numbers of the examples, their batch, on a CPU) until all are through. `units`: of these alone; the two answers
    of a pair are one, and in one batch."""
    if not forward.shares:
        for own in groups(forward, weighed, units, at_once=at_once):
            yield own, weighed.packed(own)
        return
    examples, every, alone = weighed.examples, Units(weighed.examples), list[int]()
    asked = range(len(every)) if units is None else units
    for first in range(0, len(asked), NEAR):
        near = asked[first : first + NEAR]
        shared = every.shared(examples, near)
        if shared is None:
            alone += near
            continue
        numbers = every.examples_of(near)
        for part in shared.batches(at_once):
            own = [numbers[number] for number in part.numbers]
            yield own, weighed.dressed(part.pack(), own)
    for own in groups(forward, weighed, alone, at_once=at_once):
        yield own, weighed.packed(own)


def groups(
    forward: Forward, weighed: Weighed, units: Sequence[int] | None = None, *, at_once: int = TOKENS_AT_ONCE
) -> list[list[int]]:
    """The numbers of the examples of each batch, where no beginning is shared."""
    every = Units(weighed.examples)
    order = np.arange(len(every)) if units is None else np.array(units, np.int64)
    if not (forward.packed and next(forward.model.parameters()).is_cuda):
        order = order[np.argsort(every.lengths[order], kind="stable")]
    return [every.examples_of(group) for group in fill(order, every.lengths, at_once)]
