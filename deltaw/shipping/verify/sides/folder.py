"""A model folder (a merged one, or any base) as a side: loaded and run by transformers, without any of deltaw's code.

Its prompts come from the folder's own tokenizer and template, and its answers end at its own generation config's stop
tokens: it shows what anyone gets who loads the folder.
"""

from collections.abc import Sequence

from deltaw.base.load import open_base
from deltaw.base.source import find_base
from deltaw.data.render import open_tokenizer
from deltaw.generate.cache import context
from deltaw.shipping.verify.sides.local import Local, Running, Words, running, stops_of, stored_type, working_type
from deltaw.shipping.verify.sides.side import Prompt
from deltaw.show.progress import Display


class Folder(Running):
    """Any name that `find_base` takes. Raises InputError as it does."""

    def __init__(self, name: str, *, display: Display) -> None:
        self.name, self.notes = name, []
        self.source = source = find_base(name, display=display)
        self._words = Words(open_tokenizer(source.directory))
        self._dtype = working_type(source)
        self.numbers = running(self._dtype, stored_type(source))
        self.chats = self._words.has_template

    def load(self) -> None:
        assert self.source is not None
        opened = open_base(self.source, dtype=self._dtype)
        self.stops = frozenset(stops_of(opened.model))
        self.local = Local(opened.model, set(self.stops), self._words.decode)
        self.context = context(opened.model)

    def ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...] | None]:
        return [self._words.ids(prompt) for prompt in prompts]

    def decode(self, ids: Sequence[int]) -> str | None:
        return self._words.decode(ids)
