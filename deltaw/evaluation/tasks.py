"""`deltaw eval --tasks`: a task file's rows asked of base and adapter, scored, and compared row by row.

    opened     everything that can be wrong without the weights: files, columns, metrics, keys, packages, consent
    gathered   what the model and the judge say of each row, by name, kept as soon as it is there (files/journal.py):

                   TASK/base/7         [text, whether it was cut short], or the log-likelihoods of a row's choices
                   TASK/base/7/judge   [score or null, reply]          TASK/base/7/run   [whether it passed, why not]

    results    metrics, intervals and tests of what was gathered (intervals.py): computed anew each time, in no time

So a command that was stopped goes on where it was, and nothing is asked of a judge twice. The model is opened once, and
answers greedily. Base and adapter are asked the same ids, so their rows are pairs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltaw.config.tasks import CHOICES, CHRF, GENERATE, JUDGED, PASSES, TaskConfig
from deltaw.data.row import Problem
from deltaw.errors import InputError
from deltaw.evaluation.choices import likelihoods
from deltaw.evaluation.chrf import check_installed, chrf, counts_of
from deltaw.evaluation.intervals import Difference, Interval, Scores, compare, interval, ratio
from deltaw.evaluation.judge import Judge
from deltaw.evaluation.metrics import Answer, Metric
from deltaw.evaluation.own_metric import open_metrics, try_out
from deltaw.evaluation.programs import program_of
from deltaw.evaluation.task_rows import Asked, TaskRows
from deltaw.files.journal import Journal
from deltaw.files.program import run_program
from deltaw.generate.sampling import Sampling
from deltaw.model import Model
from deltaw.named import Named
from deltaw.show.progress import Display

Hold = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class OpenTask:
    """A task that can be measured: its rows read, its metrics and its judge opened. Raises InputError."""

    read: TaskRows
    own: Mapping[str, Metric]  # those of evaluation/metrics.py and the user's, by name
    judge: Judge | None

    @property
    def task(self) -> TaskConfig:
        return self.read.task

    @staticmethod
    def of(task: TaskConfig, named: Named, *, allow_code: bool) -> "OpenTask":
        if PASSES in task.metrics and not allow_code:
            raise InputError(
                f"task {task.name}: {PASSES} runs the programs that the model writes, and the tests of {task.name}",
                fix="they get no files, no network and little memory; to agree: --allow-code",
            )
        if CHRF in task.metrics:
            check_installed()
        names = [name for name in task.scored_by if name not in (CHRF, PASSES, JUDGED, *CHOICES)]
        try:
            own = {metric.name: metric for metric in open_metrics(names)}
        except InputError as error:
            what = error.what.removeprefix("evaluate.")  # a task's metrics stand in no section
            raise InputError(f"task {task.name}: {what}", fix=error.fix) from None
        judge = Judge(task.judge) if task.judge and JUDGED in task.metrics else None
        return OpenTask(TaskRows.read(task, named), own, judge)

    def names(self) -> list[str]:
        """Its metrics, as results call them."""
        special = [name for name in self.task.scored_by if name in (CHRF, PASSES, JUDGED, *CHOICES)]
        return [*self.own, *special]

    def higher_is_better(self, name: str) -> bool:
        return self.own[name].higher_is_better if name in self.own else {**CHOICES, **GENERATE}[name]


@dataclass(frozen=True, eq=False)
class Measured:
    """A task's rows, and those that are left out; by metric: each side's figure, and what sets them apart."""

    opened: OpenTask
    rows: Sequence[Asked]
    left_out: Sequence[Problem]
    journal: Journal
    sides: Sequence[str]
    unjudged: Sequence[int]
    figures: dict[str, dict[str, Interval]] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    scores: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)  # metric, side, row

    @staticmethod
    def of(opened: OpenTask, rows: Sequence[Asked], left_out: Sequence[Problem], journal: Journal,
           sides: Sequence[str]) -> "Measured":  # fmt: skip
        """A judge that gave no row a score leaves its metric without figures, and the others as they are."""
        given = {side: _Given(opened, rows, journal, side) for side in sides}
        unjudged = sorted({row for side in given.values() for row in side.unjudged})
        measured = Measured(opened, rows, left_out, journal, sides, unjudged)
        seed = opened.task.seed
        for name in opened.names():
            numbers = [n for n in range(len(rows)) if name != JUDGED or n not in unjudged]
            if not numbers:
                continue
            scores = {side: given[side].scores(name, numbers) for side in sides}
            measured.scores[name] = {s: dict(zip(numbers, one.of_rows, strict=True)) for s, one in scores.items()}
            measured.figures[name] = {side: interval(one, seed) for side, one in scores.items()}
            if len(sides) == 2:
                higher = opened.higher_is_better(name)
                base, adapter = scores["base"], scores["adapter"]
                measured.differences[name] = compare(base, adapter, higher_is_better=higher, seed=seed)
        return measured

    def cut(self, side: str) -> int:
        """How many answers were cut short."""
        if self.opened.task.form == "choices":
            return 0
        return sum(bool(self.journal.done[key(self.opened.task, side, n)][1]) for n in range(len(self.rows)))

    @property
    def without_figures(self) -> list[str]:
        """Metrics that no row has a score of."""
        return [name for name in self.opened.names() if name not in self.figures]

    def reply(self, row: int) -> str:
        """What the judge said of a row that has no score, on one of the sides."""
        said = [self.journal.done[key(self.opened.task, side, row) + "/judge"] for side in self.sides]
        return next((str(reply) for score, reply in said if score is None), "")

    def to_json(self) -> dict[str, Any]:
        task = self.opened.task
        metrics: dict[str, Any] = {}
        for name, figures in self.figures.items():
            metrics[name] = {"higher_is_better": self.opened.higher_is_better(name)}
            metrics[name] |= {side: figure.to_json() for side, figure in figures.items()}
            if name in self.differences:
                metrics[name]["difference"] = self.differences[name].to_json()
        for name in self.without_figures:
            nothing = dict.fromkeys((*self.sides, *(["difference"] if len(self.sides) == 2 else [])))
            metrics[name] = {"higher_is_better": self.opened.higher_is_better(name), **nothing}
        return {
            "name": task.name,
            "form": task.form,
            "shots": task.shots,
            "rows": len(self.rows),
            "left_out": [str(problem) for problem in self.left_out],
            "unjudged": [self.rows[n].origin for n in self.unjudged],
            "cut": {side: self.cut(side) for side in self.sides},
            "metrics": metrics,
        }

    def lines(self) -> Iterator[dict[str, Any]]:
        """Each row: what was asked, what each side gave, and the scores; the base's beside an adapter's as `base_…`."""
        task = self.opened.task
        for n, row in enumerate(self.rows):
            line: dict[str, Any] = {"task": task.name, "row": n, "origin": row.origin, "prompt": row.prompt}
            if row.choices:
                line |= {"choices": row.choices.texts, "gold": row.choices.gold}
            elif not row.tests:
                line["truth"] = row.truth
            for side in reversed(self.sides):  # the adapter first
                before = "base_" if side == "base" and len(self.sides) == 2 else ""
                name, done = key(task, side, n), self.journal.done
                if row.choices:
                    line[f"{before}logprobs"] = done[name]
                else:
                    line[f"{before}answer"], line[f"{before}cut"] = done[name]
                for what in ("run", "judge"):
                    if f"{name}/{what}" in done:
                        line[f"{before}{what}"] = done[f"{name}/{what}"]
                own = {metric: of[side].get(n) for metric, of in self.scores.items()}
                own |= dict.fromkeys(self.without_figures)
                line[f"{before}scores"] = own
            yield line


def gathered(lines: Iterable[Mapping[str, Any]], sides: Sequence[str]) -> dict[str, Any]:
    """What was gathered, out of the lines of a finished file."""
    done: dict[str, Any] = {}
    for line in lines:
        for side in sides:
            before = "base_" if side == "base" and len(sides) == 2 else ""
            name = f"{line['task']}/{side}/{line['row']}"
            if "choices" in line:
                done[name] = line[f"{before}logprobs"]
            else:
                done[name] = [line[f"{before}answer"], line[f"{before}cut"]]
            done |= {f"{name}/{what}": line[before + what] for what in ("run", "judge") if before + what in line}
    return done


@dataclass(frozen=True, eq=False)
class _Given:
    """What one side gave to a task's rows."""

    opened: OpenTask
    rows: Sequence[Asked]
    journal: Journal
    side: str

    @property
    def unjudged(self) -> list[int]:
        if self.opened.judge is None:
            return []
        return [n for n in range(len(self.rows)) if self._of(n, "/judge")[0] is None]

    def scores(self, name: str, numbers: Sequence[int]) -> Scores:
        """Of these rows, by one metric."""
        if name == CHRF:
            return Scores(np.array([counts_of(self._of(n)[0], self.rows[n].truth) for n in numbers], float), chrf)
        points = [self._points(name, n) for n in numbers]
        return Scores(np.array(points, float), ratio)

    def _points(self, name: str, n: int) -> tuple[float, float]:
        row = self.rows[n]
        if row.choices is not None:
            return row.choices.scores(self._of(n))[name], 1.0
        if name == PASSES:
            return float(self._of(n, "/run")[0]), 1.0
        if name == JUDGED:
            return float(self._of(n, "/judge")[0]), 1.0
        return self.opened.own[name].of(answer_of(row, self._of(n)[0]))

    def _of(self, n: int, what: str = "") -> Any:
        return self.journal.done[key(self.opened.task, self.side, n) + what]


def gather(
    opened: OpenTask, rows: Sequence[Asked], model: Model, side: str, journal: Journal, *, hold: Hold, display: Display
) -> None:
    """Ask one side what isn't known yet. `hold`: a signal waits for the end of such a block. Raises RunError."""
    task = opened.task
    names = {n: key(task, side, n) for n in range(len(rows))}

    def take(what: str, label: str, results: Callable[[list[int]], Iterator[tuple[int, Any]]]) -> None:
        missing = [n for n, name in names.items() if name + what not in journal.done]
        if not missing:
            return
        with display.task(f"{task.name}, {side}: {label}", len(rows)) as progress:
            done = len(rows) - len(missing)
            progress(done)
            for n, value in results(missing):
                with hold():
                    journal.add(names[n] + what, value)
                done += 1
                progress(done)

    def likely(missing: list[int]) -> Iterator[tuple[int, Any]]:
        asked = {n: (rows[n].ids, rows[n].behind) for n in missing}
        return likelihoods(model, asked, adapter=side == "adapter", say=display.say)

    def said(missing: list[int]) -> Iterator[tuple[int, Any]]:
        prompts, sampling = {n: rows[n].ids for n in missing}, Sampling(max_new_tokens=task.longest)
        for n, text, cut in model.answers(prompts, sampling, adapter=side == "adapter"):
            ends = rows[n].ends
            over = bool(ends) and ends in text
            yield n, [text.partition(ends)[0] if over else text, cut and not over]

    def ran(missing: list[int]) -> Iterator[tuple[int, Any]]:
        for n in missing:
            tests = rows[n].tests
            assert tests is not None
            outcome = run_program(program_of(journal.done[names[n]][0], tests))
            yield n, [outcome.passed, outcome.why]

    def judged(missing: list[int]) -> Iterator[tuple[int, Any]]:
        assert opened.judge is not None
        asked = {str(n): answer_of(rows[n], journal.done[names[n]][0]) for n in missing}
        for n, one in opened.judge.score_all(asked):
            yield int(n), [one.score, one.reply]

    if task.form == "choices":
        take("", "choices", likely)
        return
    take("", "answers", said)
    if PASSES in task.metrics:
        take("/run", "programs", ran)
    if opened.judge is not None:
        take("/judge", "judge", judged)


def try_metrics(opened: OpenTask, rows: Sequence[Asked]) -> None:
    """Call the user's own metrics once, before anything is asked. Raises InputError where that fails."""
    try_out(tuple(opened.own.values()), answer_of(rows[0], rows[0].truth))


def answer_of(row: Asked, text: str) -> Answer:
    return Answer(row.prompt, text, row.truth, row.origin)


def key(task: TaskConfig, side: str, number: int) -> str:
    return f"{task.name}/{side}/{number}"
