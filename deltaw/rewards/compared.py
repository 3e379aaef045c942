"""An answer against the row's own, by a metric of `deltaw eval` (evaluation/metrics.py), between 0 and 1.

    what is better higher      the metric of the row
    an error rate              max(0, 1 − rate): a rate can exceed 1, and a reward that falls for ever with the answer's
                               length would teach nothing but brevity

Where several truths are right, the best of them counts.
"""

from collections.abc import Sequence

from deltaw.config.reward import ComparedReward
from deltaw.data.row import Row
from deltaw.errors import Rejected
from deltaw.evaluation.metrics import METRICS, Answer
from deltaw.evaluation.numbers import equal, last_number
from deltaw.rewards.scored import Asked, Value
from deltaw.rewards.truth import Truths


class Compared:
    def __init__(self, config: ComparedReward, truths: Truths) -> None:
        self._config, self._truths, self._metric = config, truths, METRICS[config.kind]

    def check(self, row: Row) -> None:
        right = self._right(row)
        if self._config.kind == "number_equal":
            for text in right:
                if last_number(text) is None:
                    raise Rejected(f"its answer has no number: {text!r:.60}")

    def score(self, asked: Sequence[Asked]) -> list[Value]:
        return [Value(self._of(one)) for one in asked]

    def close(self) -> None:
        """It has no process."""

    def _right(self, row: Row) -> tuple[str, ...]:
        return self._truths.of(row, self._config.against)

    def _of(self, one: Asked) -> float:
        text = inside(one.completion, self._config.tag)
        if text is None:
            return 0.0
        return max(self._worth(text, right) for right in self._right(Row(one.row, one.origin)))

    def _worth(self, given: str, truth: str) -> float:
        if self._config.tolerance is not None:
            return float(equal(given, truth, self._config.tolerance))
        figure = self._metric.score(Answer("", given, truth, ""))
        return figure if self._metric.higher_is_better else max(0.0, 1.0 - figure)


def inside(text: str, tag: str | None) -> str | None:
    """What stands in the last <tag>…</tag>, all of the text without a tag; None where it has none of these."""
    if tag is None:
        return text
    before, close, _ = text.rpartition(f"</{tag}>")
    _, opening, within = before.rpartition(f"<{tag}>")
    return within.strip() if close and opening else None
