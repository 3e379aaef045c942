"""Held-out rows: the loss on them, and the model's answers, whose truth is known.

The loss is a sum over supervised tokens divided once by their count, so it does not depend on how rows are batched
(but for rounding). An answer is generated from the tokens before the last trained span of a row and compared with the
text of that span: training and evaluation can't differ in how a prompt is written, because there is one rendering.

An evaluation says what it is of: which rows, how long an answer might be, which code scored it. So a run that is
resumed with another metric, or measured again later, scores the base's answers that it has and doesn't ask for them
twice.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from deltaw.base.forward import Forward
from deltaw.base.limits import Limits
from deltaw.base.objective import sft
from deltaw.base.parts import ANSWERED, ASKED
from deltaw.config import EvaluateConfig
from deltaw.data.example import Example
from deltaw.data.examples import fingerprint
from deltaw.data.render import Renderer
from deltaw.data.weighed import Weighed
from deltaw.errors import InputError, RunError
from deltaw.evaluation.metrics import Answer, Metric
from deltaw.evaluation.scoring import Say, scored_batches, unsaid
from deltaw.generate.sampling import Sampling
from deltaw.model import Model
from deltaw.show.progress import Display, Progress, unseen
from deltaw.show.text import figure_name, rounded

Row = TypeVar("Row")


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per supervised token (of preferences: per pair or answer; None of rewards, which have none), its
    exponential, and the task's metrics (or the objective's figures) by name. `unanswered`: why this model can't be
    asked these rows, where that is so.

    Of what: `rows`, the fingerprint of all rows; `max_new_tokens`, of the answers; `code`, the sha256 of each metric
    that is the user's own. An evaluation by an older deltaw doesn't say.
    """

    loss: float | None
    perplexity: float
    supervised_tokens: int  # or pairs, or answers: what `counts` says
    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    unanswered: str | None = None
    rows: str = ""
    max_new_tokens: int = 0
    code: dict[str, str] = field(default_factory=dict)
    counts: str = "token"
    intervals: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)  # 95 %, by name

    def scored_by(self, metrics: Sequence[Metric]) -> bool:
        """Whether it has all these metrics' figures, by the same code."""
        return all(m.name in self.metrics and self.code.get(m.name, "") == m.code for m in metrics)

    def answers_to(self, asked: Sequence[Example], max_new_tokens: int) -> bool:
        """Whether its answers are to exactly these rows, and might be as long."""
        origins = [row.origin for row in asked]
        return self.max_new_tokens == max_new_tokens and [a.origin for a in self.answers] == origins

    def summary(self) -> dict[str, Any]:
        """For result.json: the figures without the answers."""
        perplexity = {"perplexity": self.perplexity} if self.counts == "token" else {}
        loss = {} if self.loss is None else {"loss": self.loss, **perplexity}
        return {**loss, **self.metrics}

    def line(self) -> str:
        """The loss and the metrics, for people."""
        figures = ({} if self.loss is None else {"held-out loss": self.loss}) | self.metrics
        return ", ".join(f"{figure_name(name)} {rounded(value)}" for name, value in figures.items())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: dict[str, Any]) -> "Evaluation":
        return Evaluation(**{**raw, "answers": [Answer(**row) for row in raw["answers"]]})


def evaluate_loss(model: Model, examples: Sequence[Example], *, display: Display, name: str) -> Evaluation:
    """The loss on all rows, nothing asked yet. Raises RunError where it isn't finite: it would look like a result."""
    with display.task(f"{name}: loss", len(examples)) as progress:
        loss, count = held_out_loss(model.forward, examples, progress=progress, say=display.say)
    if not math.isfinite(loss):
        raise RunError(f"the loss on the held-out rows is {loss}", fix="look at data.eval, or use dtype float32")
    return Evaluation(loss, perplexity(loss), count, rows=fingerprint(examples))


def add_answers(
    before: Evaluation,
    model: Model,
    examples: Sequence[Example],
    config: EvaluateConfig,
    metrics: Sequence[Metric],
    *,
    display: Display,
    name: str,
    every_row: bool = False,
) -> Evaluation:
    """Answers to all rows if a task metric or `every_row` is asked for, else to `samples` of them, and the metrics.
    Answers that `before` has already aren't asked for again. Raises RunError where the user's own metric fails."""
    asked, answers = rows_asked(model, examples, config, every_row=every_row), before.answers
    new, rows = list(metrics), fingerprint(examples)
    if before.rows != rows or not before.answers_to(asked, config.max_new_tokens):
        with display.task(f"{name}: answers", len(asked)) as progress:
            answers = answer(model, asked, config.max_new_tokens, progress=progress)
    else:
        new = [metric for metric in metrics if not before.scored_by([metric])]
    fresh = {metric.name: scored(metric, answers, display=display, name=name) for metric in new}
    figures = {metric.name: {**before.metrics, **fresh}[metric.name] for metric in metrics}
    code = {metric.name: metric.code for metric in metrics if metric.code}
    return replace(
        before,
        metrics=figures,
        answers=answers,
        unanswered=None,
        rows=rows,
        max_new_tokens=config.max_new_tokens,
        code=code,
    )


def scored(metric: Metric, answers: Sequence[Answer], *, display: Display, name: str) -> float:
    """A metric's figure. How long the user's own takes isn't known (it may ask a server), so its progress is shown."""
    if not metric.code:
        return metric.mean(answers)
    with display.task(f"{name}: {metric.name}", len(answers)) as progress:
        for number, row in enumerate(answers, 1):
            metric.of(row)  # which it keeps
            progress(number)
    return metric.mean(answers)


def rows_asked(
    model: Model, examples: Sequence[Example], config: EvaluateConfig, *, every_row: bool = False
) -> list[Example]:
    """The rows that are answered: all of them for a task metric or `every_row`, else `samples` of those with room for
    an answer. Raises InputError where all are asked and one has no room."""
    context = Limits.of(model.base.model).context

    def is_long(row: Example) -> bool:
        return context is not None and len(prompt_and_truth(row)[0]) >= context

    long = [row for row in examples if is_long(row)]
    every_row = every_row or bool(config.metrics)
    if every_row and long:
        raise InputError(
            f"evaluate.metrics: {len(long)} held-out rows leave no room for an answer in the {context:,} tokens of the "
            f"base, the first is {long[0].origin}",
            fix="set data.max_length lower, or leave evaluate.metrics out",
        )
    if every_row or not long:
        return list(examples) if every_row else spread(examples, config.samples)
    return spread([row for row in examples if not is_long(row)], config.samples)


def held_out_loss(
    forward: Forward, examples: Sequence[Example], *, progress: Progress = unseen, say: Say = unsaid
) -> tuple[float, int]:
    """(mean cross-entropy in nats over the supervised tokens, their count). 0 rows: (nan, 0)."""
    total, count, done = 0.0, 0, 0
    for numbers, batch, scores in scored_batches(forward, Weighed(examples), say=say):
        total, count, done = total + float(sft(scores, batch)), count + sft.count(batch), done + len(numbers)
        progress(done)
    return (total / count if count else math.nan), count


def answer(
    model: Model,
    examples: Sequence[Example],
    max_new_tokens: int,
    *,
    progress: Progress = unseen,
) -> list[Answer]:
    """What the model gives after each row's prompt, greedily."""
    split = [(example, *prompt_and_truth(example)) for example in examples]
    split = [(example, prompt, truth) for example, prompt, truth in split if prompt]
    sampling = Sampling(max_new_tokens=max_new_tokens)
    given = model.generate_all([prompt for _, prompt, _ in split], sampling, progress)
    decode = model.renderer.decode
    return [
        Answer(decode(prompt), text, decode(truth), example.origin)
        for (example, prompt, truth), text in zip(split, given, strict=True)
    ]


def truth_of(renderer: Renderer, example: Example) -> Answer:
    """A row with its truth in the place of an answer."""
    prompt, truth = (renderer.decode(tokens) for tokens in prompt_and_truth(example))
    return Answer(prompt, truth, truth, example.origin)


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` rows from all over the file: its first ones may be all alike (a dictionary's begin with a)."""
    return list(rows[:: max(1, len(rows) // max(1, count))][:count])


def perplexity(loss: float) -> float:
    """exp(loss); the largest number where that overflows, since JSON has no infinity."""
    return math.exp(loss) if loss < 700 else sys.float_info.max


def prompt_and_truth(example: Example) -> tuple[list[int], list[int]]:
    """How a row is asked, and what is its answer: (tokens before the last trained span, the span), which a prompt
    without one hasn't. A text: its first half asks."""
    trained = np.flatnonzero(example.loss_mask)
    end = int(trained[-1]) + 1
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[gaps[-1] + 1]) if len(gaps) else int(trained[0])
    if start <= max(1, example.context) and example.part not in (ASKED, ANSWERED):
        start = max(1, end // 2)
    tokens = [int(t) for t in example.tokens]
    return tokens[:start], [] if example.part == ASKED else tokens[start:end]
