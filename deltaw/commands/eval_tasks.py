"""`deltaw eval --tasks`: a task file's figures with intervals as a table, its rows as JSONL (evaluation/tasks.py)."""

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

from deltaw.config.tasks import load_tasks
from deltaw.errors import InputError, RunError
from deltaw.evaluation.answers import depends_on_model
from deltaw.evaluation.intervals import Difference, Interval
from deltaw.evaluation.task_rows import Asked
from deltaw.evaluation.tasks import Measured, OpenTask, gather, gathered, try_metrics
from deltaw.files.journal import Journal
from deltaw.files.lock import claimed_file
from deltaw.files.strict_json import parse
from deltaw.kernels.copies import making
from deltaw.model import Model, open_model
from deltaw.named import Named
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.table import table
from deltaw.show.text import counted, figure_name, one_line, rounded
from deltaw.training.stop import StopRequest

KEPT = "what was answered is kept, and the same command goes on with the rest"
LOST = "nothing is kept without -o: name a file for the rows, and it can go on next time"


def eval_tasks_named(
    name: str,
    file: str,
    *,
    base: str | None,
    use_adapter: bool,
    use_base: bool,
    rows: int | None,
    output: str | None,
    replace: bool,
    allow_code: bool,
    display: Display,
) -> Result:
    """`rows`: at most so many of each task. Raises InputError before the weights are read where that is possible."""
    named, tasks = Named(name), load_tasks(Path(file))
    if rows is not None:
        tasks = tuple(task.model_copy(update={"limit": min(rows, task.limit or rows)}) for task in tasks)
    opened = [OpenTask.of(task, named, allow_code=allow_code) for task in tasks]
    with ExitStack() as stack:
        stack.enter_context(making())
        if output is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "rows.jsonl"
        else:
            path = Path(output)
            if path.exists() and path.samefile(file):
                raise InputError(f"output {path} is the task file", fix="name another file: -o rows.jsonl")
            stack.enter_context(claimed_file(path))
        settings = _depends(opened)
        if not Journal(path, settings, replace=replace).complete:
            _check_judges(opened, display)
        model = open_model(named, base=base, display=display)
        adapted = model.attached is not None and use_adapter
        sides = [*(["base"] if use_base or not adapted else []), *(["adapter"] if adapted else [])]
        asked = [one.read.asked(model, named, display) for one in opened]
        adapter = named.adapter if adapted else None
        header = {**settings, **depends_on_model(model, adapter), "sides": sides, "rows": _digest_of(asked)}
        journal = Journal(path, header, replace=replace)
        results = _measured(opened, asked, model, sides, journal, output is not None, display)
    data = {
        "model": name,
        "tasks_file": file,
        "adapter": adapted,
        "output": output,
        "tasks": [result.to_json() for result in results],
    }
    return Result(data, in_words(results) + (f"\n\nrows: {output}" if output else ""))


def _check_judges(opened: Sequence[OpenTask], display: Display) -> None:
    """Raises InputError for one that isn't there, before the weights are read."""
    judges = {(one.judge.config.url, one.judge.config.model): one.judge for one in opened if one.judge}
    for judge in judges.values():
        if warning := judge.check():
            display.say(f"warning: {warning}")


def _measured(
    opened: Sequence[OpenTask],
    asked: Sequence[tuple[list[Asked], list[Any]]],
    model: Model,
    sides: Sequence[str],
    journal: Journal,
    kept: bool,
    display: Display,
) -> list[Measured]:
    for one, (rows, _) in zip(opened, asked, strict=True):
        try_metrics(one, rows)
    if journal.complete:
        with journal.path.open("rb") as file:
            journal.done |= gathered(map(parse, file), sides)
    elif journal.done:
        display.say(f"going on: {counted(len(journal.done), 'answer is', 'answers are')} there already")
    with StopRequest(KEPT if kept else LOST) as stop:
        try:
            for one, (rows, _) in zip(opened, asked, strict=True):
                for side in sides:
                    gather(one, rows, model, side, journal, hold=stop.held, display=display)
            results = [
                Measured.of(one, rows, left_out, journal, sides)
                for one, (rows, left_out) in zip(opened, asked, strict=True)
            ]
            if not journal.complete:
                with stop.held():
                    journal.finish(_json(line) + "\n" for result in results for line in result.lines())
        except RunError as error:  # a judge that broke off, a metric of the user's
            fix = KEPT if kept else LOST
            raise RunError(error.what, fix=f"{error.fix}; {fix}" if error.fix else fix) from None
        finally:
            journal.close()
    return results


def in_words(results: Sequence[Measured]) -> str:
    """A line per figure, and what to know of it."""
    sides = results[0].sides
    lines = [line for result in results for line in _lines(result)]
    head = ["task", "metric", "rows", *sides, *(("change", "p", "") if len(sides) == 2 else ())]
    notes = ["", "in brackets: 95 % confidence, by bootstrap over rows (exact where all rows are right, or none is)"]
    if len(sides) == 2:
        notes.append("p: how often chance alone gives a change as large; below 0.05 it is called more than noise")
    for result in results:
        notes += _notes(result)
    return "\n".join(
        [table(lines, head, align="llr" + "r" * (len(head) - 3 - (len(sides) == 2)) + "l", rule=True), *notes]
    )


def _lines(result: Measured) -> list[list[str]]:
    rows = [[*_named(result, name), *_cells(result, name)] for name in result.figures]
    without = [[result.opened.task.name, figure_name(name), "0"] for name in result.without_figures]
    width = len(result.sides) + 3 * (len(result.sides) == 2)
    return [*rows, *([*line, *["–"] * len(result.sides), *[""] * (width - len(result.sides))] for line in without)]


def _named(result: Measured, name: str) -> list[str]:
    return [result.opened.task.name, figure_name(name), f"{len(result.scores[name][result.sides[0]]):,}"]


def _cells(result: Measured, name: str) -> list[str]:
    cells = [_figure(result.figures[name][side]) for side in result.sides]
    if name in result.differences:
        difference = result.differences[name]
        cells += [_figure(difference, signed=True), _p(difference), difference.words()]
    return cells


def _figure(figure: Interval, *, signed: bool = False) -> str:
    plus = "+" if signed and figure.value > 0 else ""
    if figure.low is None or figure.high is None:
        return f"{plus}{rounded(figure.value)}"
    return f"{plus}{rounded(figure.value)} [{rounded(figure.low)}, {rounded(figure.high)}]"


def _p(difference: Difference) -> str:
    return f"{difference.p:.4f}" if difference.p >= 0.0001 else "< 0.0001"


def _notes(result: Measured) -> list[str]:
    name, notes = result.opened.task.name, []
    for side in result.sides:
        if cut := result.cut(side):
            notes.append(f"{name}: {cut:,} of the {side}'s answers were cut short by max_new_tokens")
    if result.left_out:
        first = result.left_out[0]
        notes.append(f"{name}: {counted(len(result.left_out), 'row was', 'rows were')} left out, the first is {first}")
    if result.unjudged:
        origin = result.rows[result.unjudged[0]].origin
        rows = counted(len(result.unjudged), "row has", "rows have")
        notes.append(f"{name}: {rows} no score from the judge and count for neither side, the first is {origin}")
        reply = one_line(result.reply(result.unjudged[0]), 200)
        notes.append(f"{name}: the judge's words there: {reply!r}; what it is asked is judge.prompt")
    return notes


def _depends(opened: Sequence[OpenTask]) -> dict[str, Any]:
    """What rows of the output depend on that is known without the weights, in words that an error can name."""
    tasks = []
    for one in opened:
        settings = one.task.model_dump(mode="json", exclude={"data": True, "metrics": True, "judge": {"key"}})
        tasks.append(
            {**settings, "metrics": {name: one.own[name].code if name in one.own else "" for name in one.names()}}
        )
    return {"tasks": tasks}


def _digest_of(asked: Sequence[tuple[list[Asked], list[Any]]]) -> str:
    """Of what every row asks, and what it is held against."""
    digest = sha256()
    for rows, _ in asked:
        for row in rows:
            parts = [row.origin, list(row.ids), row.truth, row.choices, row.behind, row.tests]
            digest.update(repr(parts).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _json(value: Any) -> str:
    """One line; a letter that isn't UTF-8 is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
