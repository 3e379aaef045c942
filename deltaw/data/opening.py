"""A run's data, opened: the base's tokenizer with the run's rules of rendering, and the rows. No weights are read."""

from pathlib import Path

from deltaw.base.limits import Limits
from deltaw.base.load import open_skeleton
from deltaw.base.source import Source, find_base
from deltaw.config import RunConfig
from deltaw.data.cache import prepared
from deltaw.data.dataset import Dataset
from deltaw.data.render import Renderer, open_tokenizer
from deltaw.errors import InputError
from deltaw.show.progress import Display


def open_renderer(source: Source, config: RunConfig | None = None, template: Path | None = None) -> Renderer:
    """The tokenizer and the rules of the run's `data` section, or the defaults. `template`: before the run's setting,
    which may name a file that is gone by now."""
    tokenizer, own = open_tokenizer(source.directory), None if template is None else str(template)
    if config is None:
        return Renderer(tokenizer, template=own)
    data = config.data
    shape = config.objective.shape
    return Renderer(tokenizer, data.train_on, own or data.template, rendered=data.rendered, shape=shape)


def open_dataset(config: RunConfig, display: Display, source: Source | None = None) -> tuple[Source, Renderer, Dataset]:
    """A run's data as it will be trained on. No weights are read: only the tokenizer is needed. `source`: the base,
    where it was found already."""
    source = source or find_base(config.base, display=display)
    renderer = open_renderer(source, config)
    return source, renderer, prepared(config.data, renderer, display=display)


def limits_of(source: Source, dataset: Dataset) -> list[str]:
    """What a run would say of rows that the base can't be given, or wasn't made for. No weights are read."""
    rows = dataset.rows
    try:
        limits = Limits.of(open_skeleton(source))
        limits.check(rows)
    except InputError as error:
        return [error.what]
    return limits.warnings(rows)
