"""The output head, fused with the log-probabilities of the labels: the logits of a whole batch are never formed.

A head is taken to be the product with its weight, with the scale and the soft cap that the config names. Whether the
model does that is for the probe to say (probe.py), which asks for `logits`: made from the same weight as `logprobs`, so
that a head which does something else is found out, and left to the model.

What stands in the head's place may bring updates of it (`ChangesHead`): then it says of which rows the logits are
others, and how (kernels/changed_head.py).

Letters: T tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from deltaw.base.frozen import FrozenLinear, has_weight, weight_of, whole
from deltaw.errors import RunError
from deltaw.kernels.changed_head import HeadChange, changed_logprobs
from deltaw.kernels.divergence import linear_divergence
from deltaw.kernels.logprobs import Logprobs, capped, linear_logprobs
from deltaw.kernels.lora import Projection, lora_linears
from deltaw.kernels.segments import Segments


@runtime_checkable
class ChangesHead(Protocol):
    """What stands in a head's place and has updates of it."""

    base: FrozenLinear

    def changes(self, segments: Segments | None, rows: int) -> list[tuple[HeadChange | None, slice]]:
        """What is otherwise than in `base`, and of which rows: consecutive ones, all `rows` of them together."""


@dataclass(frozen=True)
class Head:
    """What turns hidden rows into logits: z = cap(scale · (W h + bias)), W and bias those of a model's linear module.

    `segments`: which rows take which update of it, as in a pass."""

    model: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def module(self) -> nn.Module:
        """The linear module itself."""
        return _plain(self.model.get_output_embeddings())  # type: ignore[operator]

    @property
    def bias_V(self) -> Tensor | None:
        return self.module.bias  # type: ignore[return-value]

    def logprobs(
        self,
        hidden_TD: Tensor,
        labels_T: Tensor,
        rows_K: Tensor | None = None,
        segments: Segments | None = None,
    ) -> Logprobs:
        """What it says of the labels that aren't IGNORE; `rows_K`: where to look for them."""
        parts = self._changes(len(hidden_TD), segments)
        with whole(self.module):  # a backward doesn't ask for the weight again
            if len(parts) == 1:
                return self._logprobs(parts[0][0], hidden_TD, labels_T, rows_K)
            some = [self._logprobs(change, hidden_TD[rows], labels_T[rows], None) for change, rows in parts]
        return Logprobs(torch.cat([part.logp_K for part in some]), torch.stack([part.loss for part in some]).sum())

    def _logprobs(
        self, change: HeadChange | None, hidden_TD: Tensor, labels_T: Tensor, rows_K: Tensor | None
    ) -> Logprobs:
        weight, options = weight_of(self.module), {**self._options, "rows_K": rows_K}
        if change is None:
            return linear_logprobs(hidden_TD, weight, labels_T, **options)
        return changed_logprobs(hidden_TD, weight, labels_T, change, **options)

    def logprobs_and_divergence(
        self, hidden_TD: Tensor, labels_T: Tensor, row_R: Tensor, base_RD: Tensor
    ) -> tuple[Logprobs, Tensor]:
        """The same, and KL(base ‖ tuned) of some rows [R] in float32, for which the base has `base_RD`."""
        if any(change is not None for change, _ in self._changes(len(hidden_TD), None)):
            raise RunError("what a head that is trained itself forgets isn't measured against the base's head")
        with whole(self.module):  # once: a sharded head is gathered by all processes or by none
            weight = weight_of(self.module)
            logprobs = linear_logprobs(hidden_TD, weight, labels_T, **self._options)
            return logprobs, linear_divergence(hidden_TD[row_R], base_RD, weight, **self._options)

    def at(self, temperature: float) -> "Head":
        """That of the logits divided by a temperature: cap(z) / T = (c / T) tanh((z / T) / (c / T))."""
        return replace(self, scale=self.scale / temperature, softcap=self.softcap and self.softcap / temperature)

    @property
    def _options(self) -> dict[str, Any]:
        return {"bias_V": self.bias_V, "scale": self.scale, "softcap": self.softcap}

    def _changes(self, rows: int, segments: Segments | None) -> list[tuple[HeadChange | None, slice]]:
        module = self.model.get_output_embeddings()  # type: ignore[operator]
        return module.changes(segments, rows) if isinstance(module, ChangesHead) else [(None, slice(0, rows))]

    def logits(self, hidden_TD: Tensor, segments: Segments | None = None) -> Tensor:
        """[T, V] in float32."""
        parts: list[Tensor] = []
        with whole(self.module):
            for change, rows in self._changes(len(hidden_TD), segments):
                if change is None:
                    parts += lora_linears(hidden_TD[rows], [Projection(weight_of(self.module), self.bias_V)])
                else:
                    parts.append(change.apply(hidden_TD[rows], weight_of(self.module), self.bias_V))
        z_TV = (parts[0] if len(parts) == 1 else torch.cat(parts)).float()
        return capped(z_TV if self.scale == 1 else self.scale * z_TV, self.softcap)


def _plain(module: Any) -> Any:
    return module.base.module if isinstance(module, ChangesHead) else module


def find_head(model: nn.Module) -> Head | None:
    """The output head as a plain product, with the scale and the cap that the config names; verified by the caller."""
    module = _plain(model.get_output_embeddings())  # type: ignore[operator]
    if not has_weight(module) or model.base_model is model:
        return None
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(model, scale, softcap)
