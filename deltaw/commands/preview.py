"""`deltaw preview`: the rows that a run would train on, with the trained tokens marked (data/preview.py)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from deltaw.config import load_config
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.text import counted


def preview_named(run: Path, overrides: Sequence[str], *, rows: int, display: Display) -> Result:
    """The first `rows` examples, the counts, and the warnings that the run would give. Loads no model."""
    config = load_config(run, overrides)
    from deltaw.base.load import pick_device
    from deltaw.data.loader import LoaderState
    from deltaw.data.opening import limits_of, open_dataset
    from deltaw.data.preview import printed
    from deltaw.training.largest import shared_line, work_left
    from deltaw.training.length import count_steps, settle_step
    from deltaw.training.length import notes as of_length
    from deltaw.training.length import warnings as of_few_steps

    source, renderer, dataset = open_dataset(config, display)
    settled = settle_step(config, dataset)
    steps, size = count_steps(settled, dataset), settled.train.step_tokens
    limits = limits_of(source, dataset, renderer.tokens)
    dataset.report.warnings.extend([*limits, *of_few_steps(config, settled, dataset, steps)])
    length = of_length(config, settled, steps)
    shares = pick_device(config.train.device).type == "cpu" and not config.adapter.dropout
    shared = work_left(dataset.train, settled.train, LoaderState(), steps, shares=shares).shared
    lines = [f"{counted(steps, 'step')} of up to {size:,} tokens", *length]
    lines += [f"{line}, if the model takes packed documents" for line in shared_line(shared)]
    data = {**asdict(dataset.report), "steps": steps, "tokens_per_step": size, "length": length, "shared": shared}
    return Result(data, "\n".join([printed(dataset, renderer.tokenizer, rows), *lines]))
