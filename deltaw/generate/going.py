"""What a step of one token per row carries to attention: each token goes to its row's slot, and sees what is there.

Rows of a shelf are read together, up to the longest of them.

Letters: R rows, H query heads, K key/value heads, E head size, L places that are read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltaw.generate.shelf import Part
from deltaw.kernels.decode import cached_attention


class GoingOn:
    """What a step of one token per row carries to attention. `ends`: bounds on how many places a row of each part sees,
    the least and the most."""

    def __init__(self, parts: Sequence[Part], ends: Sequence[tuple[int, int]]) -> None:
        self.parts, self.ends = parts, ends
        self.biases: dict[tuple[int, int | None], Tensor | None] = {}  # by part and window

    def attention(
        self,
        layer: nn.Module,
        q_RHE: Tensor,
        k_RKE: Tensor,
        v_RKE: Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        scale = q_RHE.shape[2] ** -0.5 if scale is None else scale
        out_RHE = torch.empty_like(q_RHE) if len(self.parts) > 1 else q_RHE
        for number, part in enumerate(self.parts):
            stored = part.store(layer, k_RKE, v_RKE)
            shortest, longest = self.ends[number]
            first = 0 if window is None else max(0, shortest - window)
            k_RKLE, v_RKLE = stored[:, : len(part.places), :, first:longest]
            bias_RL = self._bias(number, window, q_RHE.dtype)
            out = cached_attention(q_RHE[part.rows], k_RKLE, v_RKLE, bias_RL, scale=scale, softcap=softcap)
            if len(self.parts) == 1 and isinstance(part.rows, slice):
                return out
            out_RHE[part.rows] = out
        return out_RHE

    def _bias(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """−∞ where a row doesn't see, for all layers of one window."""
        shortest, longest = self.ends[number]
        if shortest == longest:
            return None  # what lies before the window isn't read
        if (number, window) not in self.biases:
            ats_R1 = self.parts[number].ats[:, None]
            at_L = torch.arange(0 if window is None else max(0, shortest - window), longest, device=ats_R1.device)
            hidden_RL = at_L > ats_R1 if window is None else (at_L > ats_R1) | (at_L <= ats_R1 - window)
            bias_RL = torch.zeros(hidden_RL.shape, dtype=dtype, device=ats_R1.device)
            self.biases[number, window] = bias_RL.masked_fill_(hidden_RL, -torch.inf)
        return self.biases[number, window]
