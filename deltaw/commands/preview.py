"""`deltaw preview`: the rows that a run would train on, with the trained tokens marked (data/preview.py)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.config import RunConfig, load_config
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.text import counted

if TYPE_CHECKING:
    from deltaw.data.dataset import Dataset
    from deltaw.rewards.opening import Look


def preview_named(run: Path, overrides: Sequence[str], *, rows: int, display: Display) -> Result:
    """The first `rows` examples, the counts, and the warnings that the run would give. Loads no model."""
    config = load_config(run, overrides)
    from deltaw.base.load import pick_device
    from deltaw.data.loader import LoaderState
    from deltaw.data.opening import limits_of, open_dataset
    from deltaw.data.preview import printed
    from deltaw.rewards.opening import looked_at
    from deltaw.training.largest import shared_line, work_left
    from deltaw.training.length import count_steps, settle_step, tokens_of_step
    from deltaw.training.length import notes as of_length
    from deltaw.training.length import warnings as of_few_steps

    source, renderer, dataset = open_dataset(config, display)
    settled = settle_step(config, dataset)
    steps, size = count_steps(settled, dataset), tokens_of_step(settled, dataset)
    limits = limits_of(source, dataset, renderer.tokens)
    dataset.report.warnings.extend([*limits, *of_few_steps(config, settled, dataset, steps)])
    length = of_length(config, settled, steps)
    shares = pick_device(config.train.device).type == "cpu" and not config.adapter.dropout
    rewarded, shared = config.objective.is_rewarded, 0.0
    if not rewarded:
        shared = work_left(dataset.train, settled.train, LoaderState(), steps, shares=shares).shared
    lines = [f"{counted(steps, 'step')} of up to {size:,} tokens", *(config.notes() if rewarded else []), *length]
    lines += [f"{line}, if the model takes packed documents" for line in shared_line(shared)]
    data = {**asdict(dataset.report), "steps": steps, "tokens_per_step": size, "length": length, "shared": shared}
    if rewarded:
        looks = _looks(config, dataset, rows)
        lines += looked_at(looks)
        data["rewards"] = [asdict(look) for look in looks]
    return Result(data, "\n".join([printed(dataset, renderer.tokenizer, rows), *lines]))


def _looks(config: RunConfig, dataset: "Dataset", rows: int) -> "list[Look]":
    """What the first rows' own answers and empty ones are worth."""
    from deltaw.training.scoring import open_rewards, rows_of

    with open_rewards(config, dataset) as rewards:
        return rewards.look(rows_of(dataset)[:rows])
