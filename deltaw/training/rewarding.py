"""Held-out prompts of a run on rewards: answered greedily, and rewarded.

The mean reward of these answers is what a run is judged by: the adapter of the step that has the highest is kept. They
are as long as answers are in training (`objective.max_new_tokens`), but at temperature 0, since that is how most
adapters are asked, and so that the figure has no noise of the sampling. Where the rows have answers of their own, the
metrics of `evaluate.metrics` are of the same greedy answers.

Learner, checkpoints and patience look for what is lowest: they are told minus the reward.
"""

from contextlib import ExitStack
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from deltaw.data.examples import fingerprint
from deltaw.evaluation.held_out import Evaluation, prompt_and_truth, scored
from deltaw.evaluation.intervals import Scores, interval
from deltaw.evaluation.metrics import Answer
from deltaw.generate.rollout import Sampled, sampled
from deltaw.generate.sampling import Sampling
from deltaw.rewards.scored import Asked, Scored
from deltaw.show.progress import QUIET, Display
from deltaw.training.groups import PART
from deltaw.training.opening import Opened
from deltaw.training.scoring import open_rewards
from deltaw.training.world import ALONE, World

REWARD = "reward"


def with_rewards(opened: Opened, stack: ExitStack) -> Opened:
    """The same with its rewards open until `stack` ends, where it has some and this process asks them."""
    if not opened.is_rewarded or not opened.world.is_first:
        return opened
    return replace(opened, score=stack.enter_context(open_rewards(opened.config, opened.dataset, opened.consent)))


def rewarded_evaluation(
    opened: Opened, *, display: Display = QUIET, name: str = "", world: World = ALONE, metrics: bool = True
) -> Evaluation:
    """The model as it stands on the held-out prompts. Several processes answer as many each."""
    rows, decode, longest = opened.dataset.eval, opened.model.renderer.decode, opened.config.objective.group[2]
    split = [prompt_and_truth(row) for row in rows]
    answers = _answers(opened, [prompt for prompt, _ in split], display, name, world)
    texts = [decode(answer.text_tokens) for answer in answers]

    def score() -> list[Any]:
        assert opened.score is not None, "the rewards aren't open"
        asked = list[Asked]()
        for row, text, answer in zip(rows, texts, answers, strict=True):
            asks = opened.dataset.questions[1].of(row.origin)
            prompt = asks.prompt if isinstance(asks.prompt, str) else list(asks.prompt)
            asked.append(Asked(prompt, text, asks.row, answer.truncated, row.origin))
        return [(one.total, dict(one.parts)) for one in opened.score(asked)]

    given = score() if world.is_alone else world.first(score, "the rewards of held-out prompts")
    worth = [Scored(*one) for one in given]
    pairs = [
        Answer(decode(prompt), text, decode(truth), row.origin)
        for row, (prompt, truth), text in zip(rows, split, texts, strict=True)
    ]
    totals = [one.total for one in worth]
    ends = interval(Scores(np.array([[total, 1.0] for total in totals], float)), 0)
    asked_for = opened.metrics if metrics else ()
    parts = dict.fromkeys(name for one in worth for name in one.parts)
    figures = {REWARD: fmean(totals)}
    if len(parts) > 1:
        figures |= {PART + part: fmean(one.parts.get(part, 0.0) for one in worth) for part in parts}
    figures["truncated"] = fmean(answer.truncated for answer in answers)
    figures |= {metric.name: scored(metric, pairs, display=display, name=name) for metric in asked_for}
    return Evaluation(
        None,
        0.0,
        len(rows),
        figures,
        pairs,
        rows=fingerprint(rows),
        max_new_tokens=longest,
        code={metric.name: metric.code for metric in asked_for if metric.code},
        counts="answer",
        intervals={REWARD: (ends.low, ends.high)},
    )


def _answers(opened: Opened, prompts: list[list[int]], display: Display, name: str, world: World) -> list[Sampled]:
    mine = range(world.rank, len(prompts), world.size)
    sampling = Sampling(max_new_tokens=opened.config.objective.group[2])
    model, stops = opened.model.base.model, opened.model.renderer.stop_ids
    with display.task(f"{name}: answers", len(mine)) as progress:
        own = sampled(model, [prompts[at] for at in mine], 1, sampling, stops, progress=progress)
    answers = {at: answer for at, (answer,) in zip(mine, own, strict=True)}
    if not world.is_alone:
        told = world.gathered([(at, one.to_json()) for at, one in answers.items()], "the answers to held-out prompts")
        answers = {at: Sampled(*one) for part in told for at, one in part}
    return [answers[at] for at in range(len(prompts))]
