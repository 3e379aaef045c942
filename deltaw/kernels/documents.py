"""How documents lie in a batch, and how attention gathers them: `Documents`, built once per batch.

Documents of like length are gathered into groups of D documents by L positions; attention.py says what for. `Documents`
also carries what a GPU's attention wants, the offsets, and which document continues which (tree.py).

Letters: T tokens, D documents of a group, L its length, C queries of a chunk, S documents of the batch + 1, P gathered
places.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.tree import NO_PARENT, Tree

CHUNK = 64  # queries at a time
FILL = 1.25  # a document joins a group whose length is at most this times its own


@dataclass(frozen=True)
class Group:
    """D documents of up to L tokens; its rows start at `offset` in the gathered order."""

    docs: int
    length: int
    offset: int

    def rows(self, x: Tensor, heads: int, kv_heads: int, part: slice) -> Tensor:
        """[D · K, heads / K · C, E]: C positions of all documents, which lie together in a gathered tensor. A view."""
        first = (self.offset + self.docs * part.start) * heads
        count = self.docs * heads * (part.stop - part.start)
        return x[first : first + count].view(self.docs * kv_heads, -1, x.shape[-1])

    def whole(self, x: Tensor, heads: int) -> Tensor:
        """[D · heads, L, E] of a tensor gathered in one piece."""
        return self.rows(x, heads, heads, slice(0, self.length))

    def part(self, x_P: Tensor) -> Tensor:
        """Its [D, L] part of a tensor over all gathered places."""
        return x_P[self.offset : self.offset + self.docs * self.length].view(self.docs, self.length)


class _Grouping(NamedTuple):
    """Groups of documents, and by gathered place: the token there, and whether it is real."""

    groups: list[Group]
    token_P: Tensor
    real_P: Tensor

    @staticmethod
    def of(starts: list[int]) -> "_Grouping":
        lengths = [end - start for start, end in pairwise(starts)]
        groups: list[Group] = []
        rows: list[Tensor] = []
        real: list[Tensor] = []
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        offset = 0
        while order:
            longest = lengths[order[0]]
            members = [i for i in order if lengths[i] * FILL >= longest]
            order = order[len(members) :]
            first_D = torch.tensor([starts[i] for i in members])
            length_D = torch.tensor([lengths[i] for i in members])
            step_L = torch.arange(longest)
            real_DL = step_L < length_D[:, None]
            rows.append(torch.where(real_DL, first_D[:, None] + step_L, first_D[:, None]).flatten())
            real.append(real_DL.flatten())
            groups.append(Group(len(members), longest, offset))
            offset += len(members) * longest
        return _Grouping(groups, torch.cat(rows), torch.cat(real))


@dataclass(frozen=True)
class Layout:
    """Row indices from [T · heads] to the gathered order and back, and the gathered rows that are filler."""

    gather: Tensor
    scatter: Tensor
    filler: Tensor


class Documents:
    """Where each document lies and how they are grouped: built once per batch, used by every layer.

    `starts` are the documents' offsets with the total length as the last entry. Raises ValueError for an empty one.
    `parents`: by document, the earlier one that it continues, or -1; empty where none does. `tree` then says what
    follows from that (tree.py); it is None where no document has a parent.
    How they are grouped is worked out when it is first asked for: a GPU's attention doesn't ask.
    """

    def __init__(self, starts: list[int], device: torch.device | str = "cpu", parents: Sequence[int] = ()) -> None:
        lengths = [end - start for start, end in pairwise(starts)]
        if not lengths or min(lengths) < 1:
            raise ValueError("documents must have at least one token each")
        self.tree, self.parents = Tree.of(starts, parents), tuple(parents) or (NO_PARENT,) * len(lengths)
        self.starts, self.total, self.longest, self.device = starts, starts[-1], max(lengths), device
        self.starts_S = torch.tensor(starts, dtype=torch.int32, device=device)
        self._grouping: _Grouping | None = None
        self._layouts: dict[tuple[int, bool, int], Layout] = {}
        self._seen: tuple[Tensor, Tensor] | None = None

    def among(self, starts_S: Tensor, longest: int) -> "Documents":
        """These documents, for a pass in which attention reads the offsets from `starts_S` (empty ones may follow) and
        is told of `longest` tokens at most."""
        there = copy.copy(self)
        there.starts_S, there.longest, there.device = starts_S, longest, starts_S.device
        there._layouts = {}
        return there

    def to(self, device: torch.device | str) -> "Documents":
        """The same on `device`: itself where it is there."""
        if torch.device(device) == torch.device(self.device):
            return self
        moved = copy.copy(self)
        moved.device, moved._layouts = device, {}
        moved.starts_S = self.starts_S.to(device, non_blocking=True)
        moved._seen = None
        return moved

    @property
    def seen(self) -> tuple[Tensor, Tensor]:
        """(row_J, offsets int32 [S]): the rows that each document sees, its ancestors' and its own, one document after
        the other. Of documents of which some continue others."""
        if self._seen is None:
            assert self.tree is not None
            self._seen = self.tree.keys(self.device)
        return self._seen

    @property
    def groups(self) -> list[Group]:
        """Documents of like length, the longest first."""
        return self._grouped().groups

    def _grouped(self) -> "_Grouping":
        if self._grouping is None:
            self._grouping = _Grouping.of(self.starts)
        return self._grouping

    def layout(self, heads: int, *, in_chunks: bool = False, kv_heads: int = 1) -> Layout:
        """Where the rows of [T, heads] go, or those of [kv_heads, T, heads / kv_heads]. `in_chunks`: the documents of a
        group advance together, chunk by chunk."""
        key = heads, in_chunks, kv_heads
        if key not in self._layouts:
            shared, head = heads // kv_heads, torch.arange(heads, device=self.device)
            of_head = head // shared * self.total * shared + head % shared
            gather, filler = [], []
            token_P, real_P = (x.to(self.device, non_blocking=True) for x in self._grouped()[1:])
            for group in self.groups:
                token_DL, real_DL = group.part(token_P), group.part(real_P)
                step = CHUNK if in_chunks else group.length
                for token_DC, real_DC in zip(token_DL.split(step, 1), real_DL.split(step, 1), strict=True):
                    gather.append((token_DC[:, None] * shared + of_head[:, None]).flatten())
                    filler.append(~real_DC[:, None].expand(-1, heads, -1).flatten())
            places, is_filler = torch.cat(gather), torch.cat(filler)
            scatter = torch.empty(self.total * heads, dtype=torch.long, device=self.device)
            scatter[places[~is_filler]] = (~is_filler).nonzero().squeeze(1)
            self._layouts[key] = Layout(places, scatter, is_filler.nonzero().squeeze(1))
        return self._layouts[key]


class OffsetsAlone(Documents):
    """Documents of which only a tensor knows where they lie: those of a captured pass, which will be run on others.

    Attention that reads the offsets from `starts_S` can do with them; whatever asks for more is refused, since it would
    be captured with one batch's answer.
    """

    def __init__(self, starts_S: Tensor, total: int, longest: int) -> None:
        self.starts_S, self.total, self.longest, self.device = starts_S, total, longest, starts_S.device
        self.tree, self._layouts = None, {}

    @property
    def starts(self) -> list[int]:  # type: ignore[override]
        """Nobody on the host knows them."""
        raise NotImplementedError("where a batch's documents lie is asked within a pass")

    def _grouped(self) -> "_Grouping":
        raise NotImplementedError("its attention arranges the documents of each batch in another way")
