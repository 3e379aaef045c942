"""Many prompts -> their answers: with one model, decoded side by side, in the order of the prompts.

Into a file: each answer is kept as soon as it ends (files/journal.py), so that a run that was stopped goes on where it
was, and the file itself is written when all are there. Into a stream: an answer is printed when all before it are.

Each row of the output is the prompt's own row and the answer. A row that can't be asked has null for an answer, and
beside it why; it is no reason to keep the others from theirs.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from deltaw.adapter.file import Adapter
from deltaw.data.prompts import PromptRow
from deltaw.errors import InputError, listed
from deltaw.files.encoding import without_setting
from deltaw.files.journal import Journal
from deltaw.generate.sampling import Sampling
from deltaw.model import Model
from deltaw.show.progress import Display

Answer = tuple[str, bool]  # and whether it was cut short
Hold = Callable[[], AbstractContextManager[None]]


@dataclass
class Asked:
    """The rows, those that can be asked as token ids by number, and why the others can't."""

    rows: Sequence[PromptRow]
    prompts: dict[int, list[int]] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = {name for row in self.rows for name in row.fields}
        self.answer, self.error = _free("answer", columns), _free("error", columns)

    @staticmethod
    def of(model: Model, rows: Sequence[PromptRow], display: Display) -> "Asked":
        """Tokenised. Raises InputError where none can be asked."""
        asked = Asked(rows)
        with display.task("reading prompts", len(rows)) as progress:
            for number, row in enumerate(rows):
                try:
                    asked.prompts[number] = _ids(model, row)
                except InputError as error:
                    asked.problems[number] = without_setting(error.what)
                progress(number + 1)
        if not asked.prompts:
            raise InputError(f"none of the prompts can be asked:\n{listed(asked.named())}")
        return asked

    def named(self) -> list[str]:
        """The problems, with their rows."""
        return [f"{self.rows[number].origin}: {why}" for number, why in self.problems.items()]

    def line(self, number: int, answer: str | None) -> str:
        """A row of the output."""
        row = self.rows[number]
        more: dict[str, Any] = {self.answer: answer}
        if number in self.problems:
            more |= {} if row.fields else {"origin": row.origin}
            more[self.error] = self.problems[number]
        return _json({**row.fields, **more}) + "\n"


def answer_into_file(
    model: Model, asked: Asked, sampling: Sampling, journal: Journal, *, adapter: bool, hold: Hold, display: Display
) -> dict[int, Answer]:
    """All answers, those of an earlier run among them. `hold`: a signal waits for the end of such a block. Raises
    RunError for a full disk."""
    missing = {number: ids for number, ids in asked.prompts.items() if number not in journal.done}
    try:
        with display.task("answering", len(asked.prompts)) as progress:
            progress(len(journal.done))
            for number, *answer in model.answers(missing, sampling, adapter=adapter):
                with hold():
                    journal.add(number, answer)
                progress(len(journal.done))
        with hold():
            texts = {number: text for number, (text, _) in journal.done.items()}
            journal.finish(asked.line(number, texts.get(number)) for number in range(len(asked.rows)))
    finally:
        journal.close()
    return {number: (text, cut) for number, (text, cut) in journal.done.items()}


def answer_into_stream(
    model: Model, asked: Asked, sampling: Sampling, write: Callable[[str], None], *, adapter: bool, display: Display
) -> dict[int, Answer]:
    """All answers, each written as soon as it and all before it are there."""
    answers: dict[int, Answer] = {}
    waiting = iter(range(len(asked.rows)))
    following = next(waiting, None)
    with display.task("answering", len(asked.prompts)) as progress:
        for number, text, cut in model.answers(asked.prompts, sampling, adapter=adapter):
            answers[number] = text, cut
            progress(len(answers))
            while following is not None and (following in answers or following in asked.problems):
                write(asked.line(following, answers[following][0] if following in answers else None))
                following = next(waiting, None)
    return answers


def depends(rows: Sequence[PromptRow], sampling: Sampling) -> dict[str, Any]:
    """What answers depend on, in words that an error can name."""
    content = [[row.origin.rpartition(":")[2], row.fields] for row in rows]
    digest = sha256(_json(content).encode()).hexdigest()
    return {"prompts": {"rows": len(rows), "sha256": digest}, "sampling": sampling.model_dump()}


def depends_on_model(model: Model, adapter: Adapter | None) -> dict[str, Any]:
    """The same of the model. `adapter`: None where the base is asked alone."""
    how = {"chat": model.asking.chat, "system": model.asking.system, "template": model.renderer.template_fingerprint}
    return {"base": model.base.fingerprint, "adapter": None if adapter is None else adapter.fingerprint, "form": how}


def summary(asked: Asked, answers: Mapping[int, Answer]) -> dict[str, Any]:
    """Counts, and the names under which answers and errors stand in the output."""
    return {
        "rows": len(asked.rows),
        "answered": len(answers),
        "cut": sum(cut for _, cut in answers.values()),
        "not_asked": len(asked.problems),
        "problems": asked.named()[:10],
        "answer": asked.answer,
        "error": asked.error,
    }


def _ids(model: Model, row: PromptRow) -> list[int]:
    """Raises InputError for a row that can't be asked."""
    if row.problem:
        raise InputError(row.problem)
    ids = model.prompt_ids(row.prompt, tools=row.tools)
    if not ids:
        raise InputError("its prompt is empty")
    if len(ids) >= model.context:
        raise InputError(f"it has {len(ids):,} tokens, and the context, answer included, holds {model.context:,}")
    return ids


def _free(name: str, columns: set[str]) -> str:
    """A name for what is added to a row: one that no column has."""
    names: Iterator[str] = (other for other in (name, f"deltaw_{name}", *(f"{name}_{n}" for n in range(2, 10**6))))
    return next(other for other in names if other not in columns)


def _json(value: Any) -> str:
    """One line. What JSON has no form for is its text (a date in a table) or null (not a number); a letter that isn't
    UTF-8 is escaped."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=str)
    except ValueError:
        return _json(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None))
    return text
