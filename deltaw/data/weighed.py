"""Answers that are weighed against a reference, as batches: each with its log-probability under the reference, and
where the objective wants an anchor (KTO), as many mismatched answers beside them.

A mismatched answer is the prompt of one row with the answer of another: answer n's prompt goes with the answer half of
all rows further on, or the next behind that with another prompt. (TRL shifts by one within a batch; where rows of one
prompt are neighbours, as they mostly lie in files, that pairs a prompt with its own answers, and says that nothing has
changed.) Which goes with which depends on the rows alone, so the reference's log-probability of each is computed once,
as that of the rows themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from deltaw.base.batch import Batch
from deltaw.data.example import Example
from deltaw.data.pack import pack

TRIES = 64  # rows that are looked at for another prompt


@dataclass(frozen=True)
class Weighed:
    """`references`, `beside`: the reference's log-probability of each example, and of each's mismatched answer; None
    where there are none."""

    examples: Sequence[Example]
    references: np.ndarray | None = None
    beside: np.ndarray | None = None

    def packed(self, numbers: Sequence[int]) -> Batch:
        """The batch of the examples of these numbers."""
        return self.dressed(pack([self.examples[number] for number in numbers]), numbers)

    def dressed(self, batch: Batch, numbers: Sequence[int]) -> Batch:
        """A batch of the examples of these numbers, with what the reference says of them."""
        if self.references is None:
            return batch
        batch = replace(batch, references=tuple(self.references[numbers].tolist()))
        if self.beside is None:
            return batch
        beside = pack([mismatched(self.examples, number) for number in numbers])
        return replace(batch, beside=replace(beside, references=tuple(self.beside[numbers].tolist())))


def mismatched(examples: Sequence[Example], number: int) -> Example:
    """The prompt of an example with another's answer, no longer than the longer of both."""
    example, count = examples[number], len(examples)
    prompt = _prompt(example)
    others = (examples[(number + count // 2 + more) % count] for more in range(min(TRIES, count)))
    other = next((one for one in others if not np.array_equal(_prompt(one), prompt)), None)
    if other is None:  # one prompt is all there is
        other = examples[(number + count // 2) % count]
    begin = len(_prompt(other))
    longest = max(len(example.tokens), len(other.tokens))
    tokens = np.concatenate([prompt, other.tokens[begin:]])[:longest]
    mask = np.concatenate([np.zeros(len(prompt), bool), other.loss_mask[begin:]])[:longest]
    return Example(tokens, mask, example.origin)


def _prompt(example: Example) -> np.ndarray:
    """The tokens before the first that is trained."""
    return example.tokens[: int(np.argmax(example.loss_mask))]
