"""The rows that a model is measured on: a run's own held-out ones, or those of a file, with the model opened for them.

A config that holds no such rows is refused before the weights are read. A run's own rows are the very ones that it held
out when it was trained; what it was trained on isn't rendered again for that.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from deltaw.base.limits import Limits
from deltaw.base.parts import ASKED, REJECTED, UNDESIRABLE
from deltaw.config import DataConfig, Shape
from deltaw.config.places import check_there
from deltaw.config.sources import SourceValue
from deltaw.config.tasks import TaskConfig
from deltaw.data.cache import prepared, prepared_held_out
from deltaw.data.example import Example
from deltaw.data.examples import Examples, parts_of
from deltaw.data.forms import Reads
from deltaw.errors import InputError
from deltaw.files.paths import no_such
from deltaw.model import PLAIN, Model, open_model
from deltaw.named import Named
from deltaw.show.progress import Display


def rows_of(
    name: str | Named, data: SourceValue | None, *, base: str | None, rows: int | None = None, display: Display
) -> tuple[Model, Examples]:
    """A model and the rows to measure it on: all of the run's own held-out ones, or `rows` of a file. Raises
    InputError."""
    named = Named.of(name)
    source = own_data(named) if data is None else _of_file(named, data, rows)
    model = open_model(named, base=base, display=display)
    if data is not None and model.renderer.shape in ("pairs", "prompts"):
        shape: Shape = "any" if model.renderer.shape == "pairs" else "one"
        model = replace(model, renderer=model.renderer.of_shape(shape))
    examples = (
        prepared_held_out(source, model.renderer, display=display)
        if data is None
        else _of_form(model, named, source, display)
    )
    limits = Limits.of(model.base.model)
    limits.check(examples)
    for warning in limits.warnings(examples):
        display.say(f"warning: {warning}")
    return model, examples


def rows_of_task(named: Named, task: TaskConfig, model: Model, display: Display) -> Sequence[Example]:
    """The rows that a task's answers are compared with: its own, read by its own columns, or held-out ones of the run,
    chosen at random. Raises InputError."""
    if task.data is not None:
        rules = {"columns": task.columns, "limit": task.limit, "seed": task.seed}
        model = replace(model, renderer=model.renderer.of_shape("one"))
        source = _of_file(named, task.data, None).model_copy(update=rules)
        examples = _of_form(model, named, source, display, asked=task.chat, own_system=task.system is not None)
        Limits.of(model.base.model).check(examples)
        return examples
    examples = prepared_held_out(own_data(named), model.renderer, display=display)
    examples = examples.take(~np.isin(parts_of(examples), (REJECTED, UNDESIRABLE, ASKED)))  # answers to be given
    key = str(task.seed).encode()[-64:]

    def order(example: Example) -> bytes:
        return blake2b(example.tokens.tobytes(), digest_size=16, key=key).digest()

    chosen = {example.origin for example in sorted(examples, key=order)[: task.limit]}
    return [example for example in examples if example.origin in chosen]


def _of_form(
    model: Model,
    named: Named,
    source: DataConfig,
    display: Display,
    *,
    asked: bool | None = None,
    own_system: bool = False,
) -> Examples:
    """A file's rows, asked as the adapter's own rows were, whatever their columns are called. `asked`: as a chat or
    not, where that was said. `own_system`: the system prompt is whoever asks's own, not that of the training."""
    template = named.adapter.base.template if model.attached is not None else ""
    reads: Reads = "auto" if model.attached is None and asked is None else "chat" if model.asking.chat else "completion"
    renderer, system = model.renderer, model.asking.system
    dataset = prepared(source, renderer.behind(system) if system else renderer, reads=reads, display=display)
    if asked is not None and dataset.asking.chat != asked:
        what = "chats" if dataset.asking.chat else "texts, prompts and completions, which are asked as they are"
        raise InputError(f"chat: {str(asked).lower()} does nothing: these rows are {what}", fix="leave chat out")
    if system and dataset.asking.chat and not own_system:
        display.say("chats without a system prompt get the one that the adapter was trained with")
    if template == PLAIN and dataset.asking.chat:
        display.say("warning: these rows are chats, and the adapter was trained on plain text")
    return dataset.train


def own_data(named: Named) -> DataConfig:
    """The run's own data section, which must hold rows out."""
    if named.config is None and not named.path.exists() and not named.name.startswith("builtin:"):
        raise no_such(named.path)
    if named.config is None or named.local is None:
        raise InputError(
            f"{named.name} isn't a run, so it has no held-out rows", fix="name a data file to measure it on"
        )
    if named.config.data.eval is None:
        raise InputError(
            f"{named.name} held no rows out when it was trained, so there are none to measure it on",
            fix="name a data file with rows that it wasn't trained on; next time, hold some out: data.eval=100",
        )
    for source in (named.config.data.train, named.config.data.eval):
        if isinstance(source, str) and Path(source).suffix:  # else it may be on a hub
            check_there(source, named.config, named.path, "data", "put it back, or name a data file")
    return named.local.data


def _of_file(named: Named, data: SourceValue, rows: int | None) -> DataConfig:
    """A data section for a file, with the run's rules of rendering."""
    if named.local is None:
        return DataConfig(train=data, limit=rows)
    own = named.local.data
    too_long = "auto" if own.too_long == "split" else own.too_long  # the file may have other rows than texts
    rules = {"form": "auto", "eval": None, "limit": rows, "train": data, "too_long": too_long, "overlap": 0}
    return own.model_copy(update=rules)
