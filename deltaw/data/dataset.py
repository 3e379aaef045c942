"""A run's rows as it trains on them: examples to train on, examples held out, and how they came about (prepare.py)."""

from dataclasses import dataclass
from functools import cached_property

from deltaw.data.asking import RAW, Asking
from deltaw.data.example import Example, fingerprint
from deltaw.data.report import DataReport


@dataclass(frozen=True)
class Dataset:
    """Examples in file order, and how they came about."""

    train: list[Example]
    eval: list[Example]
    report: DataReport
    asking: Asking = RAW  # how a text is asked that is to be answered as these rows are
    example: str = ""  # one that is short, of a row that was held out if any was

    @cached_property
    def fingerprint(self) -> str:
        """Of every token and mask, in order: equal where a run may be resumed."""
        return fingerprint(self.train, self.eval)
