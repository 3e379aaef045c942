"""What an adapter's folder and its base say about chats: whose template, which tokens stop, which tokens were added.

Templates are compared as texts, by the fingerprint that deltaw records. What ends a turn is found by deltaw's renderer
on the base's tokenizer; the template runs in its own process there (files/template.py). The adapter's tokenizer files
are read as the JSON that they are and never opened as a tokenizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from deltaw.adapter.file import BaseId
from deltaw.config import RunConfig
from deltaw.data.opening import open_renderer
from deltaw.data.render import TEMPLATE, Renderer, open_tokenizer
from deltaw.errors import DeltawError, InputError
from deltaw.files.strict_json import read_json
from deltaw.files.template import MAX_TEMPLATE
from deltaw.model import PLAIN
from deltaw.shipping.lint.base import Base

NO_TEMPLATE = "none"  # a renderer's fingerprint without one
TOKENIZER_BYTES = 100_000_000


def fingerprint(template: str) -> str:
    """A template's fingerprint, as deltaw records it (files/template.py)."""
    return sha256(template.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, eq=False)
class Chat:
    """The facts, each worked out when it is first asked for."""

    folder: Path
    recorded: BaseId
    base: Base | None = None
    run: RunConfig | None = None

    @property
    def plain(self) -> bool:
        """Whether it is recorded as trained without chats."""
        return self.recorded.template in (PLAIN, NO_TEMPLATE)

    @property
    def trained_under(self) -> str:
        """The fingerprint of the template that it was trained under; "" if none is recorded."""
        return "" if self.plain else self.recorded.template

    @cached_property
    def own(self) -> str:
        """The fingerprint of the template in the adapter's folder, else ""."""
        return template_of(self.folder)

    @cached_property
    def bases(self) -> str:
        """The fingerprint of the base's own template, "none" if it has none, "" if the base can't be opened."""
        return self.tokenizers.template_fingerprint if self.tokenizers else ""

    @cached_property
    def tokenizers(self) -> Renderer | None:
        """The base's tokenizer with its own template."""
        if self.base is None:
            return None
        try:
            return Renderer(open_tokenizer(self.base.source.directory))
        except DeltawError:
            return None

    @cached_property
    def renderer(self) -> Renderer | None:
        """The base's tokenizer with the template that it was trained under, if that is available."""
        if self.base is None:
            return None
        wanted = self.trained_under or self.own
        try:
            if self.run is not None:
                run = open_renderer(self.base.source, self.run)
                return run if wanted in ("", run.template_fingerprint) else None
            if wanted in ("", self.bases):
                return self.tokenizers
            file = self.folder / TEMPLATE
            if wanted == self.own and file.is_file():
                return Renderer(open_tokenizer(self.base.source.directory), template=str(file))
        except DeltawError:
            return None
        return None

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens that the tokenizer files in the adapter's folder add to a vocabulary, with their ids."""
        tokens: dict[str, int] = {}
        for content, id in _added(self.folder):
            if isinstance(content, str) and type(id) is int:
                tokens[content] = id
        return tokens


def template_of(folder: Path) -> str:
    """The fingerprint of the chat template beside an adapter or a model, or ""."""
    try:
        with (folder / TEMPLATE).open(encoding="utf-8") as file:
            if (template := file.read(MAX_TEMPLATE + 1)).strip():  # an empty file doesn't count
                return fingerprint(template)
    except (OSError, ValueError):
        pass
    try:
        given: Any = read_json(folder / "tokenizer_config.json").get("chat_template")
    except InputError:
        return ""
    if isinstance(given, list):
        given = next((e.get("template") for e in given if isinstance(e, dict) and e.get("name") == "default"), None)
    return fingerprint(given) if isinstance(given, str) and given else ""


def _added(folder: Path) -> Iterator[tuple[Any, Any]]:
    for file, field in (("tokenizer_config.json", "added_tokens_decoder"), ("tokenizer.json", "added_tokens")):
        try:
            value = read_json(folder / file, max_bytes=TOKENIZER_BYTES).get(field)
        except InputError:
            continue
        if isinstance(value, dict):
            for id, entry in value.items():
                if isinstance(entry, dict) and id.isdecimal() and id.isascii() and len(id) < 10:
                    yield entry.get("content"), int(id)
        elif isinstance(value, list):
            yield from ((entry.get("content"), entry.get("id")) for entry in value if isinstance(entry, dict))
