"""A task's rows -> what is asked of the model, and what its answers are held against.

Two ways to read them. Rows whose answers are compared with the data's own become examples as in training, and are asked
as `deltaw eval FILE` asks them: by the same renderer, so that the two give the same figures. Rows with choices, with
tests, or under a task's own `prompt`, aren't training rows; they are asked as `deltaw generate --file` asks them
(data/prompts.py). All of a task's files are read before the weights are.

Examples in front of a row (`shots`) are shots.py's; such rows are asked in the second way, too.

Which rows `limit` chooses is decided as `data.limit` decides it: in the order of a hash of (seed, content). A row that
can't be asked is named and left out, of both sides; more than `BAD` of them are an error, as in training.
"""

import re
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from deltaw.config import DataConfig
from deltaw.config.tasks import PASSES, TaskConfig
from deltaw.data.asking import Prompt
from deltaw.data.columns import Columns
from deltaw.data.document import held_in_cell
from deltaw.data.forms import SHAREGPT_ROLES
from deltaw.data.prepare import LEAVE_OUT, digest
from deltaw.data.prompts import asked
from deltaw.data.row import Problem, Row
from deltaw.data.sources import read_sources
from deltaw.errors import InputError, Rejected, listed
from deltaw.evaluation.choices import LISTS, RIGHT, Choices, check_room, choices_of, texts_behind
from deltaw.evaluation.held_out import prompt_and_truth
from deltaw.evaluation.programs import TESTS, Checks, checks_of
from deltaw.evaluation.rows import own_data, rows_of_task
from deltaw.evaluation.shots import APART, Shot, asks, behind, chosen
from deltaw.files.encoding import without_setting
from deltaw.model import Model
from deltaw.named import Named
from deltaw.show.progress import Display
from deltaw.show.text import counted, one_line

BAD = 0.01  # share of rows that may be left out
TRUTHS = ("completion", "answer", "output", "response", "target")
PLACE = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Asked:
    """A row as the model is given it. `choices` and `tests`: where the task is of that kind; `behind`: each choice's
    ids."""

    origin: str
    ids: Sequence[int]
    prompt: str
    truth: str = ""
    choices: Choices | None = None
    behind: tuple[Sequence[int], ...] = ()
    tests: Checks | None = None
    ends: str = ""  # at this text an answer is over


@dataclass(frozen=True)
class _Read:
    """A row as it was read, its text not yet tokens."""

    origin: str
    prompt: Prompt
    tools: tuple[dict[str, Any], ...] = ()
    truth: str = ""
    choices: Choices | None = None
    tests: Checks | None = None


@dataclass(frozen=True)
class TaskRows:
    """A task with the rows that were read already, and those that can't be used. `rows` is None where they become
    examples as in training, once there is a tokenizer."""

    task: TaskConfig
    rows: tuple[_Read, ...] | None
    problems: tuple[Problem, ...] = ()
    shots: tuple[Shot, ...] = ()

    @staticmethod
    def read(task: TaskConfig, named: Named) -> "TaskRows":
        """Raises InputError, with the task's name, for what can't be read or has too few rows that can be used."""
        try:
            if task.data is None:
                own_data(named)
                return TaskRows(task, None)
            raws = read_sources(task.data, DataConfig(train=task.data))
            rows = [row for raw in raws for row in raw[2]]
            unread = [problem for raw in raws for problem in raw[3]]
            columns = Columns({str(name): column for name, column in task.columns.items()})
            columns.check(rows, of_this_file=True)
            if task.form == "generate" and PASSES not in task.metrics and task.prompt is None and not task.shots:
                return TaskRows(task, None)
            return _taken(task, rows, unread, columns)
        except InputError as error:
            raise _of_task(task, error) from None

    def asked(self, model: Model, named: Named, display: Display) -> tuple[list[Asked], list[Problem]]:
        """The rows as token ids, and those that are left out. Raises InputError."""
        task = self.task
        try:
            how = model.asking.changed(chat=task.chat, system=task.system, template=model.renderer.template is not None)
        except InputError as error:
            raise InputError(f"task {task.name}: {error.what}", fix="change chat and system of the task") from None
        model = replace(model, asking=how)
        try:
            if self.rows is None:
                return _examples(task, model, named, display)
            rows, problems = list[Asked](), list(self.problems)
            for row in self.rows:
                try:
                    rows.append(_tokens(row, model, self.shots))
                except InputError as error:
                    problems.append(Problem(row.origin, without_setting(error.what)))
            _check(len(rows), problems)
            return rows, problems
        except InputError as error:
            raise _of_task(task, error) from None


def _of_task(task: TaskConfig, error: InputError) -> InputError:
    """A task file has no settings of a run file to advise."""
    what = without_setting(error.what).replace("data.columns", "columns")
    fix = None if error.fix is None else error.fix.replace(f", or {LEAVE_OUT}", "")
    if fix and "objective" in fix:  # rows of preferences
        fix = "say which column is the right answer: columns: {completion: chosen}"
    return InputError(f"task {task.name}: {what}", fix=fix)


def _taken(task: TaskConfig, rows: Sequence[Row], unread: Sequence[Problem], columns: Columns) -> TaskRows:
    """The rows that `limit` chooses, read."""
    key, shots = str(task.seed).encode()[-64:], _shots(task, rows, columns)
    shown = {asks(shot.prompt) for shot in shots}
    taken, refused = dict[int, _Read](), dict[int, Problem]()
    for number in sorted(range(len(rows)), key=lambda number: digest(rows[number], key)):
        if len(taken) == task.limit:
            break
        try:
            one = _read(rows[number], task, columns)
        except Rejected as rejected:
            refused[number] = Problem(rows[number].origin, str(rejected))
            continue
        if asks(one.prompt) not in shown:
            taken[number] = one
    problems = (*unread, *(refused[number] for number in sorted(refused)))
    if shots and not taken and not problems:
        raise InputError(
            f"shots: {task.shots}, and no row is left to ask", fix="lower it, or name other rows: shots_from"
        )
    _check(len(taken), problems)
    return TaskRows(task, tuple(taken[number] for number in sorted(taken)), problems, shots)


def _shots(task: TaskConfig, rows: Sequence[Row], columns: Columns) -> tuple[Shot, ...]:
    """The examples that a task shows. Raises InputError."""
    if not task.shots:
        return ()

    def read(row: Row) -> Shot:
        one = _read(row, task, columns)
        return Shot(one.prompt, one.choices.texts[one.choices.gold] if one.choices else one.truth)

    if task.shots_from is None:
        return chosen(rows, read, task.shots, task.seed)
    others = [row for raw in read_sources(task.shots_from, DataConfig(train=task.shots_from)) for row in raw[2]]
    own = set[str]()
    for row in rows:
        with suppress(Rejected):
            own.add(asks(_read(row, task, columns).prompt))
    return chosen(others, read, task.shots, task.seed, own)


def _check(usable: int, problems: Sequence[Problem]) -> None:
    count = usable + len(problems)
    if not usable or len(problems) > BAD * count:
        table = listed([str(problem) for problem in problems])
        raise InputError(f"{len(problems)} of {counted(count, 'row')} can't be used\n{table}", fix="fix them")


def _read(row: Row, task: TaskConfig, columns: Columns) -> _Read:
    """Raises Rejected."""
    known = {name: row.value[column] for name, column in columns.of(row.value).items()}
    choices = choices_of(known) if task.form == "choices" else None
    prompt, tools = _asked(row, task, known)
    tests = checks_of(known, prompt if isinstance(prompt, str) else "") if PASSES in task.metrics else None
    truth = ""
    if not choices and not tests:
        values = (known.get(name) for name in TRUTHS)
        truth = str(next((value for value in values if isinstance(value, str | int | float)), _last_answer(known)))
        if not truth.strip():
            raise Rejected(f"it has no answer to compare with: a column called {', '.join(TRUTHS)}")
    return _Read(row.origin, prompt, tools, truth, choices, tests)


def _last_answer(value: Mapping[str, Any]) -> str:
    """The answer that a chat ends with; empty where it ends otherwise, or there is no chat."""
    for name, speaker, text in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = value.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            whose, said = str(turns[-1].get(speaker)).lower(), turns[-1].get(text)
            return said if SHAREGPT_ROLES.get(whose, whose) == "assistant" and isinstance(said, str) else ""
    return ""


def _asked(row: Row, task: TaskConfig, known: Mapping[str, Any]) -> tuple[Prompt, tuple[dict[str, Any], ...]]:
    """What is asked, by the task's own prompt or as the row's columns say, and the tools with it. Raises Rejected."""
    if task.prompt is not None:
        return _filled(task.prompt, {**row.value, **known}), ()
    used = {*LISTS, *RIGHT} if task.form == "choices" else {*TESTS}
    one = asked(Row({name: value for name, value in known.items() if name not in used}, row.origin))
    if one.problem:
        raise Rejected(one.problem)
    return one.prompt, one.tools


def _filled(template: str, value: Mapping[str, Any]) -> str:
    """The task's prompt with the row's columns in it; a list as lettered lines. Raises Rejected."""

    def column(match: re.Match[str]) -> str:
        if (found := value.get(match[1])) is None:
            there = one_line(", ".join(str(name) for name, given in value.items() if given is not None), 200)
            raise Rejected(f"prompt: the row has no column {match[1]!r:.80}, it has {there}")
        found = held_in_cell(found) if match[1] in LISTS else found
        if isinstance(found, Mapping) and isinstance(found.get("text"), list):
            found = found["text"]
        if isinstance(found, list):
            return "\n".join(f"{letter}. {one}" for letter, one in zip(string.ascii_uppercase, found, strict=False))
        return str(found)

    return PLACE.sub(column, template)


def _tokens(row: _Read, model: Model, shots: Sequence[Shot]) -> Asked:
    """Raises InputError where the model can't be asked this."""
    prompt = row.prompt
    if isinstance(prompt, str):
        prompt = model.asking.prompt(prompt)
    elif prompt and prompt[0].get("role") != "system":
        prompt = [*model.asking.start, *prompt]
    prompt = behind(prompt, shots)
    texts: list[str] = []
    if row.choices is not None:
        prompt, texts = texts_behind(prompt, row.choices)
    ids = model.renderer.prompt_ids(prompt, row.tools)
    if not ids:
        raise InputError("its prompt is empty")
    if len({*texts}) < len(texts):  # else the first would be the likeliest, whatever the model says
        raise InputError("two of its choices differ in blanks alone, and not at all behind this prompt")
    choices = tuple(model.renderer.answer_ids(text) for text in texts)
    if choices:
        check_room(len(ids) + max(map(len, choices)), model.context)
    elif len(ids) >= model.context:
        raise InputError(f"it has {len(ids):,} tokens, and the context, answer included, holds {model.context:,}")
    shown = model.renderer.decode(ids)
    ends = APART if shots and isinstance(prompt, str) else ""
    return Asked(row.origin, ids, shown, row.truth, row.choices, choices, row.tests, ends)


def _examples(task: TaskConfig, model: Model, named: Named, display: Display) -> tuple[list[Asked], list[Problem]]:
    rows, problems = list[Asked](), list[Problem]()
    for example in rows_of_task(named, task, model, display):
        prompt, truth = prompt_and_truth(example)
        if len(prompt) >= model.context:
            problems.append(Problem(example.origin, f"{len(prompt):,} tokens leave no room for an answer"))
            continue
        decode = model.renderer.decode
        rows.append(Asked(example.origin, prompt, decode(prompt), decode(truth)))
    _check(len(rows), problems)
    return rows, problems
