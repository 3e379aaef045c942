"""The largest step of a run on rewards, imagined before any answer is sampled: the longest prompts, each with all of
its answers as long as they may become, and every one of them passed.

So what is planned and tried (plan.py, preflight.py) is the most that can come. Real answers end sooner, and those whose
group is flat aren't passed.
"""

from dataclasses import replace

import numpy as np

from deltaw.evaluation.held_out import prompt_and_truth
from deltaw.generate.rollout import Sampled
from deltaw.rewards.scored import Scored
from deltaw.training.groups import Group, cut, taken_of
from deltaw.training.largest import Work
from deltaw.training.length import tokens_of_step
from deltaw.training.opening import Opened


def imagined_groups(opened: Opened) -> list[Group]:
    """Those of the largest step. The first of their answers is worth something and the others aren't."""
    prompts, samples, longest = opened.config.objective.group
    rows = opened.dataset.train
    asked = rows.lengths - rows.supervised
    groups = []
    for number in np.argsort(-asked, kind="stable")[:prompts].tolist():
        prompt = tuple(prompt_and_truth(rows[number])[0])
        answers = [Sampled([prompt[-1]] * longest, [0.0] * longest, truncated=False) for _ in range(samples)]
        scored = [Scored(float(not sample)) for sample in range(samples)]
        groups.append(Group(prompt, rows.origin(number), answers, scored))
    return groups


def imagined_work(opened: Opened, left: int) -> Work:
    """Of the `left` steps that are to come: no step left, all zeros."""
    if not left:
        return Work(0, 0, 0, 0, [], 0, 0)
    config = opened.config.model_copy(
        update={"objective": opened.config.objective.model_copy(update={"scale": "none"})}
    )
    taken, _ = taken_of(imagined_groups(opened), config)
    parts = cut(taken, config.train.batch_tokens, shares=opened.shares, ranks=opened.world.size)
    whole = [sum(len(example.tokens) for example in part.examples) for part in parts]
    costs = [sum(part.costs()) for part in parts]
    tokens = left * tokens_of_step(config, opened.dataset)
    prompts, samples, longest = config.objective.group
    supervised = left * min(prompts, len(opened.dataset.train)) * samples * longest
    part = parts[int(np.argmax(costs))]
    # As separate documents, so that smaller passes can be cut out of them.
    documents = [replace(one, origin=part.examples[0].origin) for one in part.documents()]
    computed = round(tokens * sum(costs) / sum(whole))
    return Work(left, tokens, computed, supervised, documents, len(parts), max(costs), part)
