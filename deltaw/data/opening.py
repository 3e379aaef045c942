"""A run's data, opened: the base's tokenizer with the run's rules of rendering, and the rows. No weights are read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from deltaw.base.limits import Limits
from deltaw.base.load import open_skeleton
from deltaw.base.source import Source, find_base
from deltaw.config import RunConfig
from deltaw.data.added import Token, add_tokens
from deltaw.data.cache import prepared
from deltaw.data.dataset import Dataset
from deltaw.data.render import Renderer, open_tokenizer
from deltaw.errors import InputError, listed
from deltaw.show.progress import Display


def open_renderer(
    source: Source,
    config: RunConfig | None = None,
    template: Path | None = None,
    tokens: Mapping[int, str] | None = None,
) -> Renderer:
    """The tokenizer and the rules of the run's `data` section, or the defaults. `template`: before the run's setting,
    which may name a file that is gone by now. `tokens`: those of a trained adapter, before the run's. Raises InputError
    where the tokenizer gives them other numbers."""
    tokenizer, own = open_tokenizer(source.directory), None if template is None else str(template)
    texts = tuple(tokens.values()) if tokens is not None else config.adapter.tokens if config else ()
    added = add_tokens(tokenizer, texts)
    wrong = [
        f"{t.text!r:.60}: {t.id}, and {id} in the adapter"
        for t, id in zip(added, tokens or (), strict=False)
        if t.id != id
    ]
    if wrong:
        raise InputError(
            f"{source.name}: its tokenizer has other numbers for the adapter's tokens:\n{listed(wrong)}",
            fix="name the base that it was trained on",
        )
    if config is None:
        return Renderer(tokenizer, template=own, tokens=added)
    data = config.data
    shape = config.objective.shape
    template_name = own or data.template
    return Renderer(tokenizer, data.train_on, template_name, rendered=data.rendered, shape=shape, tokens=added)


def open_dataset(config: RunConfig, display: Display, source: Source | None = None) -> tuple[Source, Renderer, Dataset]:
    """A run's data as it will be trained on. No weights are read: only the tokenizer is needed. `source`: the base,
    where it was found already."""
    source = source or find_base(config.base, display=display)
    renderer = open_renderer(source, config)
    return source, renderer, prepared(config.data, renderer, display=display)


def limits_of(source: Source, dataset: Dataset, tokens: Sequence[Token] = ()) -> list[str]:
    """What a run would say of rows that the base can't be given, or wasn't made for. `tokens`: those that are trained
    by name. No weights are read."""
    rows = dataset.rows
    try:
        limits = Limits.of(open_skeleton(source)).knowing(token.id for token in tokens)
        limits.check(rows)
    except InputError as error:
        return [error.what]
    return limits.warnings(rows)
