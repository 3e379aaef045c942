"""Opening a run: what it works with, opened and checked before its first step, cheapest checks first, and unchanged to
its end.

The layers' start is drawn when the adapter is attached. An initialiser that wants data gets the first batches of the
run, in the order in which it will train on them; a run that is resumed has its start in the checkpoint.

`open_run` opens one run. Several on one base (sweep/) are all looked at first (`look`), then one opens the base
(`opened_on`) and the others come beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from deltaw.adapter.attach import Attached, attach
from deltaw.adapter.file import BaseId
from deltaw.adapter.history import NOTHING, History
from deltaw.adapter.init_data import initialise_from_data
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.limits import Limits
from deltaw.base.load import open_base, pick_device
from deltaw.base.objective import Objective
from deltaw.base.preferences import objective_of
from deltaw.config import EvaluateConfig, RunConfig
from deltaw.config.own_rows import rows_to_keep, with_names
from deltaw.data.added import Token
from deltaw.data.dataset import Dataset
from deltaw.data.example import Example
from deltaw.data.examples import Examples
from deltaw.data.loader import Loader, LoaderState
from deltaw.data.render import Renderer
from deltaw.data.weighed import Weighed
from deltaw.errors import InputError
from deltaw.evaluation.forgetting import general_text
from deltaw.evaluation.metrics import Metric
from deltaw.evaluation.own_metric import ASKED_FOR, Consent
from deltaw.model import PLAIN, Model
from deltaw.rewards.function import code_of
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training.attention import choose_attention
from deltaw.training.checkpoint import TrainState, conditions
from deltaw.training.learner import Learner
from deltaw.training.length import make_loader
from deltaw.training.looking import NEW, Ground, Looked, Terms, look
from deltaw.training.optim import WARMUP, warmup_steps
from deltaw.training.retain import Kept, Retain, Text, check_apart
from deltaw.training.rollouts import Rollouts, Score
from deltaw.training.sharding import NONE, Shards, first_pass, is_wanted, shard
from deltaw.training.start import Start, described
from deltaw.training.world import ALONE, World

START_BATCHES = 8  # of train.tokens_per_batch, that an initialiser gets: 16,384 tokens by default


@dataclass(frozen=True)
class Opened:
    """A run's settings, with `auto` resolved; its base with an adapter on it; its rows; its length in steps; what its
    answers are measured by."""

    config: RunConfig
    model: Model
    dataset: Dataset
    total: int
    metrics: tuple[Metric, ...]
    rows: Mapping[str, str] = field(default_factory=dict)  # that were given as values, by the name in the run's folder
    lineage: History = NOTHING  # which adapter it starts from, after which steps it was extended
    world: World = ALONE  # the processes that train it together
    shards: Shards = NONE  # what of the base is on other ranks
    retained: Examples = field(default_factory=lambda: Examples.of([]))  # the pieces of train.retain's text
    references: Mapping[str, np.ndarray] = field(default_factory=dict)  # what the reference says (references.py)
    consent: Consent = ASKED_FOR  # to code of the user's own
    score: Score | None = None  # what says what answers are worth, while it is open (rewarding.py)

    @property
    def attached(self) -> Attached:
        assert self.model.attached is not None
        return self.model.attached

    @property
    def device(self) -> torch.device:
        return self.model.base.device

    @property
    def id(self) -> BaseId:
        """What the adapter records of its base."""
        asking = self.dataset.asking
        return replace(self.model.id, system=asking.system, **({} if asking.chat else {"template": PLAIN}))

    def named_as(self, config: RunConfig) -> "Opened":
        """With the names that `config` has for what was opened (it may have been opened under longer ones)."""
        names = {"data": config.data, "evaluate": config.evaluate, "adapter": config.adapter}
        pinned = self.config.model_copy(update=names)
        local = Path(self.config.base).is_absolute() and config.base != self.config.base
        return replace(self, config=pinned.model_copy(update={"base": config.base}) if local else pinned)

    @property
    def checkpointing(self) -> str:
        """What is done of `train.checkpointing`."""
        recompute = self.model.forward.recompute
        return "none" if recompute is None else recompute.way

    @property
    def longest(self) -> int:
        """The tokens of the longest row that is trained on; of a prompt with an answer as long as it may become."""
        rows = self.dataset.train
        if self.is_rewarded:
            return int((rows.lengths - rows.supervised).max()) + self.config.objective.group[2]
        return int(rows.lengths.max())

    def learner(self, display: Display) -> Learner:
        """Of the adapter, at its beginning."""
        prints = {"base": self.id.fingerprint, "data": self.dataset.fingerprint, "template": self.id.template}
        prints |= {"retained text": self.kept_text.fingerprint} if self.kept_text else {}
        config = self.config.model_dump(mode="json")
        state = TrainState(
            fingerprints=prints,
            config=config,
            conditions=conditions(self.device, self.world.size),
            code=code_of(self.config.objective.reward or ()),
        )
        return Learner(self.attached, self.config.train, self.total, state, display.say, self.objective)

    @property
    def is_answered(self) -> bool:
        """Whether held-out rows have a loss and are answered: preferences are weighed, and prompts rewarded."""
        return self.config.objective.kind == "sft"

    @property
    def is_rewarded(self) -> bool:
        return self.config.objective.is_rewarded

    @property
    def answering(self) -> EvaluateConfig:
        """How held-out rows are answered: in training on rewards as they are there, if greedily."""
        evaluate, objective = self.config.evaluate, self.config.objective
        longest = objective.group[2] if self.is_rewarded else evaluate.max_new_tokens
        return evaluate.model_copy(update={"max_new_tokens": longest})

    @cached_property
    def objective(self) -> Objective:
        """What it minimises."""
        return objective_of(self.config.objective)

    def weighed(self, part: Literal["train", "eval"]) -> Weighed:
        """The rows to train on, or held out, with what the reference says of them."""
        rows = self.dataset.train if part == "train" else self.dataset.eval
        return Weighed(rows, self.references.get(part), self.references.get(f"{part}_beside"))

    @property
    def kept_text(self) -> Text | None:
        """What the run is to remember; None where it isn't asked to."""
        return Text.of(self.config, self.retained)

    def retain(self, forward: Forward, kept: Kept | None = None) -> Retain | None:
        """The same, for the steps that `forward` takes. `kept`: where what the base says of it is kept."""
        text = self.kept_text
        return None if text is None else Retain(text, forward, self.attached, self.config.train.batch_tokens, kept)

    def rollouts(self, state: TrainState, say: Callable[[str], None]) -> Rollouts | None:
        """The steps after `state` of a run on rewards; None for any other."""
        if not self.is_rewarded:
            return None
        assert self.score is not None or not self.world.is_first, "the rewards aren't open"
        how: dict[str, Any] = {"shares": self.shares, "world": self.world}
        return Rollouts(self.config, self.model, self.dataset, self.score, state, say, **how)

    def loader(self, state: TrainState) -> Loader:
        """The batches of the steps after `state`, of rows that are trained on as they are."""
        ranks, weighed = self.world.size, self.weighed("train")
        return make_loader(self.config, self.dataset, state.position, ranks, self.shares, weighed)

    @property
    def shares(self) -> bool:
        """Whether examples that begin alike share that: not with dropout, which is drawn by row."""
        return self.model.forward.shares and not self.attached.spec.dropout


def open_run(config: RunConfig, display: Display, terms: Terms = NEW) -> Opened:
    """Raises InputError, before the weights are read where that is possible."""
    return opened_on(look(config, display, terms), display, terms.world)


def opened_on(looked: Looked, display: Display, world: World = ALONE) -> Opened:
    """The run with its base, and a fresh adapter on it."""
    config, ground, shards = looked.config, looked.ground, NONE
    if is_wanted(config, ground.source, ground.skeleton, pick_device(config.train.device), world, display.say):
        if config.adapter.tokens or config.adapter.also:
            what = "the embedding and the head of a base that is spread over the ranks can't be trained yet"
            raise InputError(what, fix="leave out adapter.tokens and adapter.also, or set train.shard: never")
        if config.objective.is_rewarded:
            what = "a base that is spread over the ranks can't be sampled from yet"
            raise InputError(what, fix="set base_weights: nf4 or int8, so that it fits, or train.shard: never")
        model, shards = _sharded_model(config, ground, looked.renderer, display, world)
    else:
        model = _opened_model(config, ground, looked.renderer, config.train.device, display)
    _say_opened(model, ground.known, display)
    opened = _opened(looked, model, display, world, shards)
    choose_attention(model, opened.longest, display.say)
    return opened


def opened_beside(looked: Looked, others: Sequence[Opened], display: Display) -> Opened:
    """The run on the base that `others` stand on, with a fresh adapter beside those that are on it. Raises InputError
    for one whose rows can't be told from another's there."""
    base, forward = others[0].model.base, others[0].model.forward
    attached = attach_fresh(base.model, looked.config, looked.renderer.tokens, [other.attached for other in others])
    return _opened(looked, Model(base, looked.renderer, forward, attached), display)


def _opened(looked: Looked, model: Model, display: Display, world: World = ALONE, shards: Shards = NONE) -> Opened:
    assert model.attached is not None
    for line in model.attached.notes():
        display.say(line)
    config, dataset = _pinned(looked.config, model), looked.dataset
    rows_kept = rows_to_keep(looked.config.data)
    known = (looked.total, looked.metrics, rows_kept, looked.lineage, world, shards, looked.retained)
    opened = Opened(config, model, dataset, *known, consent=looked.consent)
    return opened if looked.start is None else _started(opened, looked.start, display)


def _say_opened(model: Model, known: Any, display: Display) -> None:
    """Which way it is run, and in which numbers. `known`: its config."""
    base, source = model.base, model.base.source
    display.say(f"{source.name} in {str(base.dtype)[6:]} on {base.device}: {model.describe()}")
    if base.kept:
        display.say(f"its weights are {base.kept}")
    if (base.dtype, getattr(known, "dtype", None)) == (torch.bfloat16, torch.float16):
        display.say("its weights are float16, of which bfloat16 drops the last three digits (of eleven, binary)")


def _sharded_model(
    config: RunConfig, ground: Ground, renderer: Renderer, display: Display, world: World
) -> tuple[Model, Shards]:
    """The base with a fresh adapter, of which this process keeps its part."""
    place = pick_device(config.train.device)
    world.start(place)
    with world.in_turn():
        model, shards = shard(_opened_model(config, ground, renderer, "cpu", display), place, world)
    first_pass(model)
    return model, shards


def _opened_model(config: RunConfig, ground: Ground, renderer: Renderer, device: str, display: Display) -> Model:
    """The base with a fresh adapter on it."""
    dtype, weights = config.train.dtype, config.base_weights
    base = open_base(ground.source, dtype=dtype, device=device, display=display, config=ground.known, weights=weights)
    return Model(base, renderer, plan_forward(base.model), attach_fresh(base.model, config, renderer.tokens))


def attach_fresh(
    model: nn.Module, config: RunConfig, tokens: Sequence[Token], like: Sequence[Attached] = ()
) -> Attached:
    """The adapter as it begins, but for a start that wants data, or that another adapter gives. `tokens`: those that
    the config names."""
    generator, spec = torch.Generator().manual_seed(config.train.seed), config.adapter
    later = spec.from_data or spec.start is not None
    return attach(model, spec, generator=generator, start_later=later, like=like, tokens=tokens)


def _started(opened: Opened, start: Start, display: Display) -> Opened:
    """With the start's numbers in the adapter. Raises InputError for an adapter of another base."""
    start.check_base(opened.id)
    empty = start.put(opened.attached, opened.config.train.seed)
    for line in [*start.notes(opened.id.template), *described(empty)]:
        display.say(line)
    return replace(opened, lineage=opened.lineage.model_copy(update={"started_from": start.history}))


def begin(opened: Opened, run: Run, display: Display) -> None:
    """Write the run's files into the folder, and make the start for an initialiser that needs data."""
    run.create(opened.config, opened.rows)
    if opened.lineage.known:
        run.write_lineage(opened.lineage)
    warmup = warmup_steps(opened.total, opened.config.train)
    if warmup < WARMUP and opened.config.train.warmup_steps is None:
        display.say(f"warm-up: {warmup} of {opened.total} steps, since the run is short")
    if opened.config.adapter.from_data:
        start_from_data(opened, display)


def start_from_data(opened: Opened, display: Display) -> None:
    """Set every layer's start from the first `START_BATCHES` batches (of a small set of rows, some come twice)."""
    loader = make_loader(opened.config, opened.dataset, LoaderState())
    batches = islice(chain.from_iterable(step for step, _ in loader), START_BATCHES)
    here = [batch.to(opened.device) for batch in batches]
    initialise_from_data(opened.attached, opened.model.forward, here, display, opened.objective)


def general_rows(config: RunConfig, model: Model, retained: Sequence[Example] = ()) -> Examples:
    """The text on which forgetting is measured, cut to what the model can hold; none where it isn't asked. Raises
    InputError where it has text that is `retained`."""
    source = config.evaluate.general
    if not source:
        return Examples.of([])
    limits = Limits.of(model.base.model)
    rows = Examples.of(general_text(source, model.renderer, limits.longest))
    limits.check(rows, name=f"evaluate.general: {source}")
    check_apart(config, retained, rows)
    return rows


def _pinned(config: RunConfig, model: Model) -> RunConfig:
    """The config with `auto` and a hub's branch resolved: a resumed run must not choose differently."""
    source, dtype = model.base.source, str(model.base.dtype).removeprefix("torch.")
    base = config.base if source.revision is None else f"{source.public_name}@{source.revision}"
    return with_names(config).model_copy(
        update={"base": base, "train": config.train.model_copy(update={"dtype": dtype})}
    )
