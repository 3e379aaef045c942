"""What a model is given: `Batch`, documents laid end to end.

Three documents of 3, 2 and 4 tokens:

    tokens_T      a0 a1 a2 b0 b1 c0 c1 c2 c3
    labels_T      a1 a2  .  b1  . c1 c2 c3  .      . is IGNORE; so is every label whose token isn't trained
    positions_T    0  1  2  0  1  0  1  2  3
    starts         0        3     5           9    offset of each document, and T (`cu_seqlens` elsewhere)

Labels are already shifted: the model's output at t is compared with labels_T[t]. Shifting where the documents are still
known is what keeps a label from crossing into the next one.

A document may go on where an earlier one ends (kernels/tree.py): then examples that begin alike share their beginning,
which is computed once. Whoever looks at a batch by what it was made of goes by example, not by document: `origins`,
`updates`, `weights`, `by_document` have one entry per document without children, in order, and an example's tokens and
labels are its ancestors' too. So a label within a prefix counts once for each example that it belongs to, in
`supervised`, in `by_document` and in every sum made of that; its gradient is the sum of theirs. Examples of different
updates share nothing.

How the documents are grouped for attention (`Documents`) and how many labels count are worked out once, by whoever
packs them, and travels with the batch: a forward neither repeats it nor waits for the device to be told.

Letters: T tokens, S documents + 1.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deltaw.base.parts import PLAIN
from deltaw.kernels.documents import Documents
from deltaw.kernels.logprobs import IGNORE
from deltaw.kernels.segments import NOBODY, Segment, Segments
from deltaw.kernels.tree import NO_PARENT


@dataclass(frozen=True, eq=False)
class Retained:
    """The rows of a batch whose predictions are to stay the base's. By piece of the text that is retained: `spans`, its
    rows (first, end); `pieces`, which one it is (training/retain.py); `owners`, the update that it holds (empty: the
    first one). `base_RX`: what the base has in their place, as `Forward.rows` gives it; None until somebody asks it."""

    spans: tuple[tuple[int, int], ...]
    pieces: tuple[int, ...]
    owners: tuple[int, ...] = ()
    base_RX: Tensor | None = None

    @property
    def rows(self) -> list[int]:
        """Of all pieces, in order."""
        return [row for start, end in self.spans for row in range(start, end)]

    def lengths(self, update: int) -> list[int]:
        """The rows of each piece that holds `update`; 0 for those of others."""
        owners = self.owners or (update,) * len(self.spans)
        return [(end - start) * (owner == update) for owner, (start, end) in zip(owners, self.spans, strict=True)]

    @staticmethod
    def joined(batches: "Sequence[Batch]") -> "Retained | None":
        """Of batches that are laid end to end; None where none has any. The base is to be asked again."""
        spans, pieces, owners, first = list[tuple[int, int]](), list[int](), list[int](), 0
        for batch in batches:
            if batch.retained:
                spans += [(first + start, first + end) for start, end in batch.retained.spans]
                pieces += batch.retained.pieces
                owners += batch.retained.owners
            first += len(batch.tokens_T)
        return Retained(tuple(spans), tuple(pieces), tuple(owners)) if spans else None


@dataclass(frozen=True, eq=False)
class Rewarded:
    """What is known of a batch's labels [K], in the order of their rows, where these are of answers that were sampled:
    their log-probabilities then, the advantage of the answer that each is of, and the reference's log-probabilities
    where they are asked for. `count`: of how many tokens of the step this batch's loss is a part; `why`, `fix`: why
    nothing can be learnt from the whole step, where that is so, and what to do."""

    sampled_K: Tensor
    advantage_K: Tensor
    count: int
    reference_K: Tensor | None = None
    why: str = ""
    fix: str = ""

    def to(self, device: torch.device | str) -> "Rewarded":
        """The same on `device`."""
        names = ("sampled_K", "advantage_K", "reference_K")
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents laid end to end, int64: tokens_T, labels_T, positions_T (T,). Made by `Batch.of`.

    `supervised`: how many labels count; sums over batches divide by the sum of these, once. By example: `origins`, the
    row it was; `updates`, which of a layer's updates it takes (empty: all the first; `NOBODY`: none, the base alone);
    `weights`, what it counts in the loss (empty: all 1); `parts`, what it is to an objective (parts.py; empty: all
    PLAIN); `references`, its labels' summed log-probability under the reference (empty: not known). `beside`: further
    documents, which an objective asks for a step's anchor, without gradient. `rows_K`: the rows that the head is asked
    for, where it isn't to look for labels (filled.py). `retained`: rows that are held to the base; none has a label.
    `rewarded`: of answers that were sampled.
    """

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    documents: Documents
    supervised: int
    origins: tuple[str, ...] = ()
    updates: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    parts: tuple[int, ...] = ()
    references: tuple[float, ...] = ()
    beside: "Batch | None" = None
    rows_K: Tensor | None = None
    retained: Retained | None = None
    rewarded: Rewarded | None = None

    @staticmethod
    def of(
        tokens_T: Tensor,
        starts: Sequence[int],
        labels_T: Tensor | None = None,
        *,
        parents: Sequence[int] = (),
        origins: tuple[str, ...] = (),
        updates: Sequence[int] = (),
        weights: Sequence[float] = (),
        parts: Sequence[int] = (),
        references: Sequence[float] = (),
        beside: "Batch | None" = None,
    ) -> "Batch":
        """A batch of the documents that begin at `starts`, whose last entry is T; without labels none counts.

        `parents`: by document, the one that it continues, or -1. Raises ValueError for an empty document, parents out
        of order (tree.py), or examples of one prefix that take different updates.
        """
        device = tokens_T.device
        documents = Documents(list(starts), device, parents)
        if documents.tree is not None:
            positions_T = documents.tree.positions(device)
        else:
            start_S = torch.tensor(documents.starts, device=device)
            positions_T = torch.arange(len(tokens_T), device=device) - start_S[:-1].repeat_interleave(start_S.diff())
        labels_T = torch.full_like(tokens_T, IGNORE) if labels_T is None else labels_T
        batch = Batch(
            tokens_T,
            labels_T,
            positions_T,
            documents,
            _count(labels_T, documents),
            origins,
            tuple(updates),
            tuple(weights),
            tuple(parts),
            tuple(references),
            beside,
        )
        batch._owners()
        return batch

    @staticmethod
    def joined(batches: Sequence["Batch"]) -> "Batch":
        """Their documents, one batch's behind the other's, and those beside them likewise; all say whose they are.
        Raises ValueError for answers that were sampled."""
        if any(batch.rewarded for batch in batches):
            raise ValueError("batches of sampled answers aren't joined")
        beside = [batch.beside for batch in batches if batch.beside]
        starts, parents = [0], list[int]()
        for batch in batches:
            tree, first = batch.documents.tree, len(starts) - 1
            own = tree.parents if tree else (NO_PARENT,) * (len(batch.starts) - 1)
            parents += [parent if parent == NO_PARENT else first + parent for parent in own]
            starts += [starts[-1] + end for end in batch.starts[1:]]

        def of_all(name: str, missing: Any) -> list[Any]:
            """By example; nothing, where no batch has it."""
            values = [getattr(batch, name) or (missing,) * batch.examples for batch in batches]
            return [each for one in values for each in one] if any(getattr(one, name) for one in batches) else []

        joined = Batch.of(
            torch.cat([batch.tokens_T for batch in batches]),
            starts,
            torch.cat([batch.labels_T for batch in batches]),
            parents=parents if any(parent != NO_PARENT for parent in parents) else (),
            origins=tuple(of_all("origins", "")),
            updates=of_all("updates", 0),
            weights=of_all("weights", 1.0),
            parts=of_all("parts", PLAIN),
            references=of_all("references", 0.0),
            beside=Batch.joined(beside) if beside else None,
        )
        return replace(joined, retained=Retained.joined(batches))

    def owned(self, update: int) -> "Batch":
        """The batch, all of whose examples take this update, but those that are `NOBODY`'s."""
        taken = self.updates or (update,) * self.examples
        updates = tuple(NOBODY if one == NOBODY else update for one in taken)
        retained = self.retained and replace(self.retained, owners=(update,) * len(self.retained.spans))
        return replace(self, updates=updates, beside=self.beside and self.beside.owned(update), retained=retained)

    @property
    def starts(self) -> list[int]:
        """The offset of each document, and T."""
        return self.documents.starts

    @property
    def teaches(self) -> bool:
        """Whether there is something to learn from."""
        return bool(self.supervised or self.retained)

    @property
    def examples(self) -> int:
        """How many there are: the documents, without those that others continue."""
        tree = self.documents.tree
        return len(tree.examples) if tree else len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """Those of all examples, whole; `len(tokens_T)` are computed."""
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """The tokens of each example, its prefix included."""
        tree = self.documents.tree
        if tree is None:
            return [end - start for start, end in itertools.pairwise(self.starts)]
        return [sum(end - start for start, end in tree.whole(number)) for number in range(self.examples)]

    def retained_rows(self, update: int) -> int:
        """How many rows hold `update` to the base."""
        return 0 if self.retained is None else sum(self.retained.lengths(update))

    def rows_of(self, example: int) -> list[int]:
        """The rows of all tokens of an example, in order."""
        tree = self.documents.tree
        spans = tree.whole(example) if tree else [(self.starts[example], self.starts[example + 1])]
        return [row for start, end in spans for row in range(start, end)]

    def segments(self) -> Segments | None:
        """The rows of each update; None where all take the first."""
        return segments_of(self._owners(), self.starts) if self.updates else None

    def _owners(self) -> Sequence[int]:
        """The update that each document takes."""
        tree = self.documents.tree
        if tree is None or not self.updates:
            return self.updates
        owners: dict[int, int] = {}
        for chain, update in zip(tree.chains, self.updates, strict=True):
            for number in chain:
                if owners.setdefault(number, update) != update:
                    raise ValueError("examples that share a prefix take different updates")
        return [owners[number] for number in range(len(tree.parents))]

    def by_document(self, values_K: Tensor) -> Tensor:
        """[examples, ...]: what belongs to each label [K, ...], in the order of their rows, summed by example."""
        row_K = (self.labels_T != IGNORE).nonzero().squeeze(1)
        document_K = torch.bucketize(row_K, self.documents.starts_S[1:].long(), right=True)
        sums = values_K.new_zeros(len(self.starts) - 1, *values_K.shape[1:]).index_add(0, document_K, values_K)
        tree = self.documents.tree
        if tree is None:
            return sums
        pairs = [(example, number) for example, chain in enumerate(tree.chains) for number in chain]
        example_J, document_J = torch.tensor(pairs, device=sums.device).unbind(1)
        whole = sums.new_zeros(self.examples, *sums.shape[1:])
        return whole.index_add(0, example_J, sums.index_select(0, document_J))

    def tokens_of(self, update: int) -> int:
        """How many tokens the examples of `update` have, but for those that are only held to the base."""
        owners = self.updates or (update,) * self.examples
        every = sum(length for length, owner in zip(self.lengths, owners, strict=True) if owner == update)
        return every - self.retained_rows(update)

    def labelled_for(self, update: int) -> "Batch":
        """The batch with the labels, the parts and the origins of `update`'s documents alone."""
        if not self.updates:
            return self
        labels_T = self.labels_T.clone()
        for owner, (start, end) in zip(self._owners(), itertools.pairwise(self.starts), strict=True):
            if owner != update:
                labels_T[start:end] = IGNORE
        origins = tuple(o for o, owner in zip(self.origins, self.updates, strict=True) if owner == update)
        parts = tuple(
            part if owner == update else PLAIN
            for part, owner in zip(self.parts, self.updates if self.parts else (), strict=True)
        )
        beside = self.beside if update in self.updates else None
        return replace(self.relabelled(labels_T), origins=origins, parts=parts, beside=beside)

    def unshared(self) -> "Batch":
        """The same examples, each with tokens and labels of its own: what a model that isn't packed is given."""
        if self.documents.tree is None:
            return self
        rows = [self.rows_of(number) for number in range(self.examples)]
        row_J = torch.tensor([row for one in rows for row in one], device=self.tokens_T.device)
        starts = [0, *itertools.accumulate(map(len, rows))]
        names = ("origins", "updates", "weights", "parts", "references", "beside")
        one = Batch.of(
            self.tokens_T[row_J], starts, self.labels_T[row_J], **{name: getattr(self, name) for name in names}
        )
        place = {row: at for at, row in enumerate(row_J.tolist())}  # a piece shares nothing: each row is there once
        spans = tuple((place[start], place[end - 1] + 1) for start, end in self.retained.spans) if self.retained else ()
        retained = self.retained and replace(self.retained, spans=spans)
        return replace(one, retained=retained, rewarded=self.rewarded)

    def relabelled(self, labels_T: Tensor) -> "Batch":
        """The batch with other labels, counted."""
        return replace(self, labels_T=labels_T, supervised=_count(labels_T, self.documents), rows_K=None, rewarded=None)

    def followed_by(self, documents: "Batch") -> "Batch":
        """The batch and then the documents of another, which have no labels and share nothing; all take the first
        update."""
        count, tree = len(documents.starts) - 1, self.documents.tree
        starts = [*self.starts, *(len(self.tokens_T) + start for start in documents.starts[1:])]
        both = Batch.of(
            torch.cat([self.tokens_T, documents.tokens_T]),
            starts,
            torch.cat([self.labels_T, documents.labels_T]),
            parents=[*tree.parents, *[-1] * count] if tree else (),
            origins=self.origins + documents.origins,
            weights=(*self.weights, *[1.0] * count) if self.weights else (),
            parts=(*self.parts, *[PLAIN] * count) if self.parts else (),
            references=(*self.references, *[0.0] * count) if self.references else (),
            beside=self.beside,
        )
        return replace(both, rewarded=self.rewarded, retained=Retained.joined([self, documents]))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        tensors = {name: getattr(self, name).to(device) for name in ("tokens_T", "labels_T", "positions_T")}
        rows_K = None if self.rows_K is None else self.rows_K.to(device)
        beside, rewarded = self.beside and self.beside.to(device), self.rewarded and self.rewarded.to(device)
        moved = {"documents": self.documents.to(device), "rows_K": rows_K, "beside": beside, "rewarded": rewarded}
        return replace(self, **tensors, **moved)  # type: ignore[arg-type]


def _count(labels_T: Tensor, documents: Documents) -> int:
    """How many labels count, one of a prefix as often as examples share it."""
    counted_T, tree = labels_T != IGNORE, documents.tree
    if tree is None:
        return int(counted_T.sum())
    counts_T = torch.tensor(tree.counts).repeat_interleave(torch.tensor(tree.starts).diff())
    return int((counted_T.cpu() * counts_T).sum())


def segments_of(updates: Sequence[int], starts: Sequence[int]) -> Segments | None:
    """Segments of documents that begin at `starts` (and end where the next begins) and take `updates`; None where all
    take the first. Neighbours of one update are one segment, and `NOBODY`'s are in none."""
    if not updates:
        return None
    segments: list[Segment] = []
    for update, (start, end) in zip(updates, itertools.pairwise(starts), strict=True):
        if update == NOBODY:
            continue
        if segments and segments[-1].update == update and segments[-1].end == start:
            start = segments.pop().start
        segments.append(Segment(update, start, end))
    return tuple(segments)
