"""The rows that a model is measured on: a run's own held-out ones, or those of a file, with the model opened for them.

A config that holds no such rows is refused before the weights are read. A run's own rows are the very ones that it held
out when it was trained; what it was trained on isn't rendered again for that.
"""

from collections.abc import Sequence

from deltaw.base.limits import Limits
from deltaw.config import DataConfig
from deltaw.data.dataset import prepare, prepare_held_out
from deltaw.data.example import Example
from deltaw.errors import InputError
from deltaw.model import PLAIN, Model, open_model
from deltaw.named import Named
from deltaw.show.progress import Display


def rows_of(
    name: str | Named, data: str | None, *, base: str | None, rows: int | None = None, display: Display
) -> tuple[Model, Sequence[Example]]:
    """A model and the rows to measure it on: the run's own held-out ones, or those of a file. Raises InputError."""
    named = Named.of(name)
    source = _own_data(named) if data is None else _of_file(named, data, rows)
    model = open_model(named, base=base, display=display)
    examples = prepare_held_out(source, model.renderer) if data is None else _asked(named, model, source, display)
    examples = examples[:rows]
    limits = Limits.of(model.base.model)
    limits.check(examples)
    for warning in limits.warnings(examples):
        display.say(f"warning: {warning}")
    return model, examples


def _asked(named: Named, model: Model, source: DataConfig, display: Display) -> list[Example]:
    """A file's rows, in the form that the adapter was trained on where they can have it."""
    template = named.adapter.base.template if model.attached is not None else ""
    on_chats = model.asking.chat and template != ""
    renderer = model.renderer.with_pairs_as_chats(model.asking.system) if on_chats else model.renderer
    dataset = prepare(source, renderer)
    if on_chats and not dataset.asking.chat:
        display.say("rows with a prompt are asked as chats: the adapter was trained on chats")
    if template == PLAIN and dataset.asking.chat:
        display.say("warning: these rows are chats, and the adapter was trained on plain text")
    return dataset.train


def _own_data(named: Named) -> DataConfig:
    """The run's own data section, which must hold rows out."""
    if named.config is None:
        raise InputError(f"{named.name} isn't a run, so it has no held-out rows", fix="name a data file")
    if named.config.data.eval is None:
        raise InputError(f"{named.name} held no rows out", fix="name a data file")
    return named.config.data


def _of_file(named: Named, data: str, rows: int | None) -> DataConfig:
    """A data section for a file, with the run's rules of rendering."""
    if named.config is None:
        return DataConfig(train=data, limit=rows)
    rules = {"form": "auto", "eval": None, "limit": rows, "train": data}
    return named.config.data.model_copy(update=rules)
