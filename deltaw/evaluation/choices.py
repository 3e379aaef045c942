"""Which of its choices a model finds likeliest, as lm-eval defines it.

    ll_k            Σ log p(token | everything before it) over the tokens of choice k behind the prompt; no end of
                    sequence, no end of turn
    accuracy        argmax_k ll_k is the right one                                   lm-eval's acc
    accuracy_norm   argmax_k ll_k / (characters of choice k)                         its acc_norm
    accuracy_bytes  argmax_k ll_k / (bytes of choice k in UTF-8)                     its acc_bytes

That is `lm_eval/api/task.py`, `ConfigurableTask.process_results` for `multiple_choice`, of lm-evaluation-harness 0.4;
the first of equal ones wins, there and here. The length is of the choice without the blanks at its ends. As there, a
blank stands between a plain prompt and a choice that would meet without one, and blanks at the prompt's end belong to
the choice; behind a chat's generation prompt nothing does. One thing differs: prompt and choice are encoded apart, as
they are trained, and lm-eval cuts the ids of both together at the length of the prompt's; the two are the same wherever
no token spans the border.

A row is read as the common sets have it: `choices`, `options`, `endings` (a list of texts, or {text, label}), and the
right one under `answer`, `answerKey`, `label`, `gold`, `target` or `correct`: its number from 0, its letter, its label
or its text.
"""

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.data.document import held_in_cell
from deltaw.data.example import Example
from deltaw.data.weighed import Weighed
from deltaw.errors import InputError, Rejected
from deltaw.evaluation.scoring import Say, scored_batches, unsaid
from deltaw.model import Model

LISTS = ("choices", "options", "endings")
NUMBER = re.compile(r"\d{1,9}(\.0+)?")
RIGHT = ("answer", "answerkey", "label", "gold", "target", "correct")


@dataclass(frozen=True)
class Choices:
    """The texts of a row's choices, and the number of the right one."""

    texts: tuple[str, ...]
    gold: int

    @property
    def lengths(self) -> dict[str, list[int]]:
        """What the likelihoods are divided by, by metric."""
        plain = [text.strip() for text in self.texts]
        return {
            "accuracy": [1] * len(plain),
            "accuracy_norm": [len(text) for text in plain],
            "accuracy_bytes": [len(text.encode()) for text in plain],
        }

    def scores(self, logprobs: Sequence[float]) -> dict[str, float]:
        """1 or 0 by each metric, of the choices' log-likelihoods."""
        return {
            name: float(int(np.argmax(np.array(logprobs) / np.array(lengths))) == self.gold)
            for name, lengths in self.lengths.items()
        }


def choices_of(value: Mapping[str, Any]) -> Choices:
    """Of a row, its columns under the names that are known. Raises Rejected."""
    name = next((name for name in LISTS if value.get(name) is not None), None)
    if name is None:
        raise Rejected(f"it has no choices: a column called {', '.join(LISTS)}")
    given, labels = held_in_cell(value[name]), [*string.ascii_uppercase]
    if isinstance(given, Mapping):
        named = given.get("label")
        labels = [str(label) for label in named] if isinstance(named, list) else labels
        given = given.get("text")
    if not isinstance(given, list) or not all(isinstance(text, str) and text.strip() for text in given):
        raise Rejected(f"{name} isn't a list of texts")
    if len(given) < 2:
        raise Rejected(f"{name} has {len(given)} of at least 2 choices")
    if twice := next((text for text in given if given.count(text) > 1), None):
        raise Rejected(f"{name} has {twice!r} twice")
    right = next((column for column in RIGHT if value.get(column) is not None), None)
    if right is None:
        raise Rejected(f"nothing says which choice is right: a column called {', '.join(RIGHT)}")
    gold = _gold(value[right], given, labels[: len(given)])
    if gold is None:
        raise Rejected(f"{right}: {value[right]!r} is none of its {len(given)} choices")
    return Choices(tuple(given), gold)


def _gold(value: Any, texts: Sequence[str], labels: Sequence[str]) -> int | None:
    """The number of the right one, however it is named."""
    if isinstance(value, str):
        for names in (texts, [text.strip() for text in texts], labels):
            if value in names:
                return names.index(value)
        value = float(value) if NUMBER.fullmatch(value) else None
    if isinstance(value, float) and value.is_integer():  # a table's column of numbers that lacks some
        value = int(value)
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(texts)
    return value if fits else None


def texts_behind(prompt: object, choices: Choices) -> tuple[Any, list[str]]:
    """The prompt as it is asked, and what stands behind it for each choice."""
    if not isinstance(prompt, str):
        return prompt, [text.strip() for text in choices.texts]
    bare = prompt.rstrip(" ")
    if bare and bare != prompt:
        return bare, [prompt[len(bare) :] + text.lstrip(" ") for text in choices.texts]
    meets = prompt[-1:].isspace()
    return prompt, [text if meets or text[:1].isspace() else f" {text}" for text in choices.texts]


def likelihoods(
    model: Model,
    rows: Mapping[int, tuple[Sequence[int], Sequence[Sequence[int]]]],
    *,
    adapter: bool,
    say: Say = unsaid,
) -> Iterator[tuple[int, list[float]]]:
    """(number, ll of each choice) of rows of (prompt's ids, ids of each choice), as they are known."""
    asked = [
        (number, at, Example(_ids(prompt, choice), _mask(prompt, choice), str(number)))
        for number, (prompt, choices) in rows.items()
        for at, choice in enumerate(choices)
    ]
    asked.sort(key=lambda one: max(len(prompt_choice) for prompt_choice in rows[one[0]][1]) + len(rows[one[0]][0]))
    known: dict[int, dict[int, float]] = {}
    off = nullcontext() if adapter or model.attached is None else model.attached.disabled()
    with off:
        weighed = Weighed([example for _, _, example in asked])
        for part, batch, scores in scored_batches(model.forward, weighed, say=say):
            sums: list[float] = batch.by_document(scores.logp_K.double()).tolist()
            for at, value in zip(part, sums, strict=True):
                number, choice, _ = asked[at]
                own = known.setdefault(number, {})
                own[choice] = value
                if len(own) == len(rows[number][1]):
                    del known[number]
                    yield number, [own[k] for k in range(len(own))]


def _ids(prompt: Sequence[int], choice: Sequence[int]) -> np.ndarray:
    return np.array([*prompt, *choice], np.int32)


def _mask(prompt: Sequence[int], choice: Sequence[int]) -> np.ndarray:
    return np.arange(len(prompt) + len(choice)) >= len(prompt)


def check_room(length: int, context: int) -> None:
    """Raises InputError for a prompt with its longest choice that the model can't hold."""
    if length > context:
        raise InputError(f"it has {length:,} tokens with its longest choice, and the context holds {context:,}")
