"""An embedding or a head that trains whole: a float32 matrix in the place of the base's, which is kept.

    embedding    row of W'        head    z = h W'ᵀ

It is the weight itself and not what it differs by, as in PEFT's `modules_to_save` and in the file. It costs the matrix
once more in float32, as much again for its gradient and twice for its moments; `adapter.tokens` costs next to nothing
where a few words are all that is new. On a base whose head is its embedding each of the two that is named gets a matrix
of its own, and one that isn't named stays the base's: as PEFT has it.

Letters: V words, D hidden size.
"""

import torch
from torch import Tensor, nn

from deltaw.adapter.layer import LoRAUpdate
from deltaw.adapter.layer_update import EndUpdate
from deltaw.base.frozen import FrozenEmbedding, FrozenLinear
from deltaw.kernels.changed_head import FactorsChange, HeadChange, WholeChange
from deltaw.replaced import Whole


class WholeUpdate(EndUpdate):
    """`weight` [V, D] trains, float32; the base's own numbers at first."""

    def __init__(self, base: FrozenLinear | FrozenEmbedding) -> None:
        super().__init__(base)
        self.weight = nn.Parameter(base.weight.dense().detach().float().clone())

    def looked_up(self, base: FrozenEmbedding, ids: Tensor) -> Tensor:
        return base.of(self.weight, ids) if self.enabled else base(ids)

    def on_head(self, base: FrozenLinear) -> HeadChange | None:
        return WholeChange(self.weight) if self.enabled else None

    def trained(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    def factors(self) -> Whole:
        return Whole(self.weight.detach().clone())

    @torch.no_grad()
    def set_factors(self, update: Whole) -> None:
        """Take an update's matrix. Raises ValueError when it is of another kind or shape."""
        if not isinstance(update, Whole) or update.shape != tuple(self.weight.shape):
            raise ValueError(
                f"a {type(update).__name__} of {update.shape} doesn't fit a weight of {tuple(self.weight.shape)}"
            )
        self.weight.copy_(update.weight_VD)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        return self.base.with_weight(self.weight.detach())

    def extra_repr(self) -> str:
        return "whole"


class EndLoRA(LoRAUpdate):
    """LoRA on an embedding or a head: W [V, D] has B [V, R] and A [R, D] like any other weight, and a token's row is
    E[v] + scale · B[v] A. The file names them otherwise for an embedding (peft_tensors.py)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.looked_up(self.base, x) if isinstance(self.base, FrozenEmbedding) else super().forward(x)

    def looked_up(self, base: FrozenEmbedding, ids: Tensor) -> Tensor:
        y = base(ids)
        if not self.enabled:
            return y
        low = base.of(self.lora_b, ids)  # what the module does with a row is linear in it
        return y + self.scale * (low @ self.lora_a.to(low.dtype))

    def on_head(self, base: FrozenLinear) -> HeadChange | None:
        factors = self.kernel_factors() if self.enabled else None
        return None if factors is None else FactorsChange(factors)
