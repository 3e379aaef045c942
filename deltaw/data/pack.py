"""Examples -> one batch without padding (base/batch.py has the layout).

Rejected: padding to the longest (wasted work, and pad = eos then hides the real eos), and cutting documents to fill a
batch to the last token (a document's tail without its head teaches the wrong thing).
"""

from collections.abc import Sequence

import numpy as np
import torch

from deltaw.base.batch import Batch
from deltaw.data.example import Example
from deltaw.kernels.logprobs import IGNORE


def pack(examples: Sequence[Example]) -> Batch:
    """Lay `examples` end to end, in order. Raises ValueError on none."""
    if not examples:
        raise ValueError("a batch needs at least one example")
    tokens_T = np.concatenate([example.tokens for example in examples]).astype(np.int64)
    trained_T = np.concatenate([example.loss_mask for example in examples])
    starts = [0, *np.cumsum([len(example.tokens) for example in examples]).tolist()]
    trained_T[starts[:-1]] = False  # the first token of a document has nothing before it that could predict it
    labels_T = np.append(np.where(trained_T, tokens_T, IGNORE)[1:], IGNORE)
    origins = tuple(example.origin for example in examples)
    parts = tuple(example.part for example in examples)
    return Batch.of(
        torch.from_numpy(tokens_T),
        starts,
        torch.from_numpy(labels_T),
        origins=origins,
        parts=parts if any(parts) else (),
    )


def labelled(example: Example) -> np.ndarray:
    """The label of each row of an example, int64: the next token, where that is trained."""
    labels_T = np.full(len(example.tokens), IGNORE, np.int64)
    np.copyto(labels_T[:-1], example.tokens[1:], where=example.loss_mask[1:])
    return labels_T
