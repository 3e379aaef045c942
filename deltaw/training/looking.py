"""A run before its weights are read: whatever can be checked and opened of it without them, cheapest checks first."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltaw.adapter.history import NOTHING, History
from deltaw.adapter.targets import find_targets
from deltaw.base.limits import Limits
from deltaw.base.load import check_weights, open_skeleton, pick_device, read_config
from deltaw.base.recompute import blocks_of, check_blocks, check_device
from deltaw.base.source import Source, find_base
from deltaw.config import RunConfig
from deltaw.data.dataset import Dataset
from deltaw.data.examples import Examples
from deltaw.data.opening import open_dataset
from deltaw.data.render import Renderer
from deltaw.evaluation.held_out import truth_of
from deltaw.evaluation.metrics import Metric
from deltaw.evaluation.own_metric import ASKED_FOR, Consent, open_metrics, try_out
from deltaw.show.progress import Display
from deltaw.training import length
from deltaw.training.length import count_steps, settle_step
from deltaw.training.log import check_loggers
from deltaw.training.memory import bound_caches
from deltaw.training.retain import retained_text
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


def look(
    config: RunConfig,
    display: Display,
    consent: Consent = ASKED_FOR,
    lineage: History = NOTHING,
    *,
    start_is_needed: bool = True,
    world: World = ALONE,
    ground: Ground | None = None,
    rows: OpenRows = open_dataset,
) -> Looked:
    """Whatever can be checked and read of a run without its weights. `ground`: the base, where it is found already;
    `rows`: what opens the data. For the rest, and what it raises: `open_run`."""
    check_loggers(config.train.log_to)
    check_device(config.train.checkpointing, pick_device(config.train.device))
    bound_caches()
    metrics = open_metrics(config.evaluate.metrics, consent)
    ground = ground or Ground.of(config, display)
    skeleton, recorded = ground.skeleton, lineage.started_from
    config, start = open_start(config, skeleton, recorded, needed=start_is_needed, say=display.say)
    # On the modules alone; attach asks again, of layers that it has tried.
    targets = find_targets(skeleton, config.adapter)
    if targets.words:
        display.say(f"adapted: {targets.words}")
    check_blocks(config.train.checkpointing, blocks_of(skeleton, targets.paths))
    _, renderer, dataset = rows(config, display, ground.source)
    limits = Limits.of(skeleton)
    limits.check(dataset.rows)
    for row in dataset.eval[:1]:
        try_out(metrics, truth_of(renderer, row))
    if config.objective.is_rewarded:
        check_prompts(config, dataset, limits)
        if world.is_first:
            open_rewards(config, dataset, consent).close()
    asked, config = config, settle_step(config, dataset)
    total = count_steps(config, dataset)
    retained = retained_text(config, renderer, limits, display)
    together = length.for_ranks(config, dataset, world.size)
    for line in [*config.notes(), *config.switched_off(), *length.notes(asked, config, total), *together]:
        display.say(line)
    for note in dataset.report.notes:
        display.say(note)
    few = length.warnings(asked, config, dataset, total)
    for warning in [*dataset.report.warnings, *limits.warnings(dataset.rows), *few]:
        display.say(f"warning: {warning}")
    return Looked(config, start, ground, renderer, dataset, total, metrics, lineage, retained, consent)
