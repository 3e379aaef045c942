"""A run before its weights are read: whatever can be checked and opened of it without them, cheapest checks first."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltaw.adapter.ends import Ends, find_ends
from deltaw.adapter.history import NOTHING, History
from deltaw.adapter.targets import find_targets
from deltaw.base.limits import Limits
from deltaw.base.load import check_weights, open_skeleton, pick_device, read_config
from deltaw.base.recompute import blocks_of, check_blocks, check_device
from deltaw.base.source import Source, find_base
from deltaw.config import RunConfig
from deltaw.data.added import Token
from deltaw.data.dataset import Dataset
from deltaw.data.examples import Examples
from deltaw.data.opening import open_dataset
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.evaluation.held_out import truth_of
from deltaw.evaluation.metrics import Metric
from deltaw.evaluation.own_metric import ASKED_FOR, Consent, open_metrics, try_out
from deltaw.show.progress import Display
from deltaw.show.text import counted
from deltaw.training import length
from deltaw.training.length import count_steps, settle_step
from deltaw.training.log import check_loggers
from deltaw.training.memory import bound_caches
from deltaw.training.retain import retained_text, scarce_text
from deltaw.training.scoring import check_prompts, open_rewards
from deltaw.training.start import Start, open_start
from deltaw.training.world import ALONE, World

OpenRows = Callable[[RunConfig, Display, Source], tuple[Source, Renderer, Dataset]]


@dataclass(frozen=True)
class Ground:
    """What lies on the disk of the base that one run or several train on: where, its config, its modules without
    weights."""

    source: Source
    known: Any
    skeleton: nn.Module

    @staticmethod
    def of(config: RunConfig, display: Display) -> "Ground":
        """Raises InputError where there is no such base, or its weights can't be kept as is asked."""
        source = find_base(config.base, display=display)
        known = read_config(source)
        skeleton = open_skeleton(source, known)
        check_weights(source, config.base_weights, skeleton)
        return Ground(source, known, skeleton)


def check_trained_ends(config: RunConfig, skeleton: nn.Module) -> None:
    """Raise InputError for an embedding or a head that can't be trained as is asked, or not with what else is."""
    head = Ends.of(skeleton).head
    ways = find_ends(skeleton, config.adapter)
    if config.train.retain is not None and head is not None and (config.adapter.tokens or head in ways):
        raise InputError(
            "train.retain holds answers to the base's head, and here the head is trained, too",
            fix="leave out train.retain, or adapter.tokens and the head in adapter.also",
        )


def occurrences(tokens: Sequence[Token], dataset: Dataset) -> Iterator[str]:
    """For logs: in how many rows each of the tokens that are trained by name stands. Raises InputError where some stand
    in none, so that nothing would be learnt of them."""
    rows = {token.text: int(dataset.train.train_any({token.id}, anywhere=True).sum()) for token in tokens}
    if missing := [text for text, count in rows.items() if not count]:
        raise InputError(
            f"adapter.tokens: no row that is trained on has {' or '.join(map(repr, missing[:5]))}",
            fix="write them as the rows have them, or leave them out",
        )
    if tokens:
        added = sum(bool(token.pieces) for token in tokens)
        yield (
            f"{counted(len(tokens), 'token')} trained by name, {added} of them new to the tokenizer: "
            + ", ".join(f"{text} in {counted(count, 'row')}" for text, count in list(rows.items())[:5])
            + (", …" if len(rows) > 5 else "")
        )


@dataclass(frozen=True)
class Looked:
    """A run before its weights are read: settings that the data has settled, the adapter that it starts from, its rows,
    its length, its metrics."""

    config: RunConfig
    start: Start | None
    ground: Ground
    renderer: Renderer
    dataset: Dataset
    total: int
    metrics: tuple[Metric, ...]
    lineage: History
    retained: Examples  # of train.retain
    consent: Consent = ASKED_FOR


@dataclass(frozen=True)
class Terms:
    """On what terms a run is opened. `consent`: to a metric of the user's own that the config names. `lineage`: the
    run's, if it has begun. `start_is_needed`: not where a checkpoint is there, which has more than the adapter that it
    started from. `world`: the processes that train it together."""

    consent: Consent = ASKED_FOR
    lineage: History = NOTHING
    start_is_needed: bool = True
    world: World = ALONE


NEW = Terms()  # asked for here and now, by one process


def look(
    config: RunConfig,
    display: Display,
    terms: Terms = NEW,
    *,
    ground: Ground | None = None,
    rows: OpenRows = open_dataset,
) -> Looked:
    """Whatever can be checked and read of a run without its weights. `ground`: the base, where it is found already;
    `rows`: what opens the data. What it raises: `open_run`."""
    check_loggers(config.train.log_to)
    check_device(config.train.checkpointing, pick_device(config.train.device))
    bound_caches()
    metrics = open_metrics(config.evaluate.metrics, terms.consent)
    ground = ground or Ground.of(config, display)
    skeleton, recorded = ground.skeleton, terms.lineage.started_from
    config, start = open_start(config, skeleton, recorded, needed=terms.start_is_needed, say=display.say)
    # On the modules alone; attach asks again, of layers that it has tried.
    targets = find_targets(skeleton, config.adapter)
    check_trained_ends(config, skeleton)
    if targets.words:
        display.say(f"adapted: {targets.words}")
    check_blocks(config.train.checkpointing, blocks_of(skeleton, targets.paths))
    _, renderer, dataset = rows(config, display, ground.source)
    limits = Limits.of(skeleton).knowing(token.id for token in renderer.tokens)
    limits.check(dataset.rows)
    for line in occurrences(renderer.tokens, dataset):
        display.say(line)
    for row in dataset.eval[:1]:
        try_out(metrics, truth_of(renderer, row))
    if config.objective.is_rewarded:
        check_prompts(config, dataset, limits)
        if terms.world.is_first:
            open_rewards(config, dataset, terms.consent).close()
    asked, config = config, settle_step(config, dataset)
    total = count_steps(config, dataset)
    retained = retained_text(config, renderer, limits, display)
    together = length.for_ranks(config, dataset, terms.world.size)
    for line in [*config.notes(), *config.switched_off(), *length.notes(asked, config, total), *together]:
        display.say(line)
    for note in dataset.report.notes:
        display.say(note)
    few = length.warnings(asked, config, dataset, total)
    scarce = scarce_text(config, retained, total)
    for warning in [*dataset.report.warnings, *limits.warnings(dataset.rows), *few, *scarce]:
        display.say(f"warning: {warning}")
    return Looked(config, start, ground, renderer, dataset, total, metrics, terms.lineage, retained, terms.consent)
