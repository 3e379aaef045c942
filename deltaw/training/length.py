"""How long a run is: the size of its steps where the run file leaves it open, and how many there are.

    step = min(4,096, max(4 documents of mean length, tokens of the whole run / 25))

So a run over little data has some 25 steps, as long as a step keeps a few documents (the gradient of one or two is
mostly noise), and one over data of ordinary size, which is all above 100,000 tokens, has steps of 4,096. It is settled
once, when the run opens, and written into its config.yaml: a run that is resumed never decides again. Where
`train.steps` sets the length, the whole run is taken to be one epoch: else twelve rows would be a single step, taken
hundreds of times.

Below `FEW` steps a rate never gets to do its work, warm-up and decay included, and a run says so before it begins.
Rejected: more epochs by default where the data is small (how often rows are seen decides how much is learnt by heart:
the user's to say).
"""

import math
from fractions import Fraction
from typing import Any

from deltaw.config import RunConfig
from deltaw.data.dataset import Dataset
from deltaw.data.loader import Loader, LoaderState
from deltaw.data.weighed import Weighed
from deltaw.errors import InputError
from deltaw.show.text import counted
from deltaw.training.optim import warmup_steps
from deltaw.training.rollouts import Prompts

USUAL, WANTED, DOCUMENTS = 4096, 25, 4  # tokens of a step; steps of a run over little data; documents in one of them
FEW = 20  # steps


def settle_step(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The config with `train.tokens_per_step` as a number; a run on rewards has none."""
    if config.train.tokens_per_step is not None or config.objective.is_rewarded:
        return config
    tokens, epochs = dataset.report.tokens, 1.0 if config.train.steps else config.train.epochs
    few = math.ceil(DOCUMENTS * tokens / len(dataset.train.units))
    size = min(USUAL, max(few, math.ceil(tokens * epochs / WANTED)))
    return _with(config, tokens_per_step=size)


def count_steps(config: RunConfig, dataset: Dataset) -> int:
    """Of the whole run. Raises InputError where its warm-up is no shorter."""
    total = config.train.steps or _steps_of(config, dataset)
    warmup = warmup_steps(total, config.train)
    if warmup >= total:
        raise InputError(
            f"train.warmup_steps is {warmup} of {total} steps, so the run would never reach train.lr",
            fix="lower it, or leave it out (null): a short run then takes a tenth of its steps",
        )
    return total


def _steps_of(config: RunConfig, dataset: Dataset) -> int:
    """Of `train.epochs`."""
    if config.objective.is_rewarded:
        epoch = Prompts.of_run(config, dataset).steps
        return max(1, math.ceil(Fraction(repr(config.train.epochs)) * epoch))
    return make_loader(config, dataset, LoaderState()).total_steps(config.train.epochs)


def tokens_of_step(config: RunConfig, dataset: Dataset) -> int:
    """The most tokens of a step: of a run on rewards about, if no answer ends before its time."""
    if not config.objective.is_rewarded:
        return config.train.step_tokens
    prompts, samples, longest = config.objective.group
    asked = float((dataset.train.lengths - dataset.train.supervised).mean())
    return round(min(prompts, len(dataset.train)) * samples * (asked + longest))


def make_loader(
    config: RunConfig,
    dataset: Dataset,
    position: LoaderState,
    ranks: int = 1,
    shares: bool = False,
    weighed: Weighed | None = None,
) -> Loader:
    """The steps of a run from `position` on, for so many processes. `shares`: examples share what is computed of their
    common beginnings; `weighed`: with what a reference says of them."""
    train = config.train
    return Loader(dataset.train, train.step_tokens, train.batch_tokens, train.seed, position, ranks, shares, weighed)


def for_ranks(config: RunConfig, dataset: Dataset, ranks: int) -> list[str]:
    """What is to be said of a run by so many processes. Raises InputError where a step hasn't a document for each."""
    if ranks == 1:
        return []
    if config.objective.is_rewarded:
        prompts = min(config.objective.group[0], len(dataset.train))
        if prompts < ranks:
            fix = f"start no more than {prompts}, or set objective.prompts to {ranks}"
            raise InputError(f"a step has {prompts} prompts, and {ranks} processes want one each", fix=fix)
        return [f"{ranks} processes train together: each samples for its share of the {prompts} prompts of a step"]
    step, rows = config.train.step_tokens, len(dataset.train.units)
    steps = make_loader(config, dataset, LoaderState()).steps_in_epoch(0)
    if rows < ranks * steps:
        each = rows / steps
        most = f"no more than {int(each)} processes" if each >= 2 else "one process"
        larger = math.ceil(1.2 * ranks * dataset.report.tokens / rows)
        raise InputError(
            f"a step of train.tokens_per_step, {step:,}, has {each:.1f} rows, and {ranks} processes want one each",
            fix=f"start {most}" + (f", or set train.tokens_per_step to {larger:,}" if rows >= ranks else ""),
        )
    share, batch = math.ceil(step / ranks), config.train.batch_tokens
    size = f"batches of about {share:,} tokens instead of {batch:,}: " if share < batch else ""
    return [f"{ranks} processes train together, {size}a step has {step:,} tokens as with one"]


def notes(asked: RunConfig, config: RunConfig, total: int) -> list[str]:
    """What was decided about a run's length, and what it makes idle. `asked`: before `settle_step`."""
    train, length, lines = config.train, f"the run has {counted(total, 'step')}", list[str]()
    if asked.train.tokens_per_step is None and not config.objective.is_rewarded and train.step_tokens < USUAL:
        lines.append(f"train.tokens_per_step: {train.step_tokens:,} instead of {USUAL:,}, since the data is small")
    if train.eval_every and train.eval_every > total:
        patience = ", and train.patience never counts" if train.patience else ""
        lines.append(f"train.eval_every: {train.eval_every:,}, but {length}: it is evaluated at the end only{patience}")
    if train.sample_every and train.sample_every > total:
        lines.append(f"train.sample_every: {train.sample_every:,}, but {length}: no samples will show")
    return lines


def warnings(asked: RunConfig, config: RunConfig, dataset: Dataset, total: int) -> list[str]:
    """That a run's steps are few, and what would make them more. Whoever sets `train.steps` knows."""
    if total >= FEW or config.train.steps:
        return []

    def steps(**train: Any) -> int:
        return count_steps(settle_step(_with(asked, **train), dataset), dataset)

    epochs = math.ceil(config.train.epochs * FEW / total)
    while steps(epochs=float(epochs)) < FEW:  # a step of the same size may be one more or less an epoch
        epochs += 1
    ways = [f"train.epochs={epochs}"]
    if config.objective.is_rewarded:
        return [f"only {counted(total, 'step')} will be taken: set {ways[0]} or objective.prompts lower"]
    smaller = settle_step(_with(config, tokens_per_step=None), dataset).train.step_tokens
    if smaller < config.train.step_tokens and steps(tokens_per_step=smaller) > total:
        ways.append(f"train.tokens_per_step={smaller}")
    few = f"only {counted(total, 'step')} will be taken, and with fewer than {FEW} little is learnt"
    return [f"{few}: set {' or '.join(ways)}"]


def _with(config: RunConfig, **train: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})
