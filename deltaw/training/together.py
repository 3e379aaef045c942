"""What the processes of a run agree on before its first step: the same settings, base and rows, the same adapter.

    settings     rank 0's, with what a machine decides by itself (`dtype: auto`) decided once
    alike        base, rows and precision are compared; a batch is as large as the smallest GPU allows
    hand_out     factors, moments and state, from rank 0: a start that was computed, or a checkpoint on its disk

Only rank 0 looks at the run's folder, so the others need none of it: no disk has to be shared but for base and data.
"""

import dataclasses
from typing import Any

import torch

from deltaw.base.dtype import fast_dtype
from deltaw.base.load import pick_device
from deltaw.config import RunConfig, parse_config
from deltaw.errors import InputError
from deltaw.training.checkpoint import Saved, TrainState
from deltaw.training.learner import Learner
from deltaw.training.opening import Opened
from deltaw.training.references import handed_out
from deltaw.training.world import World


def settled_dtype(config: RunConfig) -> RunConfig:
    """With a number for `dtype: auto`, which another machine might decide otherwise."""
    if config.train.dtype != "auto":
        return config
    dtype = str(fast_dtype(pick_device(config.train.device).type)).removeprefix("torch.")
    return config.model_copy(update={"train": config.train.model_copy(update={"dtype": dtype})})


def settings(config: RunConfig | None, world: World) -> RunConfig:
    """Rank 0's `config`, for all; each of the others is given it without what is rank 0's alone to do."""
    raw: dict[str, Any] = world.first(lambda: config.model_dump(mode="json") if config else {}, "the settings")
    if config is None:
        raw["evaluate"] = {**raw["evaluate"], "metrics": [], "samples": 0, "general": None, "report": False}
        raw["train"] = {**raw["train"], "log_to": []}
        config = parse_config(raw, source="rank 0", begun=True)
    if config.train.device in ("auto", "cuda") and torch.cuda.is_available():
        if world.local_rank >= (count := torch.cuda.device_count()):
            raise InputError(
                f"{world.local_size} processes on a machine that has {count} GPUs: each wants its own",
                fix=f"start it with --nproc-per-node {count}",
            )
        torch.cuda.set_device(world.local_rank)
    return config


def alike(opened: Opened) -> Opened:
    """What was opened, with the batches that fit all. Raises InputError where one has another base or other rows."""
    world, train = opened.world, opened.config.train
    if world.is_alone:
        return opened
    prints = {"base": opened.id.fingerprint, "data": opened.dataset.fingerprint, "precision": train.dtype}
    prints |= {"train.retain": opened.kept_text.fingerprint} if opened.kept_text else {}
    every: list[dict[str, Any]] = world.gathered({**prints, "tokens": train.batch_tokens}, "what was opened")
    for name in prints:
        other = [str(rank) for rank, one in enumerate(every) if one[name] != every[0][name]]
        if other:
            raise InputError(
                f"rank {', '.join(other)} opened another {name} than rank 0",
                fix="the same base and data must lie on every machine, under the same names",
            )
    tokens = min(one["tokens"] for one in every)
    config = opened.config.model_copy(update={"train": train.model_copy(update={"tokens_per_batch": tokens})})
    return dataclasses.replace(opened, config=config)


def hand_out(opened: Opened, learner: Learner, world: World) -> Opened:
    """Give the other ranks rank 0's factors, moments and state, and what the reference says."""
    if world.is_alone:
        return opened
    raw = world.first(lambda: dataclasses.asdict(learner.state), "the start of the adapter")
    saved = learner.saved()
    world.hand_out([*saved.factors.values(), *saved.moments.values()], "the adapter's start")
    if not world.is_first:
        learner.restore(Saved(TrainState(**raw), saved.factors, saved.moments))
        learner.state.fingerprints = raw["fingerprints"]
    check_adapter(learner, world)
    return handed_out(opened, world)


def check_adapter(learner: Learner, world: World) -> None:
    """Raise RunError, on all ranks, where one holds another adapter than rank 0."""
    if not world.is_alone:
        world.check_alike(learner.digest(), f"the adapter at step {learner.state.step}")
