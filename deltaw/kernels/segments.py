"""Which rows of a pass take which update of a layer: consecutive rows, one segment after the other.

A layer may carry several updates (a sweep's learners, a server's adapters), and one pass may hold rows of all of them.
The base's product is one for all rows; each update is added to its own segment. Rows in no segment are the base's.
"""

from typing import NamedTuple

NOBODY = -1  # in place of an update's number: the base alone, so rows that no segment has


class Segment(NamedTuple):
    """Rows `start` up to `end` of a pass take the layer's update number `update`."""

    update: int
    start: int
    end: int


Segments = tuple[Segment, ...]
