"""What an update does to the model, by trial: its weights say how large it is and where, not what for.

    modules     ‖ΔW x‖ / ‖W x‖ of each module, on the task's text, on general text and on random inputs   (modules.py)
    tokens      base against tuned at every token: helped, hurt, most moved                               (tokens.py)
    points      the update at other scales and lower ranks: task loss against KL from the base            (states.py)
    without     `deep`: task loss and KL with the update off in one layer, in one kind of module

Task figures are of the run's held-out rows, or of a file's; general ones of the text that a run's forgetting is
measured on. All are means over the same labels with intervals of 95 % (bootstrap over rows), and so are differences
from the tuned model, which are paired. A budget bounds it (passes.py), and what it didn't suffice for is said.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from deltaw.analysis.effect.modules import ModuleEffect, module_effects
from deltaw.analysis.effect.passes import Budget, OfRows, Passes, key, pass_over
from deltaw.analysis.effect.states import Group, states_of
from deltaw.analysis.effect.tokens import Tokens, by_token
from deltaw.base.source import Source
from deltaw.config.sources import SourceValue
from deltaw.data.example import Example
from deltaw.errors import InputError
from deltaw.evaluation.forgetting import general_text
from deltaw.evaluation.intervals import Interval, Scores, interval
from deltaw.evaluation.rows import rows_of
from deltaw.model import Model
from deltaw.named import Named
from deltaw.show.progress import Display

QUICK, DEEP = Budget(768, 60.0), Budget(2560, 600.0)
PASSAGE = 64  # tokens of each general passage, unless it goes deep
LONGEST = 1024  # tokens of a task's row
GENERAL = "builtin:general"
TASK, OTHER = "task", "general"


@dataclass(frozen=True)
class Point:
    """The update in one state: the task's loss and KL from the base on general text, and how both differ from those of
    the update as it was trained."""

    group: Group | None  # None: the base, or as trained
    name: str
    task_loss: Interval
    kl: Interval
    task_change: Interval
    kl_change: Interval

    def to_json(self) -> dict[str, Any]:
        fields = ("task_loss", "kl", "task_change", "kl_change")
        return {"group": self.group, "name": self.name, **{name: getattr(self, name).to_json() for name in fields}}


@dataclass(frozen=True)
class Effect:
    """All that was tried, on which base, and on how much."""

    base: Source
    modules: Mapping[str, ModuleEffect]
    tokens: Mapping[str, Tokens]
    points: Sequence[Point]
    counts: Mapping[str, int]  # tokens passed over, by kind
    sources: Mapping[str, str]
    deep: bool
    seconds: float
    left_out: Sequence[str] = ()

    def of(self, *groups: Group | None) -> list[Point]:
        """The points of some groups, in their order."""
        return [point for point in self.points if point.group in groups]

    @property
    def curves(self) -> dict[Group, list[Point]]:
        """From the base to beyond what was trained, by scale; from rank 1 to what was trained, by rank."""
        base, tuned = self.of(None)
        factors = {0.0: base, 1.0: tuned, **{float(point.name): point for point in self.of("scale")}}
        return {"scale": [factors[factor] for factor in sorted(factors)], "rank": [*self.of("rank"), tuned]}

    def to_json(self) -> dict[str, Any]:
        """All numbers; null for one that isn't finite."""
        raw = {
            "rows": {
                kind: {"source": self.sources[kind], "tokens": self.counts[kind], "rows": tokens.rows}
                for kind, tokens in self.tokens.items()
            },
            "deep": self.deep,
            "seconds": self.seconds,
            "left_out": list(self.left_out),
            "modules": {path: effect.to_json() for path, effect in self.modules.items()},
            "tokens": {kind: tokens.to_json() for kind, tokens in self.tokens.items()},
            "points": [point.to_json() for point in self.points],
        }
        return _finite(raw)


def effect_of(
    name: str | Named, data: SourceValue | None = None, *, base: str | None = None, deep: bool, display: Display
) -> Effect:
    """Open the model and try its update. Raises InputError: no rows, no base, an adapter that can't be tried."""
    named = Named.of(name)
    model, examples = rows_of(named, data, base=base, display=display)
    general, source = _general(named, model, display)
    rows = "its own held-out rows" if data is None else f"{data}"
    return try_update(model, examples, general, sources={TASK: rows, OTHER: source}, deep=deep, display=display)


def try_update(
    model: Model,
    task: Sequence[Example],
    general: Sequence[Example],
    *,
    sources: Mapping[str, str],
    deep: bool,
    display: Display,
) -> Effect:
    """Try the update that `model` carries, and leave it as it was. Raises InputError where there is nothing to try, or
    to try it on."""
    if model.attached is None:
        raise InputError("this model carries no adapter, so there is nothing to try", fix="name a run or an adapter")
    budget = DEEP if deep else QUICK
    rows = {
        TASK: _some([_cut(row, LONGEST) for row in task], budget.tokens),
        OTHER: _some([_cut(row, PASSAGE) for row in general] if not deep else general, budget.tokens),
    }
    for kind, chosen in rows.items():
        if not chosen:
            raise InputError(f"no {kind} row has a token to measure on", fix="name a data file with usable rows")
    trained = {path: layer.factors() for path, layer in model.attached.layers.items()}
    modules = module_effects(model, rows, trained, display)
    passes = pass_over(model, rows, states_of(model.attached, trained, deep=deep), trained, budget, display)
    return Effect(
        model.base.source,
        modules,
        {kind: by_token(found, model.renderer) for kind, found in passes.rows.items()},
        _points(passes),
        {kind: found.tokens for kind, found in passes.rows.items()},
        dict(sources),
        deep,
        passes.seconds,
        passes.left_out,
    )


def _general(named: Named, model: Model, display: Display) -> tuple[list[Example], str]:
    """The text that the run's forgetting was measured on; where that is gone, the builtin one, which is said."""
    source = (named.local and named.local.evaluate.general) or GENERAL
    try:
        return general_text(source, model.renderer), f"{source}"
    except InputError as error:
        display.say(f"{error.what}, so {GENERAL} is taken")
        return general_text(GENERAL, model.renderer), GENERAL


def _cut(row: Example, most: int) -> Example:
    return row if len(row.tokens) <= most else row.cut(most)


def _some(rows: Sequence[Example], most: int) -> list[Example]:
    """Rows from all over, in an order that doesn't depend on how many are taken: `most` tokens, at least one row."""
    order = np.random.default_rng(0).permutation(len(rows))
    usable = [rows[int(number)] for number in order if rows[int(number)].loss_mask.any()]
    ends = list(accumulate(len(row.tokens) for row in usable))
    return usable[: max(1, sum(end <= most for end in ends))]


def _points(passes: Passes) -> list[Point]:
    """The base, what was trained, then every state."""
    task, general = (passes.rows[kind] for kind in (TASK, OTHER))

    def point(group: Group | None, name: str, of: str) -> Point:
        columns = [(task, 0), (general, 1)]
        values = [_mean(rows, rows.stats(of)[:, at]) for rows, at in columns]
        changes = [_mean(rows, rows.stats(of)[:, at] - rows.stats("tuned")[:, at]) for rows, at in columns]
        return Point(group, name, *values, *changes)

    known = [point(None, "base", "base"), point(None, "as trained", "tuned")]
    return known + [point(state.group, state.name, key(state)) for state in passes.states]


def _mean(rows: OfRows, sums_P: np.ndarray) -> Interval:
    """Per label, by documents."""
    return interval(Scores(np.stack([sums_P, rows.stats("base")[:, 2]], 1)), seed=0)


def _finite(raw: Any) -> Any:
    if isinstance(raw, dict):
        return {name: _finite(value) for name, value in raw.items()}
    if isinstance(raw, list | tuple):
        return [_finite(value) for value in raw]
    return None if isinstance(raw, float) and not math.isfinite(raw) else raw
