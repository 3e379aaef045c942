"""A run's rows as it trains on them: examples to train on, examples held out, and how they came about (prepare.py)."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from deltaw.data.asking import RAW, Asking
from deltaw.data.examples import Examples, fingerprint
from deltaw.data.questions import Questions
from deltaw.data.report import DataReport


@dataclass(frozen=True)
class Dataset:
    """Examples in file order, over the same columns, and how they came about."""

    train: Examples
    eval: Examples
    report: DataReport
    asking: Asking = RAW  # how a text is asked that is to be answered as these rows are
    example: str = ""  # one that is short, of a row that was held out if any was
    known_fingerprint: str = ""  # where it was computed before
    questions: tuple[Questions, ...] = ()  # of rows that are only asked: those to train on, those held out

    @property
    def rows(self) -> Examples:
        """All of them: to train on, as often as an epoch sees each, and held out."""
        return Examples(self.train.columns, np.concatenate([self.train.rows, self.eval.rows]))

    @cached_property
    def fingerprint(self) -> str:
        """Of every token and mask, in order: equal where a run may be resumed."""
        return self.known_fingerprint or fingerprint(self.train, self.eval)
