"""`deltaw eval`: an adapter beside its base, on a run's own held-out rows or on those of a file.

The base's figures on a run's own rows are known: it was measured before the first step. They are taken where the rows
are the same to the token, all of them are asked for, and answers may be as long; a metric that is new is computed from
the answers that the base gave then. Otherwise the base is measured like the adapter, with the adapter switched off.

Rows that aren't those of the training's own measurement (the file has changed, or how it is read) are named: which rows
are held out follows from the data, so some of them may since have been trained on.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from os import fspath
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.base.parts import ANSWERED, ASKED, PLAIN
from deltaw.base.preferences import objective_of
from deltaw.config import DataConfig, EvaluateConfig, RunConfig
from deltaw.config.sources import SourceValue, label
from deltaw.data.example import Example
from deltaw.data.examples import fingerprint, parts_of
from deltaw.data.loader import Units
from deltaw.errors import InputError
from deltaw.evaluation.held_out import Evaluation, add_answers, evaluate_loss, spread, truth_of
from deltaw.evaluation.metrics import Metric
from deltaw.evaluation.own_metric import Consent, open_metrics, try_out
from deltaw.evaluation.rows import rows_of
from deltaw.evaluation.weighing import both_sides
from deltaw.files.safetensors import load_safetensors
from deltaw.model import Model
from deltaw.named import Named
from deltaw.run import Run
from deltaw.show.progress import QUIET, Display
from deltaw.show.text import counted

NONE = ("none",)  # in place of metrics: the loss alone


@dataclass(frozen=True, repr=False)
class SideBySide:
    """What was measured, one side at least. `as_trained`: whether these are the rows of the training's own figures;
    None where that can't be told, or isn't asked."""

    name: str
    data: str | None
    rows: int
    metrics: tuple[Metric, ...]
    adapter: Evaluation | None
    base: Evaluation | None
    as_trained: bool | None

    def __repr__(self) -> str:
        sides = {"base": self.base, "adapter": self.adapter}
        figures = [f"{side}: {_figures(evaluation)}" for side, evaluation in sides.items() if evaluation]
        return f"SideBySide({self.name}, {counted(self.rows, 'row')}; {'; '.join(figures)})"

    @property
    def main(self) -> Evaluation:
        """The adapter's, where it was measured."""
        side = self.adapter or self.base
        assert side is not None
        return side

    def to_json(self) -> dict[str, Any]:
        """The main side's figures by name, and the base's, if it was measured beside, under `base`."""
        return {
            "model": self.name,
            "data": self.data,
            "adapter": self.adapter is not None,
            "rows": self.rows,
            "rows_as_trained": self.as_trained,
            "supervised_tokens": self.main.supervised_tokens,
            **self.main.summary(),
            "base": self.base.summary() if self.adapter and self.base else None,
            "higher_is_better": {metric.name: metric.higher_is_better for metric in self.metrics},
            **({"counts": self.main.counts, "intervals": self.main.intervals} if self.main.intervals else {}),
            "code": self.main.code,
        }

    def answers(self) -> Iterator[dict[str, Any]]:
        """Each row: what was asked, what was answered, the truth and the scores; the base's as well."""
        beside = self.base.answers if self.adapter and self.base else [None] * len(self.main.answers)
        for row, base in zip(self.main.answers, beside, strict=True):
            line: dict[str, Any] = {"origin": row.origin, "prompt": row.prompt, "truth": row.truth, "answer": row.given}
            line |= {"scores": {metric.name: metric.score(row) for metric in self.metrics}}
            if base:
                line |= {"base_answer": base.given}
                line |= {"base_scores": {metric.name: metric.score(base) for metric in self.metrics}}
            yield line


def _figures(evaluation: Evaluation) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in evaluation.summary().items())


def evaluate(
    name: str | Path | Named,
    data: str | Path | Sequence[Mapping[str, Any]] | SourceValue | None = None,
    *,
    base: str | Path | None = None,
    use_adapter: bool = True,
    use_base: bool = True,
    metrics: Sequence[str] | None = None,
    rows: int | None = None,
    max_tokens: int | None = None,
    every_answer: bool = False,
    allow_code: bool = False,
    display: Display | None = None,
) -> SideBySide:
    """Measure a run, an adapter or a base on a file or on rows, else on the run's own held-out rows: an adapter beside
    its base (`.adapter`, `.base`), with each row's answers in `.answers()` where a metric asks for them.

    `use_adapter`, `use_base`: measure that side; `metrics` are those of `deltaw eval`, in place of the run's own;
    `rows`: only so many; `max_tokens`: the longest answer; `every_answer`: also where no metric needs it; `allow_code`:
    run the metric's code that the run names. Raises InputError, before the weights are read where that is possible.
    """
    if data is not None and not isinstance(data, str | Path):
        data = DataConfig(train=data).train  # type: ignore[arg-type]  # which it looks at
    data = fspath(data) if isinstance(data, Path) else data
    base, display = fspath(base) if base else None, display or QUIET
    named = Named.of(name)
    config = wanted(named.config, metrics, max_tokens, every_answer)
    own = Consent(named.name if metrics is None else None, allow_code)
    opened = open_metrics(config.metrics, own)
    examples: Sequence[Example]
    model, examples = rows_of(named, data, base=base, rows=rows, display=display)
    known = _known(named) if data is None else None
    as_trained = known.rows == fingerprint(examples) if known and known.rows else None
    if as_trained is False:
        display.say(
            f"warning: these aren't the rows that {named.name} was measured on when it was trained: the data changed, "
            "or how it is read; some of them may have been trained on"
        )
    kinds = set(parts_of(examples).tolist())
    asked = bool(kinds & {ASKED, ANSWERED})
    if asked:
        _check_asked(named, config, kinds, display)
    elif kinds - {PLAIN}:
        if config.metrics or every_answer:
            raise InputError(
                "these rows are preferences: their answers are weighed, and no metric or file of answers fits them",
                fix="leave --metrics and -o out; or name a file of prompts with one right answer each",
            )
        sides = {"use_adapter": use_adapter, "use_base": use_base}
        return _weighed(named, model, examples, data, rows, as_trained, sides, display)
    if rows is not None and rows < len(examples):
        examples, known = spread(examples, rows), None
    try_out(opened, truth_of(model.renderer, examples[0]))
    measuring = _Measuring(model, examples, config, opened, every_answer, display, has_loss=not asked)
    adapter = measuring.side(None, adapter=True) if model.attached is not None and use_adapter else None
    other = None
    if adapter is None or use_base:
        other = measuring.side(known if as_trained else None, adapter=False)
    measured_on = None if data is None else data if isinstance(data, str) else label(data)
    return SideBySide(named.name, measured_on, len(examples), opened, adapter, other, as_trained)


def _weighed(
    named: Named,
    model: Model,
    examples: Sequence[Example],
    data: SourceValue | None,
    rows: int | None,
    as_trained: bool | None,
    sides: dict[str, bool],
    display: Display,
) -> SideBySide:
    """The same of preferences, whose answers are weighed."""
    assert named.config is not None
    units, kept = Units(examples), None
    if named.config.adapter.start is not None:
        kept = _kept(named, len(examples)) if as_trained else None
        if kept is None:
            display.say("compared with the base: what the adapter that it started from says of these rows isn't known")
    if rows is not None and rows < len(units):
        numbers = units.examples_of(spread(range(len(units)), rows))
        examples, kept = [examples[number] for number in numbers], None if kept is None else kept[numbers]
    objective = objective_of(named.config.objective)
    adapter, base = both_sides(model, examples, objective, kept, display, **sides)
    measured_on = None if data is None else data if isinstance(data, str) else label(data)
    return SideBySide(named.name, measured_on, len(Units(examples)), (), adapter, base, as_trained)


def _check_asked(named: Named, config: EvaluateConfig, kinds: set[int], display: Display) -> None:
    """Of the held-out prompts of a run on rewards. Raises InputError where no metric can be measured on them."""
    if not config.metrics or ASKED in kinds:
        why = "some of them have no answer to compare with" if config.metrics else "no metric is named"
        raise InputError(
            f"{named.name} was trained on rewards and held out prompts, and {why}",
            fix=f"deltaw eval {named.name}, without options, measures the reward; or name a file of rows with answers",
        )
    display.say(f"the metrics alone: the reward before and after is in {Run(named.path).result}")


def _kept(named: Named, count: int) -> np.ndarray | None:
    """What the run's own reference says of its held-out answers."""
    try:
        kept = load_safetensors(Run(named.path).references)["eval"].numpy()
    except (InputError, OSError, KeyError):
        return None
    return kept if len(kept) == count else None


@dataclass(frozen=True)
class _Measuring:
    """One model on some rows, with its adapter on or off."""

    model: Model
    examples: Sequence[Example]
    config: EvaluateConfig
    metrics: tuple[Metric, ...]
    every_answer: bool
    display: Display
    has_loss: bool = True  # prompts have none

    def side(self, known: Evaluation | None, *, adapter: bool) -> Evaluation:
        """`known`: of the same rows; only what it lacks is measured."""
        attached, name = self.model.attached, "adapter" if adapter else "base"
        with nullcontext() if adapter or attached is None else attached.disabled():
            if known is None and not self.has_loss:
                known = Evaluation(None, 0.0, len(self.examples), rows=fingerprint(self.examples), counts="answer")
            done = known or evaluate_loss(self.model, self.examples, display=self.display, name=name)
            if not (self.metrics or self.every_answer):
                return Evaluation(done.loss, done.perplexity, done.supervised_tokens, rows=done.rows)
            options: dict[str, Any] = {"display": self.display, "name": name, "every_row": self.every_answer}
            return add_answers(done, self.model, self.examples, self.config, self.metrics, **options)


def wanted(
    run: RunConfig | None, metrics: Sequence[str] | None, max_tokens: int | None, every_answer: bool = False
) -> EvaluateConfig:
    """What is measured: the metrics named, else the run's own; answers as long as asked for, else as the run's.
    Raises InputError."""
    own = run.evaluate if run else EvaluateConfig()
    named = own.metrics if metrics is None else () if tuple(metrics) == NONE else tuple(metrics)
    for one in named:  # the first that isn't a metric: the names of all that are fill a line
        EvaluateConfig.checked(metrics=(one,))
    config = EvaluateConfig.checked(
        metrics=named, max_new_tokens=own.max_new_tokens if max_tokens is None else max_tokens, samples=0
    )
    if max_tokens is not None and not config.metrics and not every_answer:
        raise InputError("--max-tokens does nothing without a metric: nothing is answered", fix="name one: --metrics")
    return config if metrics is None else config.located(Path())


def _known(named: Named) -> Evaluation | None:
    """The base's figures from before the training; None where there are none that can be read."""
    run = Run(named.path)
    if named.config is None or not run.before.is_file():
        return None
    try:
        known = Evaluation.from_json(run.read_json(run.before))
        return known if known.loss is not None and math.isfinite(known.loss) else None
    except (InputError, TypeError, KeyError, ValueError):  # rotten, or of another deltaw
        return None
