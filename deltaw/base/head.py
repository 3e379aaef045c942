"""The output head, fused with the log-probabilities of the labels: the logits of a whole batch are never formed.

A head is taken for a plain product with the scale and the soft cap that the config names. Whether the model does that
is for the probe to say (probe.py); a head that does something else is left to the model.

Letters: T tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from deltaw.kernels.logprobs import Logprobs, capped, linear_logprobs


@dataclass(frozen=True)
class Head:
    """What turns hidden rows into logits: z = cap(scale · (W h + bias))."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logprobs(self, hidden_TD: Tensor, labels_T: Tensor) -> Logprobs:
        """What it says of the labels that aren't IGNORE."""
        return linear_logprobs(
            hidden_TD,
            self.linear.weight,
            labels_T,
            bias_V=self.linear.bias,
            scale=self.scale,
            softcap=self.softcap,
        )

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] in float32."""
        return capped(self.scale * self.linear(hidden_TD).float(), self.softcap)


def find_head(model: nn.Module) -> Head | None:
    """The output head as a plain product, with the scale and the cap that the config names; verified by the caller."""
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(linear, nn.Linear) or model.base_model is model:
        return None
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(linear, scale, softcap)
