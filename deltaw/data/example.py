"""What a row has become: tokens, and which of them are trained.

In a file of its own so that packing and loading need no tokenizer: `render.py` makes examples, `pack.py` uses them.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """tokens: int32 (T,); loss_mask: bool (T,), True = trained, never at 0; untrained_turns: answers not provable."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    origin: str
    untrained_turns: int = 0
