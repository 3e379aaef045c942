"""Steps of a run on rewards: answers are sampled with the adapter as it stands, rewarded, and become a step's batches.

    prompts of step k          the next `objective.prompts` in the shuffled order of the epoch (data/loader.py)
    answers                    `objective.samples` to each, by the engine (generate/rollout.py); what answer s of prompt
                               p draws is a function of (train.seed, k, p, s) alone
    rewards                    of all answers at once (deltaw/rewards/)
    advantages                 within each group (base/rewarded.py)
    batches                    each answer behind its prompt, which its group computes once where that pays

So a step depends on the adapter, the seed and its number, and on nothing that was kept: a run that is killed at any
moment and resumed samples the same answers again and comes to the same bits (on a CPU, and if the reward gives the same
answers the same values). An answer that was cut off teaches nothing where `mask_truncated` says so: it counts in its
group's mean, and its tokens count nowhere. An answer without an advantage has no gradient (but for β's), so it isn't
passed; its tokens count in N.

A step without any advantage isn't taken: the watchdog skips it, and stops the run after ten of them in a row. Long
before that `Prospects` warns.

Several processes: each samples for its share of the prompts and is told what the others have sampled; the first one
asks for the rewards. From there on a step is what it always is.

Rejected: sampling the next step's answers while this one trains (they would be another model's, and a core is busy
anyway), and keeping groups without variance until a step is full of others (DAPO's dynamic sampling: a step would take
as long as luck has it).
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from deltaw.base.batch import Batch
from deltaw.config import RunConfig
from deltaw.data.dataset import Dataset
from deltaw.data.loader import Item, LoaderState, shuffled
from deltaw.evaluation.held_out import prompt_and_truth
from deltaw.generate.rollout import Sampled, sampled
from deltaw.generate.sampling import Sampling
from deltaw.model import Model
from deltaw.rewards.scored import Asked, Scored
from deltaw.training.checkpoint import TrainState
from deltaw.training.groups import Group, figures, laid, with_reference
from deltaw.training.prospects import Prospects
from deltaw.training.world import ALONE, World

Score = Callable[[Sequence[Asked]], Sequence[Scored]]


class Prompts:
    """The prompts of each step: all of an epoch in a shuffled order, so many at a time, the last ones fewer."""

    def __init__(self, count: int, per_step: int, seed: int) -> None:
        self._count, self._per_step, self._seed = count, per_step, seed

    @staticmethod
    def of_run(config: RunConfig, dataset: Dataset) -> "Prompts":
        """Those of a run."""
        return Prompts(len(dataset.train), config.objective.group[0], config.train.seed)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self._count // self._per_step)

    def of(self, at: LoaderState) -> list[int]:
        """The numbers of those of the step at `at`."""
        order: np.ndarray = shuffled(self._count, self._seed, at.epoch)
        return order[at.step * self._per_step : (at.step + 1) * self._per_step].tolist()

    def after(self, at: LoaderState) -> LoaderState:
        """Where the next step is."""
        return LoaderState(at.epoch + 1, 0) if at.step + 1 == self.steps else LoaderState(at.epoch, at.step + 1)


class Rollouts:
    """Iterates for ever over (the batches of a step, the state to resume at after it). A step is sampled when somebody
    asks for it, with the adapter as it is then. `state`: the run's, whose step says which it is."""

    def __init__(
        self,
        config: RunConfig,
        model: Model,
        dataset: Dataset,
        score: Score | None,
        state: TrainState,
        say: Callable[[str], None],
        *,
        shares: bool = False,
        world: World = ALONE,
    ) -> None:
        self._config, self._objective, self._model, self._dataset = config, config.objective, model, dataset
        self._score, self._state, self._shares, self._world = score, state, shares, world
        self._prompts = Prompts.of_run(config, dataset)
        self._prospects, self._figures, self._began = Prospects(config, say), dict[str, float](), 0.0

    def __iter__(self) -> Iterator[Item]:
        at = self._state.position
        while True:
            batches = self._batches(self._prompts.of(at))
            at = self._prompts.after(at)
            yield batches, at

    def completed(self, record: dict[str, Any]) -> dict[str, Any]:
        """A step's record with what its answers were like, and the seconds of each part of it."""
        self._prospects.see(self._figures, self._state.step)
        update = {"update_seconds": round(time.monotonic() - self._began, 3)}
        return {**record, **self._figures, **update}

    def _batches(self, numbers: Sequence[int]) -> list[Batch]:
        began = time.monotonic()
        groups = self._sampled(numbers)
        between = time.monotonic()
        groups = self._rewarded(groups)
        self._began = time.monotonic()
        seconds = {"sampling_seconds": round(between - began, 3), "reward_seconds": round(self._began - between, 3)}
        self._figures = {**figures(groups), **seconds}
        self._state.seconds += self._began - began
        batches = laid(groups, self._config, shares=self._shares, ranks=self._world.size)
        if not self._objective.beta:
            return batches
        forward = self._model.forward.at(self._objective.temperature or 1.0)
        return [with_reference(batch, forward, self._model.attached) for batch in batches]

    def _sampled(self, numbers: Sequence[int]) -> list[Group]:
        """The answers to these prompts, by all processes."""
        _, samples, longest = self._objective.group
        rows = [self._dataset.train[number] for number in numbers]
        prompts = [tuple(prompt_and_truth(row)[0]) for row in rows]
        words = f"{self._config.train.seed} {self._state.step} answers".encode()
        seed = int.from_bytes(hashlib.sha256(words).digest()[:8], "big") % 2**62
        sampling = Sampling(max_new_tokens=longest, temperature=self._objective.temperature or 1.0, seed=seed)
        mine = range(self._world.rank, len(prompts), self._world.size)
        leading = nullcontext() if self._model.attached is None else self._model.attached.leading()
        with leading:
            answers = sampled(
                self._model.base.model,
                [prompts[at] for at in mine],
                samples,
                sampling,
                self._model.renderer.stop_ids,
                first=[at * samples for at in mine],
            )
        every = dict(zip(mine, answers, strict=True))
        if not self._world.is_alone:
            own = [(at, [one.to_json() for one in group]) for at, group in every.items()]
            told = self._world.gathered(own, "the answers that were sampled")
            every = {at: [Sampled(*one) for one in group] for part in told for at, group in part}
        return [
            Group(prompt, row.origin, every[at]) for at, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]

    def _rewarded(self, groups: Sequence[Group]) -> list[Group]:
        questions, decode = self._dataset.questions[0], self._model.renderer.decode

        def score() -> list[Any]:
            asked = list[Asked]()
            for group in groups:
                asks = questions.of(group.origin)
                prompt = asks.prompt if isinstance(asks.prompt, str) else list(asks.prompt)
                asked += [
                    Asked(prompt, decode(one.text_tokens), asks.row, one.truncated, group.origin)
                    for one in group.answers
                ]
            assert self._score is not None
            return [(one.total, dict(one.parts)) for one in self._score(asked)]

        given = score() if self._world.is_alone else self._world.first(score, "the rewards")
        scored, samples = [Scored(*one) for one in given], self._objective.group[1]
        return [replace(group, scored=scored[at * samples : (at + 1) * samples]) for at, group in enumerate(groups)]
