"""A run's rewards, opened: `rewards_of(config, rows)`, then `rewards(asked)` -> what each answer is worth.

    with rewards_of(config, rows) as rewards:
        scored = rewards([Asked(prompt, completion, row), …])

All that can be wrong is met before work: every row must have what its answers are held against, the code must load, and
one row's own answer (an empty one, where it has none) is scored.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from deltaw.config.reward import RewardConfig
from deltaw.data.columns import Columns
from deltaw.data.row import Problem, Row
from deltaw.errors import InputError, Rejected, RunError, listed
from deltaw.evaluation.metrics import METRICS
from deltaw.evaluation.own_metric import ASKED_FOR, Consent
from deltaw.rewards.compared import Compared
from deltaw.rewards.function import Function
from deltaw.rewards.gym import Gym
from deltaw.rewards.programs import Programs
from deltaw.rewards.scored import Asked, Scored, Scorer
from deltaw.rewards.shape import JSON, Pattern, Text
from deltaw.rewards.truth import Truths
from deltaw.show.text import counted, one_line


@dataclass(frozen=True)
class Opening:
    """What a scorer may need to be opened."""

    truths: Truths = field(default_factory=Truths)
    consent: Consent = ASKED_FOR


Opener = Callable[[Any, Opening], Scorer]
OPENERS: dict[str, Opener] = {
    "function": lambda config, opening: Function(config, opening.consent),
    **dict.fromkeys(METRICS, lambda config, opening: Compared(config, opening.truths)),
    "regex": lambda config, opening: Pattern(config),
    "json_schema": lambda config, opening: JSON(config, opening.truths),
    "pass_at_1": lambda config, opening: Programs(config, opening.truths),
    "reasoning_gym": lambda config, opening: Gym(config),
    "format": lambda config, opening: Text.of_format(config),
    "length": lambda config, opening: Text.of_length(config),
}


@dataclass(frozen=True)
class Look:
    """What a row's own answer (None where it has none; in the tags that the rewards ask for) and an empty one are
    worth: shows a wrong verifier at once."""

    origin: str
    answer: str | None
    own: Scored | None
    empty: Scored


def looked_at(looks: Sequence[Look]) -> list[str]:
    """The same for people."""
    lines = []
    for look in looks:
        empty = f"an empty one {look.empty.total:g}{_parts(look.empty)}"
        if look.own is None:
            lines.append(f"  {look.origin}: it has no answer of its own; {empty}")
        else:
            own = f"its own answer, “{one_line(look.answer or '', 60)}”, is worth {look.own.total:g}{_parts(look.own)}"
            lines.append(f"  {look.origin}: {own}; {empty}")
    scored = [look for look in looks if look.own is not None]
    if scored and all(look.own is not None and look.own.total <= look.empty.total for look in scored):
        lines.append("warning: none of these rows' own answers is worth more than an empty one")
    return ["rewards:", *lines] if lines else []


def _parts(scored: Scored) -> str:
    """What a total is made of, where that is more than one number."""
    if len(scored.parts) < 2:
        return ""
    return f" ({', '.join(f'{name} {value:g}' for name, value in scored.parts.items())})"


class Rewards:
    """The rewards of a run, to be called with answers."""

    def __init__(self, opened: Sequence[tuple[RewardConfig, Scorer]], truths: Truths) -> None:
        self._opened, self._truths = opened, truths

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End their processes."""
        for _, scorer in self._opened:
            scorer.close()

    def __call__(self, asked: Sequence[Asked]) -> list[Scored]:
        """Raises RunError that names the row."""
        if not asked:
            return []
        columns = {config.called: scorer.score(asked) for config, scorer in self._opened}
        weights = {config.called: config.weight for config, _ in self._opened}
        scored = []
        for number in range(len(asked)):
            parts: dict[str, float] = {}
            for name, values in columns.items():
                parts[name] = values[number].value
                parts |= {f"{name}.{key}": value for key, value in values[number].parts.items()}
            scored.append(Scored(math.fsum(weight * parts[name] for name, weight in weights.items()), parts))
        return scored

    def check(self, rows: Iterable[Row]) -> None:
        """Raises InputError with counts where rows lack what their answers are held against."""
        problems, count = [], 0
        for row in rows:
            count += 1
            try:
                for _, scorer in self._opened:
                    scorer.check(row)
            except Rejected as rejected:
                problems.append(Problem(row.origin, str(rejected)))
        if problems:
            what = f"{len(problems):,} of {counted(count, 'row')} can't be rewarded"
            raise InputError(f"{what}\n{listed([str(one) for one in problems])}", fix="complete or remove them")

    def look(self, rows: Iterable[Row]) -> list[Look]:
        """What each of these rows' own answer and an empty one are worth. Raises RunError."""
        asked: list[Asked] = []
        for row in rows:
            prompt, own = self._truths.prompt(row), (self._truths.answer(row) or ("",))[0]
            for config, _ in self._opened if own else ():
                own = config.wrapped(own)
            asked += [Asked(prompt, text, row.value, origin=row.origin) for text in (own, "")]
        scored = self(asked)
        looks = []
        for at in range(0, len(asked), 2):
            text, own_scored = asked[at].completion, scored[at]
            looks.append(Look(asked[at].origin, text or None, own_scored if text else None, scored[at + 1]))
        return looks

    def try_out(self, row: Row) -> None:
        """Score a row's own answer once. Raises InputError where that fails."""
        try:
            self.look([row])
        except RunError as error:
            raise InputError(error.what, fix=error.fix) from None


def rewards_of(
    config: Sequence[RewardConfig],
    rows: Sequence[Row],
    *,
    columns: Mapping[str, str] | None = None,
    consent: Consent = ASKED_FOR,
) -> Rewards:
    """The rewards of `config`, checked on `rows`, which are as they stood in the data; `columns`: data.columns. Raises
    InputError."""
    truths = Truths(Columns({**(columns or {})}))
    opening = Opening(truths, consent)
    opened: list[tuple[RewardConfig, Scorer]] = []
    rewards = Rewards(opened, truths)
    try:
        for one in config:
            opened.append((one, OPENERS[one.kind](one, opening)))
        rewards.check(rows)
        if len(rows):
            rewards.try_out(rows[0])
    except BaseException:
        rewards.close()
        raise
    return rewards
