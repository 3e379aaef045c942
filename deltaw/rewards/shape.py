"""What an answer looks like, whatever it says: a pattern, tags in order, JSON, its length.

A pattern is the run's own, but a harmless one can take for ever on a text that nobody thought of, so it is tried in a
process of its own with a deadline (process.py). An answer that it can't decide is an error, not a 0: the pattern is
what is wrong.
"""

from collections.abc import Callable, Sequence

from deltaw.config.reward import FormatReward, JSONReward, LengthReward, RegexReward
from deltaw.data.row import Row
from deltaw.errors import InputError, Rejected
from deltaw.files.bounded import Failed
from deltaw.files.strict_json import NotJSON, parse
from deltaw.rewards.process import Process
from deltaw.rewards.schema import Schema, Unsupported
from deltaw.rewards.scored import Asked, Value
from deltaw.rewards.truth import Truths


class Pattern:
    def __init__(self, config: RegexReward) -> None:
        self._config = config
        spec = {"kind": "pattern", "pattern": config.pattern, "whole": config.whole}
        self._process = Process(spec, f"the reward {config.called}", config.seconds)
        self._process.open()

    def check(self, row: Row) -> None:
        """It asks nothing of a row."""

    def score(self, asked: Sequence[Asked]) -> list[Value]:
        questions = [one.completion for one in asked]
        return self._process.scored(asked, questions, lambda answer, _: Value(answer["value"]), self._explained)

    def _explained(self, error: Failed) -> tuple[str, str]:
        what = f"the pattern {self._config.pattern!r:.60} can't be decided: {error}"
        return what, "write it without repetitions inside repetitions, such as (a+)+"

    def close(self) -> None:
        self._process.close()


class JSON:
    """Strict JSON: no NaN, no key twice, nothing around it but blanks."""

    def __init__(self, config: JSONReward, truths: Truths) -> None:
        self._against, self._truths, self._schema = config.against, truths, None
        if config.schema_ is not None:
            try:
                self._schema = Schema(config.schema_)
            except Unsupported as error:
                raise InputError(f"reward: json_schema: {error}", fix="docs/rewards.md says what is known") from None

    def check(self, row: Row) -> None:
        self._of_row(row)

    def score(self, asked: Sequence[Asked]) -> list[Value]:
        return [Value(float(self._fits(one))) for one in asked]

    def close(self) -> None:
        """It has no process."""

    def _of_row(self, row: Row) -> Schema | None:
        if self._against is None:
            return self._schema
        value = self._truths.field(row, self._against)
        try:
            value = parse(value.encode()) if isinstance(value, str) else value
            return Schema(value)
        except (NotJSON, UnicodeEncodeError, Unsupported) as error:
            raise Rejected(f"its {self._against} isn't a schema: {error}") from None

    def _fits(self, one: Asked) -> bool:
        try:
            value = parse(one.completion.strip().encode())
        except (NotJSON, UnicodeEncodeError):
            return False
        schema = self._of_row(Row(one.row, one.origin))
        return schema is None or schema.fits(value)


class Text:
    """A reward that hangs on nothing but the answer's text, and takes no time."""

    def __init__(self, worth: Callable[[str], float]) -> None:
        self._worth = worth

    @staticmethod
    def of_format(config: FormatReward) -> "Text":
        return Text(lambda text: float(is_in_order(text, config.tags)))

    @staticmethod
    def of_length(config: LengthReward) -> "Text":
        free, most = config.free, config.most
        return Text(lambda text: 0.0 - min(1.0, max(0, len(text) - free) / (most - free)))

    def check(self, row: Row) -> None:
        """It asks nothing of a row."""

    def score(self, asked: Sequence[Asked]) -> list[Value]:
        return [Value(self._worth(one.completion)) for one in asked]

    def close(self) -> None:
        """It has no process."""


def is_in_order(text: str, tags: Sequence[str]) -> bool:
    """Whether it is these tags, each once and in this order, with nothing but blanks between and around."""
    marks = [(f"<{tag}>", f"</{tag}>") for tag in tags]
    if any(text.count(mark) != 1 for pair in marks for mark in pair):
        return False
    for opening, close in marks:
        text = text.lstrip()
        if not text.startswith(opening):
            return False
        _, closed, text = text.partition(close)
        if not closed:
            return False
    return not text.strip()
