"""What trains of a few tokens: their rows of the embedding and of the head, float32, and nothing of all the others.

    embedding    E'[v] = row of v where v is one of them, else E[v]
    head         z'[v] = row of v · h, else z[v]

A base whose head is its embedding (tied) has one row for both, so one update stands in both places and its gradient is
the sum of the two. On any other base there are two updates: a token that was never in an answer has to be written as
well as read. Rows are new numbers, not differences (replaced.py), and fresh ones are the base's own, to the bit.

A token that the base doesn't have (its number is beyond the last row) begins at the mean of the rows of the pieces that
the base's tokenizer cut its text into: "<tool>" begins as what "<", "tool", ">" are together, which the model knows how
to read, and is of their size. Without pieces it is the mean of all rows. That is what "the base" is for such a token:
with the update switched off it is read and weighed by these rows, so that a reference and a comparison have an answer.
The mean of all rows for every one of them was rejected: tokens that begin equal learn apart slowly.

Nothing of the vocabulary's size is made: the lookup is by search in the K sorted numbers, and the head's gradient has K
columns (kernels/changed_head.py).

Letters: K trained rows, V words, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltaw.adapter.layer_update import EndUpdate
from deltaw.base.frozen import FrozenEmbedding, FrozenLinear
from deltaw.data.added import Token
from deltaw.errors import InputError
from deltaw.kernels.changed_head import HeadChange, RowsChange
from deltaw.kernels.weight import Weight
from deltaw.replaced import Rows


class RowsUpdate(EndUpdate):
    """`rows` [K, D] trains, float32."""

    index_K: Tensor
    sorted_K: Tensor
    order_K: Tensor
    fresh_KD: Tensor

    def __init__(self, base: FrozenLinear | FrozenEmbedding, tokens: Sequence[Token]) -> None:
        super().__init__(base)
        device = base.weight.device
        index_K = torch.tensor([token.id for token in tokens])
        sorted_K, order_K = index_K.sort()
        fresh_KD = fresh_rows(base.weight, tokens)
        named = {"index_K": index_K, "sorted_K": sorted_K, "order_K": order_K, "fresh_KD": fresh_KD}
        for name, tensor in named.items():
            self.register_buffer(name, tensor.to(device), persistent=False)
        self.rows = nn.Parameter(self.fresh_KD.clone())
        self.more = max(0, int(sorted_K[-1]) + 1 - base.out_features)

    @property
    def height(self) -> int:
        return self.base.out_features + self.more

    @property
    def acting(self) -> Tensor | None:
        """The rows that stand in now; None where the base has all of them itself."""
        return self.rows if self.enabled else self.fresh_KD if self.more else None

    def looked_up(self, base: FrozenEmbedding, ids: Tensor) -> Tensor:
        rows_KD = self.acting
        if rows_KD is None:
            return base(ids)
        near = torch.searchsorted(self.sorted_K, ids).clamp(max=len(self.sorted_K) - 1)
        own = (self.sorted_K[near] == ids).unsqueeze(-1)
        known = base(ids.clamp(max=base.out_features - 1) if self.more else ids)
        return torch.where(own, base.of(rows_KD, self.order_K[near]), known)

    def on_head(self, base: FrozenLinear) -> HeadChange | None:
        rows_KD = self.acting
        return None if rows_KD is None else RowsChange(self.index_K, rows_KD, self.more)

    def trained(self) -> dict[str, nn.Parameter]:
        return {"rows": self.rows}

    def factors(self) -> Rows:
        return Rows(self.index_K.clone(), self.rows.detach().clone())

    @torch.no_grad()
    def set_factors(self, update: Rows) -> None:
        """Take an update's rows. Raises ValueError when it is of another kind, or of other rows."""
        if not isinstance(update, Rows) or update.index_K.tolist() != self.index_K.tolist():
            raise ValueError(f"a {type(update).__name__} update isn't of the rows {self.index_K.tolist()[:10]}")
        self.rows.copy_(update.rows_KD)

    def fuse(self) -> nn.Module:
        return self.fused_onto(self.base)

    @torch.no_grad()
    def fused_onto(self, base: FrozenLinear | FrozenEmbedding) -> nn.Module:
        if self.more:
            raise InputError(
                "an adapter that adds tokens to the base's vocabulary can't be merged into a loaded model",
                fix="merge the files: deltaw merge",
            )
        return base.with_weight(base.weight.dense().float().index_copy(0, self.index_K, self.rows))

    def extra_repr(self) -> str:
        return f"rows={len(self.index_K)}"


@torch.no_grad()
def fresh_rows(weight: Weight, tokens: Sequence[Token]) -> Tensor:
    """Where rows begin [K, D], float32: at the base's own, or at the mean of those of the text's pieces."""
    device, everything = weight.device, None
    rows: list[Tensor] = []
    for token in tokens:
        if token.id < weight.shape[0] and not token.pieces:
            rows.append(weight.rows(torch.tensor([token.id], device=device))[0].float())
            continue
        pieces = [piece for piece in token.pieces if piece < weight.shape[0]]
        if not pieces:
            everything = weight.dense().float().mean(0) if everything is None else everything
            rows.append(everything)
            continue
        rows.append(weight.rows(torch.tensor(pieces, device=device)).float().mean(0))
    return torch.stack(rows)
