"""Rows as prompts: what a run on rewards asks, and the row beside it, of which a reward may use what it likes.

Any form that training can read gives prompts, with or without the answers. A row that has an answer is read as it is,
and its last answer is left out of what is asked; one that lacks it gets a stand-in first (as in prompts.py), so that a
prompt is rendered as in training, to the token. Nothing of an answer is trained, and no column is unused: the row goes
to the reward whole, its answer under whatever name it has there.

    messages, conversations            up to the last answer; where they end otherwise, all of them
    prompt, question, …                with or without completion, answer, …
    chosen, rejected                   their prompt
    text                               the text

An example of such a row is its prompt and, marked as trained, the answer that it has (`ANSWERED`: metrics and the page
compare with it) or the first token of the stand-in (`ASKED`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from deltaw.base.parts import ANSWERED, ASKED
from deltaw.config import DataConfig
from deltaw.data.asking import Prompt
from deltaw.data.columns import Columns, Fields
from deltaw.data.document import Chat, Completion, Question, Single, Text
from deltaw.data.example import Example
from deltaw.data.forms import PAIR_NAMES, SAMPLE, Form, Reads
from deltaw.data.preferences import BOTH, asked_only, form_for
from deltaw.data.prompts import ANSWERS, CHATS, prompt_of
from deltaw.data.report import PROMPTS, Reading
from deltaw.data.row import Row, says_something
from deltaw.errors import InputError, Rejected

STAND_IN = "."
Values = dict[str, Any]


def form_of_prompts(rows: Sequence[Row], data: DataConfig, *, templated: bool, reads: Reads = "auto") -> Form:
    """The form of rows that are to be asked. Raises InputError."""
    columns = Columns({str(name): column for name, column in data.columns.items()})
    columns.check(rows)
    plain = data.model_copy(update={"columns": {}})
    whole = [Row(completed(Fields(row.value, columns).take_all())[0], row.origin) for row in rows[:SAMPLE]]
    try:
        inner = form_for("any", whole, plain, templated=templated, reads=reads)
    except InputError as error:
        fix = "say which column asks: data.columns: {prompt: …}"
        raise InputError(error.what, fix=fix if "data.form" not in (error.fix or "") else error.fix) from None

    def convert(fields: Fields) -> Question:
        values, answered = completed(fields.take_all())
        return question(inner.normalise(Row(values, "")).answers[0][0], answered=answered)

    return Form("prompts", f"{PROMPTS} {inner.description}", (), convert, names=columns, note=inner.note)


def completed(values: Values) -> tuple[Values, bool]:
    """A row with a stand-in for the answer that it lacks, and whether it has one of its own."""
    if all(values.get(name) is not None for name in BOTH):
        return values, True
    for name, answer in CHATS.items():
        turns = values.get(name)
        if isinstance(turns, list) and turns:
            last = turns[-1] if isinstance(turns[-1], dict) else {}
            answered = last.get("role", last.get("from")) in ("assistant", "gpt", "chatgpt", "model")
            return (values, True) if answered else ({**values, name: [*turns, answer]}, False)
    for asks, answers in ANSWERS.items():
        if says_something(values.get(asks)):
            if any(says_something(values.get(of)) for ask, of in (*PAIR_NAMES, ("input", "ideal")) if ask == asks):
                return values, True
            stand_in = [CHATS["messages"]] if isinstance(values[asks], list) else STAND_IN
            return {**values, answers: stand_in}, False
    if isinstance(values.get("text"), str):
        rest = {name: value for name, value in values.items() if name != "text"}
        return {**rest, "prompt": values["text"], "completion": STAND_IN}, False
    blank = next((name for name in ANSWERS if isinstance(values.get(name), str)), None)
    if blank is not None and values.get(ANSWERS[blank]) is None:  # what it lacks is a prompt, which is said of it
        return {**values, ANSWERS[blank]: STAND_IN}, False
    return values, True


def question(document: Single, *, answered: bool) -> Question:
    """What a document asks: all before its last answer. Raises Rejected."""
    document = replace(document, unused=())
    match document:
        case Chat(messages=messages):
            last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
            if not last:
                raise Rejected("nothing is asked before the answer")
            end = {key: value for key, value in messages[last].items() if key != "weight"}
            return Question(replace(document, messages=(*asked_only(messages[:last]), end)), answered)
        case Text(text=text):  # it is asked, and not continued from its middle
            return Question(Completion(text, STAND_IN), False)
        case Completion(prompt=prompt) if not prompt.strip():
            raise Rejected("its prompt is empty")
    return Question(document, answered)


def as_prompt(example: Example, longest: int) -> Example:
    """A rendered row with nothing marked but its last answer, which is cut where the row would be longer than `longest`
    tokens; of a stand-in one token is left."""
    trained = np.flatnonzero(example.loss_mask)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    begin, end = int(trained[gaps[-1] + 1] if len(gaps) else trained[0]), int(trained[-1]) + 1
    end = begin + 1 if example.part == ASKED else max(begin + 1, min(end, longest))
    mask = np.arange(end) >= begin
    return replace(example, tokens=example.tokens[:end].copy(), loss_mask=mask, glued=False, untrained_turns=0)


@dataclass(frozen=True)
class Asks:
    """What an example asks: a text or messages, and its row as it stands in the file."""

    prompt: Prompt
    row: Values


class Questions:
    """The rows of some sources, by the origins that their examples have."""

    def __init__(self, sources: Sequence[Reading]) -> None:
        self._sources = sources

    def of(self, origin: str) -> Asks:
        """What the example from there asks."""
        number, place = self._places[origin]
        source = self._sources[number]
        row = source.rows[place]
        (document, _), *_ = source.form.normalise(row).answers
        return Asks(prompt_of(document, chat=True)[0], row.value)

    def row(self, origin: str) -> Row:
        """The row from there, as it stood."""
        number, place = self._places[origin]
        return self._sources[number].rows[place]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        return {
            origin: (number, place)
            for number, source in enumerate(self._sources)
            for place, origin in enumerate(source.rows.origins())
        }


def is_answered(example: Example) -> bool:
    """Whether its row has an answer of its own."""
    return example.part == ANSWERED
