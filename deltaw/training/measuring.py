"""How a run is measured: by the loss on held-out rows, by answers to them, and by what was forgotten.

A measurement may fail. A run's work must not be lost to something that only looks at it, so whatever is measured once
there is something to lose (answers beside the base's loss, samples on the way, the adapter at the end, the page) goes
through `Attempts`. What raises there is reported in a line and noted by name, for result.json's `failed`. A signal
isn't an Exception and gets through: then the run stops, and can be resumed from there.

The work has names, so that an out-of-memory error says what was too large (memory.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from deltaw.base.objective import Objective, sft
from deltaw.config import EvaluateConfig
from deltaw.data.example import Example
from deltaw.errors import DeltawError, InputError, command, with_kind
from deltaw.evaluation.forgetting import Forgetting, forgetting
from deltaw.evaluation.held_out import (
    Evaluation,
    add_answers,
    answer,
    evaluate_loss,
    held_out_loss,
    perplexity,
    rows_asked,
)
from deltaw.evaluation.weighing import weighed_evaluation
from deltaw.model import Model
from deltaw.run import Run
from deltaw.show.progress import QUIET, Display
from deltaw.show.text import framed, one_line
from deltaw.training.learner import Learner
from deltaw.training.memory import OutOfMemory, release, working_on
from deltaw.training.opening import Opened
from deltaw.training.references import held_out
from deltaw.training.rewarding import REWARD, rewarded_evaluation
from deltaw.training.watch import CannotGoOn
from deltaw.training.world import ALONE, World

FORGOTTEN, ANSWERS, LOSS = "measuring what was forgotten", "answering rows", "measuring the loss on held-out rows"
Result = TypeVar("Result")


class Attempts:
    """`failed`: why, by the name of what was tried. `explain`: what to say of OutOfMemory."""

    def __init__(
        self, device: torch.device, say: Callable[[str], None], explain: Callable[[BaseException], DeltawError | None]
    ) -> None:
        self.failed: dict[str, str] = {}
        self._device, self._say, self._explain = device, say, explain

    def __call__(self, name: str, work: Callable[[], Result], *, what: str) -> Result | None:
        """What `work` returns, or None where it raised. `what`: what is then missing, in words."""
        release(self._device)
        self.failed.pop(name, None)
        try:
            return work()
        except Exception as error:
            self.note(name, error, what=what)
            return None

    def note(self, name: str, error: Exception, *, what: str) -> None:
        """`error` is why something couldn't be had."""
        reason = self._reason(error)
        self.failed[name] = reason.splitlines()[0]
        self._say(f"warning: {what}: {reason}")

    def _reason(self, error: Exception) -> str:
        explained = self._explain(error) if isinstance(error, OutOfMemory) else None
        if isinstance(error := explained or error, DeltawError):
            return error.what
        return with_kind(error)


def measure_base(opened: Opened, run: Run, attempts: Attempts, display: Display) -> Evaluation | None:
    """Measure the base on the held-out rows, once per run; a metric that was added since, by its answers. Nothing has
    been spent yet, so a failure is an error, unless it is answers that no metric needs."""
    rows, config = opened.dataset.eval, opened.config.evaluate
    if not rows:
        return None
    known = Evaluation.from_json(run.read_json(run.before)) if run.before.is_file() else None
    if known and known.scored_by(opened.metrics) and known.max_new_tokens in (0, opened.answering.max_new_tokens):
        return known
    known = None if opened.is_rewarded else known
    with opened.attached.disabled():
        release(opened.device)
        before = known or measured(opened, display, "before")
        try:
            before = with_answers(before, opened, display, "before") if opened.is_answered else before
        except InputError as error:  # so it will be after training, too
            if config.metrics:
                raise
            display.say(f"no answers to held-out rows: {error.what}")
            before = replace(before, unanswered=error.what)
        except Exception as error:
            if config.metrics:
                raise
            attempts.note("answers", error, what="no answers from the base")
    run.write_json(run.before, before.to_json())
    display.say(f"before: {before.line()}")
    return before


def measured(opened: Opened, display: Display, name: str) -> Evaluation:
    """The loss of all held-out rows; of preferences with what the objective says of them; of prompts the reward of the
    answers. Raises RunError where it isn't finite."""
    rows = opened.dataset.eval
    if opened.is_rewarded:
        with working_on(ANSWERS):
            return rewarded_evaluation(opened, display=display, name=name)
    if opened.is_answered:
        return loss_on(opened.model, rows, display, name)
    forward, weighed, objective = opened.model.forward, opened.weighed("eval"), opened.objective
    same = name == "before" and opened.lineage.started_from is None and objective.references
    with working_on(LOSS):
        return weighed_evaluation(forward, weighed, objective, display=display, name=name, is_reference=same)


def loss_on_the_way(opened: Opened, world: World) -> tuple[float, dict[str, float]]:
    """The loss of all held-out rows, finite or not (of prompts minus the reward), and what the objective says of
    them."""
    if opened.is_rewarded:
        with working_on(ANSWERS):
            figures = rewarded_evaluation(opened, world=world, metrics=False).metrics
        return -figures[REWARD], figures
    if opened.is_answered:
        return plain_loss(opened.model, opened.dataset.eval, world), {}
    return held_out(opened, world)


def loss_on(model: Model, rows: Sequence[Example], display: Display, name: str) -> Evaluation:
    """The loss of all rows. Raises RunError where it isn't finite."""
    with working_on(LOSS):
        return evaluate_loss(model, rows, display=display, name=name)


def plain_loss(model: Model, rows: Sequence[Example], world: World = ALONE) -> float:
    """The same as a number, finite or not. Several processes take about as many tokens each."""
    by_length = sorted(rows, key=lambda row: len(row.tokens)) if not world.is_alone else rows
    with working_on(LOSS):
        loss, count = held_out_loss(model.forward, by_length[world.rank :: world.size])
    if world.is_alone:
        return loss
    total, counted = world.sums([loss * count if count else 0.0, count], "the loss on held-out rows")
    return total / counted if counted else math.nan


def with_answers(evaluation: Evaluation, opened: Opened, display: Display, name: str) -> Evaluation:
    """The same with the answers of the model as it stands."""
    rows, config = opened.dataset.eval, opened.config.evaluate
    with working_on(ANSWERS):
        return add_answers(evaluation, opened.model, rows, config, opened.metrics, display=display, name=name)


def what_was_forgotten(model: Model, rows: Sequence[Example], source: str = "", display: Display = QUIET) -> Forgetting:
    """On general text, of the adapter as it stands."""
    with working_on(FORGOTTEN):
        return forgetting(model, source, rows, display)


def samples(model: Model, rows: Sequence[Example], config: EvaluateConfig) -> list[str]:
    """Answers to some held-out rows, a line each."""
    asked = rows_asked(model, rows, config.model_copy(update={"metrics": ()}))
    with working_on(ANSWERS):
        answers = answer(model, asked, config.max_new_tokens)
    _, prompts, _ = framed([a.prompt for a in answers])
    lines = (
        [one_line(text, 80, end=True) for text in (prompt, a.given, a.truth)]
        for prompt, a in zip(prompts, answers, strict=True)
    )
    return [f"{prompt} → {given}   [truth: {truth}]" for prompt, given, truth in lines]


def record_of(step: int, loss: float, figures: Mapping[str, float], objective: Objective) -> dict[str, Any]:
    """A line of metrics.jsonl on held-out rows."""
    if not objective.has_loss:
        return {"step": step, **{f"eval_{name}": value for name, value in figures.items()}}
    more = {"eval_perplexity": perplexity(loss)} if objective is sft else {}
    return {"step": step, "eval_loss": loss, **more, **{f"eval_{name}": value for name, value in figures.items()}}


def held_out_words(loss: float, figures: Mapping[str, float]) -> str:
    """What the rows held out say, for people."""
    if REWARD in figures:
        return f"held-out reward {figures[REWARD]:.4f}"
    return f"held-out loss {loss:.4f}" + (f", accuracy {figures['accuracy']:.3f}" if "accuracy" in figures else "")


def note_evaluation(
    loss: float, figures: Mapping[str, float], learner: Learner, run: Run, display: Display
) -> dict[str, Any]:
    """The record of a held-out loss on the way. Raises CannotGoOn where it isn't finite, unless no step is left that
    could be wasted."""
    step = learner.state.step
    if math.isfinite(loss):
        best = learner.note_evaluation(loss)
        display.say(f"step {step}: {held_out_words(loss, figures)}" + ("  (best so far)" if best else ""))
        return record_of(step, loss, figures, learner.objective)
    what = f"step {step}: the held-out loss is {loss}"
    if step < learner.total:
        without = command("train", run.folder, "train.eval_every=null", options=["--allow"])
        raise CannotGoOn(what, fix=f"lower train.lr, or look at data.eval; to keep the adapter without it: {without}")
    display.say(f"warning: {what}")
    learner.note_evaluation(loss)
    return {"step": step, "eval_not_finite": str(loss)}
