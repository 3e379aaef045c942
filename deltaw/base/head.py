"""The output head, fused with the log-probabilities of the labels: the logits of a whole batch are never formed.

A head is taken to be the product with its weight, with the scale and the soft cap that the config names. Whether the
model does that is for the probe to say (probe.py), which asks for `logits`: made from the same weight as `logprobs`, so
that a head which does something else is found out, and left to the model.

Letters: T tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltaw.base.frozen import has_weight, weight_of, whole
from deltaw.kernels.divergence import linear_divergence
from deltaw.kernels.logprobs import Logprobs, capped, linear_logprobs
from deltaw.kernels.lora import Projection, lora_linears


@dataclass(frozen=True)
class Head:
    """What turns hidden rows into logits: z = cap(scale · (W h + bias)), W and bias those of a linear module."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def bias_V(self) -> Tensor | None:
        return self.module.bias  # type: ignore[return-value]

    def logprobs(self, hidden_TD: Tensor, labels_T: Tensor, rows_K: Tensor | None = None) -> Logprobs:
        """What it says of the labels that aren't IGNORE; `rows_K`: where to look for them."""
        with whole(self.module):  # a backward doesn't ask for the weight again
            return linear_logprobs(hidden_TD, weight_of(self.module), labels_T, **self._options, rows_K=rows_K)

    def logprobs_and_divergence(
        self, hidden_TD: Tensor, labels_T: Tensor, row_R: Tensor, base_RD: Tensor
    ) -> tuple[Logprobs, Tensor]:
        """The same, and KL(base ‖ tuned) of some rows [R] in float32, for which the base has `base_RD`."""
        with whole(self.module):  # once: a sharded head is gathered by all processes or by none
            weight = weight_of(self.module)
            logprobs = linear_logprobs(hidden_TD, weight, labels_T, **self._options)
            return logprobs, linear_divergence(hidden_TD[row_R], base_RD, weight, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"bias_V": self.bias_V, "scale": self.scale, "softcap": self.softcap}

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] in float32."""
        with whole(self.module):
            (z_TV,) = lora_linears(hidden_TD, [Projection(weight_of(self.module), self.bias_V)])
        return capped(self.scale * z_TV.float(), self.softcap)


def find_head(model: nn.Module) -> Head | None:
    """The output head as a plain product, with the scale and the cap that the config names; verified by the caller."""
    module = model.get_output_embeddings()  # type: ignore[operator]
    if not has_weight(module) or model.base_model is model:
        return None
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module, scale, softcap)
