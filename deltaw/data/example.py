"""An example, which a row has become: tokens, and which of them are trained.

It is in a separate file so that packing and loading need no tokenizer: `render.py` makes examples, `pack.py` uses them.
"""

from dataclasses import dataclass, replace

import numpy as np

from deltaw.base.parts import PLAIN


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """tokens: int32 (T,); loss_mask: bool (T,), True = trained, never at 0.

    What isn't trained or isn't in them: `untrained_turns`, answers not provable; `unused`, columns of the row that went
    nowhere; `left_out`, fields of its chat that the template doesn't write. `names` are those of control tokens that
    stand in it as plain text. `context`: so many of its first tokens are shown again, in a piece of a long text;
    `goes_on`: another piece follows.
    `glued`: its prompt and its completion meet without a blank. `part`: which answer it is, where answers are weighed
    (base/parts.py): a rejected one follows the chosen one of its row.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    origin: str
    untrained_turns: int = 0
    unused: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    context: int = 0
    goes_on: bool = False
    glued: bool = False
    part: int = PLAIN

    def equals(self, other: "Example") -> bool:
        """Whether both have the same tokens, and the same of them trained."""
        same = np.array_equal(self.tokens, other.tokens)
        return same and np.array_equal(self.loss_mask, other.loss_mask)

    def cut(self, length: int) -> "Example":
        """Its first `length` tokens."""
        return replace(self, tokens=self.tokens[:length].copy(), loss_mask=self.loss_mask[:length].copy())
