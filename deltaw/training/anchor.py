"""The anchor of a step (KTO's): the mean over the mismatched answers of all its batches of how much likelier they are
than under the reference. It is asked before the step's passes, without gradient, so it doesn't hang on how these were
cut.

Of several learners in a pass each has that of its own answers; each process asks for its part of the batches.
"""

from collections.abc import Mapping, Sequence

import torch

from deltaw.base.batch import Batch
from deltaw.base.forward import Forward
from deltaw.training.learner import Learner
from deltaw.training.world import World


def anchors(
    forward: Forward, learners: Sequence[Learner], batches: Sequence[Batch], world: World, *, abreast: bool
) -> Mapping[int, float]:
    """By the number of the adapter, of the learners whose objective wants one."""
    wanting = [learner for learner in learners if learner.objective.anchored]
    if not wanting:
        return {}
    beside = [batch.beside for batch in batches if batch.beside is not None]
    device, numbers = wanting[0].attached.parameters[0].device, [learner.attached.number for learner in wanting]
    sums = {number: [0.0, 0.0] for number in numbers}
    alone = world.is_alone or abreast  # a pass of shards takes all processes, so each asks for all
    with torch.no_grad():
        for batch in beside if alone else beside[world.rank :: world.size]:
            logp_D = batch.by_document(forward.logprobs(batch.to(device)).cpu()).double()
            change_D = logp_D - logp_D.new_tensor(batch.references)
            for owner, change in zip(batch.updates or (numbers[0],) * batch.examples, change_D.tolist(), strict=True):
                if owner in sums:
                    sums[owner][0] += change
                    sums[owner][1] += 1
    every = [value for number in numbers for value in sums[number]]
    if not alone:
        every = world.sums(every, f"the anchor of step {wanting[0].state.step + 1}")
    return {number: every[2 * at] / max(every[2 * at + 1], 1) for at, number in enumerate(numbers)}
