"""The largest pieces of work that a run will meet, known from the lengths of its rows, without the model.

The rows of step k are a function of these lengths (data/loader.py), and so are the batches in which rows are
evaluated. Memory is decided by the largest of each.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from deltaw.base.batch import Batch
from deltaw.config import TrainConfig
from deltaw.data.example import Example
from deltaw.data.examples import lengths_of, supervised_of
from deltaw.data.loader import LoaderState, Plan, Units
from deltaw.data.pack import pack
from deltaw.data.sharing import Shared
from deltaw.evaluation import batches, forgetting

LOOKING = 5.0  # seconds spent looking for the largest batch of the run


@dataclass(frozen=True)
class Work:
    """What is left of a run, counted. `longest`: the examples of its largest batch, of which `batches` make a step;
    where examples share prefixes (`sharing`), its documents, each an example by itself."""

    steps: int
    tokens: int
    computed: int  # of these; the others are of prefixes that are computed once for several examples
    supervised: int
    longest: list[Example]
    batches: int
    first: int  # tokens of the largest batch of the next step
    sharing: Shared | None = None
    pieces: tuple[Example, ...] = ()  # of `longest`, those of `train.retain`
    general: int = 0  # tokens of `train.retain` that are left, besides

    @property
    def longest_tokens(self) -> int:
        return count_tokens(self.longest)

    @property
    def longest_supervised(self) -> int:
        return sum(int(example.loss_mask.sum()) for example in self.longest)

    @property
    def shared(self) -> float:
        """Of the tokens, those that needn't be computed."""
        return 1 - self.computed / max(1, self.tokens)

    def batch(self) -> Batch:
        """The largest one."""
        if self.sharing is None:
            return pack(self.longest)
        batch = self.sharing.pack()
        return batch.followed_by(pack(self.pieces)) if self.pieces else batch


def shared_line(shared: float) -> list[str]:
    """What is to be said of such a share of the tokens, if there is one."""
    return [f"{shared:.0%} of the tokens are of shared prefixes, computed once"] if shared else []


def work_left(
    examples: Sequence[Example],
    config: TrainConfig,
    position: LoaderState,
    steps: int,
    ranks: int = 1,
    shares: bool = False,
) -> Work:
    """The next `steps` steps from `position`. No step left: all zeros, and no longest batch.

    Every step is looked at, for up to `LOOKING` seconds; in a longer run those that were seen stand for the others.
    `ranks`: how many processes take the steps together; `shares`: examples share their common beginnings.
    """
    units = Units(examples)
    lengths, trained = units.lengths, units.summed(supervised_of(examples))
    seen, tokens, computed, supervised, until = 0, 0, 0, 0, time.monotonic() + LOOKING
    largest, longest, batches, first = (0, 0), list[int](), 0, 0
    sharing: Shared | None = None
    for plan, number in islice(_steps(lengths, config, position, ranks), steps):
        numbers = plan.numbers(number)
        tokens, supervised = tokens + int(lengths[numbers].sum()), supervised + int(trained[numbers].sum())
        shared = units.shared(examples, numbers.tolist()) if shares else None
        alike = shared.batches(config.batch_tokens, ranks) if shared else []
        sizes = [(sum(part.costs()), len(part.examples)) for part in alike]
        step = [] if alike else plan[number]
        sizes += [(int(lengths[batch].sum()), int(trained[batch].sum())) for batch in step]
        for at, size in enumerate(sizes):
            computed += size[0]
            if size > largest:
                largest, batches, sharing = size, len(sizes), alike[at] if alike else None
                longest = [] if alike else step[at]
            first = max(first, size[0]) if not seen else first
        seen += 1
        if time.monotonic() > until:
            break
    tokens, computed, supervised = (count * steps // max(1, seen) for count in (tokens, computed, supervised))
    documents = sharing.documents() if sharing else [examples[n] for n in units.examples_of(longest)]
    return Work(steps, tokens, computed, supervised, documents, batches, first, sharing)


def _steps(lengths: np.ndarray, config: TrainConfig, position: LoaderState, ranks: int) -> Iterator[tuple[Plan, int]]:
    """(the steps of an epoch, the number of one), for ever."""
    sizes = {"tokens_per_step": config.step_tokens, "tokens_per_batch": config.batch_tokens}
    epoch, start = position.epoch, position.step
    while True:
        steps = Plan(lengths, **sizes, seed=config.seed, epoch=epoch, ranks=ranks)
        yield from ((steps, number) for number in range(start, len(steps)))
        epoch, start = epoch + 1, 0


def largest_chunk(general: Sequence[Example]) -> list[Example]:
    """The largest batch that `forgetting` takes."""
    return _longest(general, forgetting.TOKENS_AT_ONCE)


def largest_evaluation(examples: Sequence[Example]) -> list[Example]:
    """The largest batch that `held_out_loss` takes."""
    return _longest(examples, batches.TOKENS_AT_ONCE)


def _longest(examples: Sequence[Example], room: int) -> list[Example]:
    """Rows of like length are measured together (evaluation/batches.py): as many of the longest as have room."""
    taken = list[Example]()
    for number in np.argsort(-lengths_of(examples), kind="stable"):
        taken.append(examples[number])
        room -= len(taken[-1].tokens)
        if room < 0:
            return taken[: max(1, len(taken) - 1)]
    return taken


def count_tokens(examples: Sequence[Example]) -> int:
    return int(lengths_of(examples).sum())
