"""Rows that are measured, in batches: beginnings that they share are computed once, as in training (data/sharing.py);
where they share nothing, rows of like length stand together.

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
    """(numbers of the examples, their batch on the model's device) until all are through. `units`: of these alone; the
    two answers of a pair are one, and in one batch."""
    examples, device = weighed.examples, next(forward.model.parameters()).device
    every, by_length = Units(examples), list[int]()
    asked = range(len(every)) if units is None else units
    for first in range(0, len(asked), NEAR):
        near = asked[first : first + NEAR]
        shared = every.shared(examples, near) if forward.shares else None
        if shared is None:
            by_length += near
            continue
        numbers = every.examples_of(near)
        for part in shared.batches(at_once):
            own = [numbers[number] for number in part.numbers]
            yield own, weighed.dressed(part.pack(), own).to(device)
    order = np.array(by_length, np.int64)
    for group in fill(order[np.argsort(every.lengths[order], kind="stable")], every.lengths, at_once):
        own = every.examples_of(group)
        yield own, weighed.packed(own).to(device)
