"""The embedding and the head of a model with updates on them: `AdaptedEmbedding` and `AdaptedHead`.

Both are adapted layers (layer.py): the base's module stays the object that it is, updates have numbers, and a pass says
which of its rows take which. An embedding is given numbers of words; a head may be given only some rows of a pass
(`Pass.kept`), and in training it isn't called at all: the fused head and loss (base/head.py) asks it for what its
updates change, row by row (`changes`).

Letters: T rows, V words, D hidden size.
"""

import torch
from torch import Tensor

from deltaw.adapter.layer import AdaptedLinear
from deltaw.adapter.layer_update import LayerUpdate
from deltaw.base.frozen import FrozenEmbedding, FrozenLinear, Stored
from deltaw.kernels.changed_head import HeadChange
from deltaw.kernels.segments import Segments


class AdaptedVocabulary(AdaptedLinear):
    """What the two have in common. `base`: its face."""

    @property
    def height(self) -> int:
        """The words that it knows: the base's, and those that updates add."""
        heights = [update.height for update in self.updates.values() if isinstance(update, LayerUpdate)]
        return max(heights, default=self.base.out_features)

    @property
    def stored(self) -> Stored:
        """How its weight is stored, of all words that it knows."""
        own = self.base.stored
        return Stored(own.dtype, own.device, torch.Size((self.height, own.shape[1])))

    @property
    def for_kernels(self) -> bool:
        return False


class AdaptedEmbedding(AdaptedVocabulary):
    """An embedding of tokens."""

    base: FrozenEmbedding  # type: ignore[assignment]

    @property
    def embedding_dim(self) -> int:
        """D, which a model may ask for."""
        return self.base.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D]."""
        segments = self.passing.current.segments
        if segments is None:
            return self._looked_up(self.carried.first, ids)
        taken, flat_T = self._taken(segments), ids.reshape(-1)
        if not taken and self.height == self.base.out_features:
            return self.base(ids)
        parts, at = [], 0
        for number, start, end in (*segments, (None, ids.numel(), ids.numel())):
            parts += [self.base(flat_T[at:start])] if start > at else []
            parts += [self._looked_up(number, flat_T[start:end])] if end > start and number is not None else []
            at = end
        return torch.cat(parts).view(*ids.shape, -1)

    def _looked_up(self, number: int, ids: Tensor) -> Tensor:
        update = self.update(number)
        return self.base(ids) if update is None else update.looked_up(self.base, ids)


class AdaptedHead(AdaptedVocabulary):
    """An output head."""

    base: FrozenLinear

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        this = self.passing.current
        flat_TD = x.reshape(-1, x.shape[-1])
        z_TV = self.logits(flat_TD, this.segments if this.kept is None else this.kept)
        return z_TV.view(*x.shape[:-1], -1)

    def logits(self, x_TD: Tensor, segments: Segments | None) -> Tensor:
        """[T, V] of rows that take their updates as `segments` say."""
        parts = []
        for change, rows in self.changes(segments, len(x_TD)):
            part_TD = x_TD[rows]
            parts.append(
                self.base(part_TD) if change is None else change.apply(part_TD, self.base.weight, self.base.bias_M)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def changes(self, segments: Segments | None, rows: int) -> list[tuple[HeadChange | None, slice]]:
        """What the updates of consecutive rows change, and of which rows; all of them together are `rows`."""
        if segments is None:
            return [(self._change(self.carried.first), slice(0, rows))]
        self.carried.check({segment.update for segment in segments})
        parts: list[tuple[HeadChange | None, slice]] = []
        at = 0
        for number, start, end in (*segments, (None, rows, rows)):
            if not at <= start <= end <= rows:
                raise ValueError(f"a segment of the rows {start} to {end} after row {at}, of {rows}")
            parts += [(None, slice(at, start))] if start > at else []
            parts += [(self._change(number), slice(start, end))] if end > start and number is not None else []
            at = end
        return parts or [(None, slice(0, rows))]

    def _change(self, number: int) -> HeadChange | None:
        update = self.update(number)
        return None if update is None else update.on_head(self.base)
