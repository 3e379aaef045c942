"""Batches filled up to one of a few sizes, and the places on a device that such a batch is put into.

A pass that is captured once and replayed (recorded.py) always does the same work on the same addresses, so
every batch that it is to serve must have the same sizes. What fills a batch up changes nothing of it:

    tokens      token 0, in documents of their own behind the real ones, so that no real token sees them
    documents   empty ones behind all others: offsets that are T once more
    labels      none for the filler, so it adds nothing to the loss and gets no gradient
    rows_K      as many rows for the head as the size has labels: the labelled ones, then others, each once; a row
                without a label costs its product and nothing else (kernels/logprobs.py)

The sizes go by steps of a thirty-second of a full batch in tokens and in labels, and by powers of four in documents. A
size costs some passes as they are and a recording (at 135M a step as it is took 544 ms on an H100, a replayed one 25),
so a batch goes into one that is there if that costs at most a twentieth more than its own (`SLACK`): see
`python -m benchmarks.filler`. The longest document is the run's, for all sizes: attention only has to know a bound.
Filler is cut into documents no longer than that one, because a model's table of positions may end there.

Rejected: padding every batch to the full size (the last of a step may be almost empty), and filler inside a real
document (its rows would be seen).

Letters: T tokens, S documents + 1, K rows that the head is asked for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import torch

from deltaw.base.batch import Batch
from deltaw.kernels.documents import Documents, OffsetsAlone
from deltaw.kernels.logprobs import IGNORE

PARTS = 32  # of a full batch, and of its labels
LEAST = 64  # tokens of such a part
SLACK = 0.05  # that another size than its own may cost a batch
LABEL = 0.25  # of a token's cost, that a row of the head adds: about that in a small model, less in a large one
FEWEST = 16  # documents, and four times as many, and so on: an empty one costs attention next to nothing


@dataclass(frozen=True)
class Size:
    """What a batch is filled up to. `longest`: a bound on its documents, filler included."""

    tokens: int
    documents: int
    longest: int
    labels: int

    @staticmethod
    def of(batch: Batch, capacity: int, longest: int) -> "Size":
        """The smallest of the sizes that holds `batch`, where a full one has `capacity` tokens, and no document of the
        run more than `longest`."""
        counts = len(batch.tokens_T), len(batch.starts) - 1, batch.supervised
        return Size.holding([counts], capacity, max(longest, batch.documents.longest))

    @staticmethod
    def holding(batches: Sequence[tuple[int, int, int]], capacity: int, longest: int) -> "Size":
        """The smallest that holds each of these batches of so many (tokens, documents, labels)."""
        step = max(LEAST, -(-capacity // PARTS))
        tokens = _up(max(count for count, _, _ in batches), step)
        longest = min(tokens, longest)
        documents = max(number + -(-(tokens - count) // longest) for count, number, _ in batches)
        labels = max(1, *(number for _, _, number in batches))
        labels = min(tokens, _up(labels, step))
        room = FEWEST
        while room < documents:
            room *= 4
        return Size(tokens, room, longest, labels)

    @property
    def cost(self) -> float:
        """Of a pass, in tokens."""
        return self.tokens + LABEL * self.labels

    def among(self, sizes: Iterable["Size"]) -> "Size":
        """The cheapest of these that holds what this one holds and costs hardly more; else this one."""
        mine = astuple(self)
        large = (size for size in sizes if all(own <= its for own, its in zip(mine, astuple(size), strict=True)))
        return min((size for size in large if size.cost <= (1 + SLACK) * self.cost), key=lambda s: s.cost, default=self)

    def with_(self, other: "Size") -> "Size":
        """The smallest that holds what either holds."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Size(*(max(pair) for pair in pairs))


def fill(batch: Batch, size: Size) -> Batch:
    """`batch`, which is on a CPU and of one update, filled up. Raises ValueError where it doesn't fit."""
    T, starts = len(batch.tokens_T), list(batch.starts)
    while starts[-1] < size.tokens:
        starts.append(min(starts[-1] + size.longest, size.tokens))
    fits = starts[-1] == size.tokens and len(starts) <= size.documents + 1 and batch.supervised <= size.labels
    if not fits or batch.documents.longest > size.longest:
        raise ValueError(f"a batch of {T} tokens, {len(batch.starts) - 1} documents doesn't fit into {size}")
    if batch.updates or batch.weights or batch.documents.tree is not None:
        raise ValueError("documents with updates or weights of their own, or with a shared prefix, aren't filled up")
    parts = [batch]
    if size.tokens > T:
        filler_starts = [start - T for start in starts[len(batch.starts) - 1 :]]
        parts.append(Batch.of(batch.tokens_T.new_zeros(size.tokens - T), filler_starts))
    labels_T = torch.cat([part.labels_T for part in parts])
    offsets_S = torch.full((size.documents + 1,), size.tokens, dtype=torch.int32)
    offsets_S[: len(starts)] = torch.tensor(starts)
    order_T = torch.argsort((labels_T == IGNORE).to(torch.uint8), stable=True)
    return replace(
        batch,
        tokens_T=torch.cat([part.tokens_T for part in parts]),
        labels_T=labels_T,
        positions_T=torch.cat([part.positions_T for part in parts]),
        documents=Documents(starts).among(offsets_S, size.longest),
        rows_K=order_T[: size.labels],
    )


class Places:
    """Where batches of one size are put on a device: always the same addresses. One copy per batch, nothing waits."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self._device = size, device
        sizes = (size.tokens, size.tokens, size.tokens, size.labels, size.documents + 1)
        self._all = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._tokens_T, self._labels_T, self._positions_T, self._rows_K, self._starts_S = self._all.split(sizes)

    def put(self, filled: Batch) -> None:
        """Copy a batch of this size here."""
        assert filled.rows_K is not None
        parts = (filled.tokens_T, filled.labels_T, filled.positions_T, filled.rows_K, filled.documents.starts_S.long())
        together = torch.cat(parts)
        if self._device.type == "cuda":
            together = together.pin_memory()  # from other memory a copy would wait for what is running
        self._all.copy_(together, non_blocking=True)

    def batch(self, documents: Documents | None = None) -> Batch:
        """The batch that is here. `documents`: those of the one that was put, where a pass is to know more of them than
        their offsets; a pass that will be replayed must not."""
        starts_S, size = self._starts_S.to(torch.int32), self.size
        blind = OffsetsAlone(starts_S, size.tokens, size.longest)
        seen = blind if documents is None else documents.among(starts_S, size.longest)
        return Batch(self._tokens_T, self._labels_T, self._positions_T, seen, size.labels, rows_K=self._rows_K)


def _up(number: int, step: int) -> int:
    """To the next multiple of `step`."""
    return -(-number // step) * step
