"""Examples -> one batch without padding.

Documents are laid end to end. Three examples of 3, 2 and 4 tokens:

    tokens_T      a0 a1 a2 b0 b1 c0 c1 c2 c3
    labels_T      a1 a2  .  b1  . c1 c2 c3  .      . is -100; so is every label whose token isn't trained
    positions_T    0  1  2  0  1  0  1  2  3
    starts_S       0        3     5           9    offset of each document, and T (`cu_seqlens` elsewhere)

Labels are already shifted: the model's output at t is compared with labels_T[t]. Shifting where the
documents are still known is what keeps a label from crossing into the next one.

Rejected: padding to the longest (wasted work, and pad = eos then hides the real eos), and cutting documents
to fill a batch to the last token (a document's tail without its head teaches the wrong thing).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example
from deltaw.kernels.loss import IGNORE


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents laid end to end, int64: tokens_T, labels_T, positions_T (T,), starts_S (documents + 1,)."""

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    starts_S: Tensor
    origins: tuple[str, ...]

    @property
    def supervised(self) -> int:
        """How many labels count. Sums over batches divide by the sum of these, once."""
        return int((self.labels_T != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        names = ("tokens_T", "labels_T", "positions_T", "starts_S")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def pack(examples: Sequence[Example]) -> Batch:
    """Lay `examples` end to end, in order. Raises ValueError on none."""
    if not examples:
        raise ValueError("a batch needs at least one example")
    tokens_T = np.concatenate([example.tokens for example in examples]).astype(np.int64)
    trained_T = np.concatenate([example.loss_mask for example in examples])
    lengths = np.array([len(example.tokens) for example in examples], np.int64)
    starts_S = np.concatenate([[0], np.cumsum(lengths)])
    trained_T[starts_S[:-1]] = False  # the first token of a document has nothing before it that could predict it
    labels_T = np.append(np.where(trained_T, tokens_T, IGNORE)[1:], IGNORE)
    positions_T = np.arange(len(tokens_T)) - np.repeat(starts_S[:-1], lengths)
    origins = tuple(example.origin for example in examples)
    arrays = (tokens_T, labels_T, positions_T, starts_S)
    tokens, labels, positions, starts = (torch.from_numpy(array) for array in arrays)
    return Batch(tokens, labels, positions, starts, origins)
