"""Documents that go on where others end: which rows a row sees, when examples share their beginning.

Three examples, two of which begin alike, and all three with a word less in common:

    document    0: s s s   1: p p   2: a a   3: b   4: c c c        parents   -, 0, 1, 1, 0
    examples    2: s s s p p a a       3: s s s p p b       4: s s s c c c

A document may have a parent, an earlier one of whose tokens it is the continuation: its positions go on from the
parent's last, and its rows see all rows of the parent, of the parent's parent and so on, and their own up to
themselves. Documents without children are the examples; one with children is a prefix, computed once for all examples
below it, and no example itself. More than one level costs attention nothing (each ancestor is one more part of the
softmax, shared.py), and preferences want two: a system prompt that all share, and a prompt that a pair shares.

They are laid out in the order in which one walks the tree, so that all who continue a document lie right behind it:
the rows that see a prefix are one slice, and no row is gathered to find them.

Letters: J rows of all documents, each with its ancestors' before them; S documents + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

NO_PARENT = -1  # the parent of a document that has none


@dataclass(frozen=True, eq=False)
class Tree:
    """By document: its parent, where its positions begin (`offsets`), and the row where all that continues it ends
    (`ends`). `examples`: the numbers of the documents without children, in order; `chains`: the documents of each
    example, the first ancestor first."""

    starts: list[int]
    parents: tuple[int, ...]
    offsets: tuple[int, ...]
    ends: tuple[int, ...]
    examples: tuple[int, ...]
    chains: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(starts: list[int], parents: Sequence[int]) -> "Tree | None":
        """The tree of documents that begin at `starts`; None where none has a parent. Raises ValueError where they
        aren't laid out in the order of a walk."""
        if not any(parent != NO_PARENT for parent in parents):
            return None
        if len(parents) != len(starts) - 1:
            raise ValueError(f"{len(starts) - 1} documents and {len(parents)} parents")
        offsets, ends, chains = [0] * len(parents), list(starts[1:]), list[tuple[int, ...]]()
        open_: tuple[int, ...] = ()  # the last document and its ancestors
        for number, parent in enumerate(parents):
            if parent != NO_PARENT:
                if parent not in open_:
                    raise ValueError(f"document {number} isn't laid out behind its parent, {parent}")
                offsets[number] = offsets[parent] + starts[parent + 1] - starts[parent]
            open_ = (*open_[: open_.index(parent) + 1], number) if parent != NO_PARENT else (number,)
            chains.append(open_)
            for ancestor in open_:
                ends[ancestor] = starts[number + 1]
        examples = tuple(sorted(set(range(len(parents))) - set(parents)))
        return Tree(
            starts, tuple(parents), tuple(offsets), tuple(ends), examples, tuple(chains[number] for number in examples)
        )

    @property
    def reach(self) -> int:
        """Tokens of the longest example."""
        spans = zip(self.offsets, pairwise(self.starts), strict=True)
        return max(offset + end - start for offset, (start, end) in spans)

    @property
    def prefixes(self) -> list[int]:
        """The documents that others continue."""
        return sorted(set(self.parents) - {NO_PARENT})

    @property
    def counts(self) -> list[int]:
        """How many examples each document belongs to."""
        counts = [0] * len(self.parents)
        for chain in self.chains:
            for number in chain:
                counts[number] += 1
        return counts

    def whole(self, number: int) -> list[tuple[int, int]]:
        """(start, end) of an example's rows, its ancestors' first. `number`: its place among the examples."""
        return [(self.starts[one], self.starts[one + 1]) for one in self.chains[number]]

    def positions(self, device: torch.device | str) -> Tensor:
        """[T]: how far each row is from the beginning of its example."""
        begins = torch.tensor(self.starts[:-1]) - torch.tensor(self.offsets)
        rows_T = torch.arange(self.starts[-1]) - begins.repeat_interleave(torch.tensor(self.starts).diff())
        return rows_T.to(device)

    def keys(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(row_J, offsets int32 [S]): the rows that each document's last row sees, one document after the other."""
        spans = [(begin, end) for begin, end in pairwise(self.starts)]
        rows, sizes = [], [0]
        for number in range(len(self.parents)):
            chain = [number]
            while self.parents[chain[0]] != NO_PARENT:
                chain.insert(0, self.parents[chain[0]])
            rows += [torch.arange(*spans[one]) for one in chain]
            sizes.append(self.offsets[number] + spans[number][1] - spans[number][0])
        offsets_S = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return torch.cat(rows).to(device), offsets_S.to(device)
