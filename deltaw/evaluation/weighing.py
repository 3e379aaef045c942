"""Held-out answers, weighed: the objective's loss, and what it reports, over all of them.

Both answers of a pair are in one batch. Sums are added up over batches and divided once, so nothing depends on how rows
are batched (but for rounding). KTO's anchor is that of all the rows.

What the reference alone decides says nothing of the model that is the reference: of that, margin, accuracy, change and
divergence are left out, and how often the chosen answer is the likelier one by token is what there is to improve upon.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from deltaw.base.forward import Forward
from deltaw.base.objective import Objective
from deltaw.data.example import Example
from deltaw.data.examples import fingerprint
from deltaw.data.weighed import Weighed, mismatched
from deltaw.errors import RunError
from deltaw.evaluation.held_out import Evaluation
from deltaw.evaluation.intervals import Scores, interval
from deltaw.evaluation.scoring import Say, scored_batches, unsaid
from deltaw.model import Model
from deltaw.show.progress import Display, Progress, unseen

TRIVIAL = ("margin", "accuracy", "chosen_change", "kl", "anchor")  # of the reference itself


@dataclass
class Sums:
    """What is added up over batches: the loss, what it counts, and the objective's figures."""

    loss: float = 0.0
    count: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    right: list[bool] = field(default_factory=list)  # of each pair or answer, in any order

    @property
    def values(self) -> list[float]:
        return [self.loss, float(self.count), *self.figures.values()]


def weighed_sums(
    forward: Forward,
    weighed: Weighed,
    objective: Objective,
    units: Sequence[int] | None = None,
    *,
    progress: Progress = unseen,
    say: Say = unsaid,
) -> Sums:
    """Of all units of `weighed`, or of these."""
    total, done = Sums(figures=dict.fromkeys(objective.sums, 0.0)), 0
    for numbers, batch, logprobs in scored_batches(forward, weighed, units, say=say):
        total.loss += float(objective(logprobs, batch))
        total.count += objective.count(batch)
        total.right += objective.right(logprobs, batch)
        for name, value in objective.figures(logprobs, batch).items():
            total.figures[name] += value
        done += len(numbers)
        progress(done)
    return total


def anchor_of(forward: Forward, weighed: Weighed) -> float:
    """The mean over all mismatched answers of how much likelier they are than under the reference."""
    assert weighed.beside is not None
    examples = [mismatched(weighed.examples, number) for number in range(len(weighed.examples))]
    return float((summed_logprobs(forward, examples) - weighed.beside).mean())


def summed_logprobs(
    forward: Forward, examples: Sequence[Example], *, progress: Progress = unseen, say: Say = unsaid
) -> np.ndarray:
    """float64: the summed log-probability of each example's labels."""
    sums, done = np.zeros(len(examples)), 0
    for numbers, batch, logprobs in scored_batches(forward, Weighed(examples), say=say):
        sums[numbers] = batch.by_document(logprobs.logp_K).to("cpu", torch.float64).numpy()
        done += len(numbers)
        progress(done)
    return sums


def figures_of(sums: Sums, objective: Objective, *, is_reference: bool = False) -> dict[str, float]:
    """What a record says of them. `is_reference`: the model is the one that the objective compares with."""
    means = objective.means(sums.figures)
    return {name: value for name, value in means.items() if not (is_reference and name in TRIVIAL)}


def weighed_evaluation(
    forward: Forward, weighed: Weighed, objective: Objective, *, display: Display, name: str, is_reference: bool = False
) -> Evaluation:
    """The model as it stands on held-out answers, with the interval of its accuracy. Raises RunError where the loss
    isn't finite."""
    if objective.anchored:
        objective = objective.with_anchor(anchor_of(forward, weighed))
    with display.task(f"{name}: answers weighed", len(weighed.examples)) as progress:
        sums = weighed_sums(forward, weighed, objective, progress=progress, say=display.say)
    loss = sums.loss / sums.count if sums.count else math.nan
    if not math.isfinite(loss):
        raise RunError(f"the loss on the held-out rows is {loss}", fix="look at data.eval, or use dtype float32")
    figures = figures_of(sums, objective, is_reference=is_reference)
    ends: dict[str, tuple[float | None, float | None]] = {}
    if "accuracy" in figures:
        scores = Scores(np.array([[right, 1.0] for right in sums.right], float))
        found = interval(scores, 0)
        ends["accuracy"] = found.low, found.high
    rows = fingerprint(weighed.examples)
    return Evaluation(loss, 0.0, sums.count, figures, rows=rows, counts=objective.counts, intervals=ends)


def both_sides(
    model: Model,
    examples: Sequence[Example],
    objective: Objective,
    kept: np.ndarray | None,
    display: Display,
    *,
    use_adapter: bool,
    use_base: bool,
) -> tuple[Evaluation | None, Evaluation | None]:
    """The adapter and its base on held-out answers. `kept`: what the reference says of each where that isn't the base,
    but the adapter that the run started from."""
    attached, references, beside = model.attached, kept, None
    off = nullcontext if attached is None else attached.disabled
    if objective.references:
        with off(), display.task("the reference", len(examples)) as progress:
            if kept is None:
                references = summed_logprobs(model.forward, examples, progress=progress, say=display.say)
            if objective.anchored:
                others = [mismatched(examples, number) for number in range(len(examples))]
                beside = summed_logprobs(model.forward, others)
    weighed = Weighed(examples, references, beside)
    adapter = base = None
    if attached is not None and use_adapter:
        adapter = weighed_evaluation(model.forward, weighed, objective, display=display, name="adapter")
    if adapter is None or use_base:
        with off():
            same = objective.references and kept is None
            options: dict[str, Any] = {"display": display, "name": "base", "is_reference": same}
            base = weighed_evaluation(model.forward, weighed, objective, **options)
    return adapter, base
