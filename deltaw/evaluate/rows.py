"""The rows that a model is measured on: a run's own held-out ones, or those of a file."""

from collections.abc import Sequence
from pathlib import Path

from deltaw.base.limits import Limits
from deltaw.config import DataConfig, RunConfig, load_config
from deltaw.data.dataset import prepare
from deltaw.data.example import Example
from deltaw.errors import InputError
from deltaw.model import Model, is_run, open_model
from deltaw.show.progress import Display


def rows_of(
    name: str, data: str | None, *, base: str | None, rows: int | None = None, display: Display
) -> tuple[Model, Sequence[Example]]:
    """A model and the rows to measure it on: the run's own held-out ones, or those of a file. Raises InputError."""
    config = load_config(Path(name) / "config.yaml") if is_run(Path(name)) else None
    source = _data(config, name, data, rows)
    model = open_model(name, base=base, display=display)
    dataset = prepare(source, model.renderer)
    examples = (dataset.eval if data is None else dataset.train)[:rows]
    limits = Limits.of(model.base.model)
    limits.check(examples)
    for warning in limits.warnings(examples):
        display.say(f"warning: {warning}")
    return model, examples


def _data(config: RunConfig | None, name: str, data: str | None, rows: int | None) -> DataConfig:
    """The run's own data section, or one for `data` with the run's rules of rendering."""
    if data is not None:
        rules = {"form": "auto", "eval": None, "limit": rows, "train": data}
        return config.data.model_copy(update=rules) if config else DataConfig(train=data, limit=rows)
    if config is None:
        raise InputError(f"{name} is no run, so it has no held-out rows", fix="name a data file")
    if config.data.eval is None:
        raise InputError(f"{name} held no rows out", fix="name a data file")
    return config.data
