"""Which models a server has, under which names, and how each is asked.

The base has its public name, an adapter its folder's. A prompt is asked as it is given: messages go through the chat
template, a completion's text goes to the model as it is. The template is the base's, or the one that lies in the
adapter's own folder because it was trained under another; never one from a request.

A text that is far too long is refused by its beginning: encoding a whole megabyte takes half a second and some hundred
times its size, of which a few at a time would be enough to stop a server. `/tokenize`, which counts anything, does one
long text after the other.

How an adapter was trained (on chats or on plain text, under which system prompt) is told in `/v1/models`, so that a
client can ask it so; the server doesn't choose between the two for anybody.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.adapter.file import RECORD, is_run
from deltaw.data import asking
from deltaw.data.document import checked_messages
from deltaw.data.render import Renderer
from deltaw.errors import InputError, Rejected
from deltaw.files.strict_json import read_json
from deltaw.generate.grammar import Grammar, Grammars
from deltaw.model import Model
from deltaw.serve.adapters import Adapters, Served
from deltaw.serve.protocol import Objects
from deltaw.serve.refused import wrong
from deltaw.serve.tools import CHOICE, TOOLS, Calling, Choice

REPORT = "report.html"
HEAD, FAR = (
    16,
    2,
)  # characters of a text that are tried for each token of the context, and how many times over is too many


@dataclass
class Catalog:
    """The base of `model`, and `adapters`. Its methods read files: not for the event loop."""

    model: Model
    adapters: Adapters
    _renderers: dict[Path, tuple[int, Renderer]] = field(default_factory=dict)
    _grammars: Grammars | None = None
    _long: threading.Lock = field(default_factory=threading.Lock)  # one long text is encoded at a time

    @property
    def base(self) -> str:
        """The base's name."""
        return self.model.base.source.public_name

    def served(self, name: str) -> Served | None:
        """The adapter of this name; None for the base's. Raises Unknown."""
        return None if name == self.base else self.adapters.get(name)

    def some(self, count: int) -> list[str]:
        """Names that can be asked for, at most so many: the base's first."""
        return [self.base, *self.adapters.names(count - 1)]

    def models(self) -> list[dict[str, Any]]:
        """Entries of `/v1/models`: the base first."""
        return [self._base(), *map(self._adapter, self.adapters.all())]

    def entry(self, name: str) -> dict[str, Any]:
        """One of them. Raises Unknown."""
        served = self.served(name)
        return self._base() if served is None else self._adapter(served)

    def report(self, name: str) -> bytes | None:
        """The report of the run that an adapter is from, if it has one. Raises Unknown."""
        served = self.served(name)
        file = None if served is None else _report(served.path)
        return file.read_bytes() if file else None

    def chat_ids(
        self, served: Served | None, messages: Objects, tools: Sequence[dict[str, Any]], *, any_length: bool = False
    ) -> tuple[int, ...]:
        """What the model is given of a chat. Raises InputError, or Refused for one that is far too long, too, unless
        `any_length` may be."""
        renderer = self._renderer(served)
        if renderer.chats is None:
            raise wrong("this base has no chat template: ask with /v1/completions", "model")
        try:
            checked = checked_messages(messages)
        except Rejected as rejected:
            raise wrong(str(rejected), "messages") from None
        if not renderer.chats.writes_calls and any("tool_calls" in message for message in checked):
            raise wrong("messages: this model's chat template doesn't write tool_calls: tell them in words", "messages")
        texts = [message.get("content") for message in checked]
        with self._bounded("\n".join(text for text in (*texts, *map(str, tools)) if isinstance(text, str)), any_length):
            return tuple(renderer.prompt_ids([_unweighted(message) for message in checked], tools))

    def stop_ids(self, served: Served | None) -> frozenset[int]:
        """What ends a chat's answer: with a template of its own an adapter has learnt an end of its own."""
        return frozenset(self._renderer(served).stop_ids)

    def calling(self, served: Served | None, choice: Choice) -> Calling | None:
        """How answers call the tools that they are shown; None where calls can't be told from text. Raises Refused
        where they can't be shown any, or not be held to calls."""
        chats = self._renderer(served).chats
        if chats is None or not choice.shown:
            return None
        if chats.call_form is not None:
            return Calling(chats.call_form, choice)
        if not chats.takes_tools:
            raise wrong("this model's chat template takes no tools: leave them out, or tool_choice: none", TOOLS)
        if choice.held:
            raise wrong("this model's chat template writes no calls that an answer could be held to", CHOICE)
        return None

    def call_grammar(self, calling: Calling, stop_ids: frozenset[int]) -> Grammar:
        """What answers are held to that must be calls. Raises InputError for what can't be kept."""
        return self._all_grammars.of_calls(calling.form, calling.choice.held, calling.choice.most, stop_ids)

    def grammar(self, schema: Mapping[str, Any], stop_ids: frozenset[int]) -> Grammar:
        """What answers that end so are held to. Raises InputError for a schema that can't be kept."""
        return self._all_grammars.of(schema, stop_ids)

    @property
    def _all_grammars(self) -> Grammars:
        if self._grammars is None:
            self._grammars = Grammars(self.model.renderer.tokenizer)
        return self._grammars

    def text_ids(self, text: str, *, any_length: bool = False) -> tuple[int, ...]:
        """What the model is given of a completion's text. Raises InputError, or Refused as `chat_ids` does."""
        with self._bounded(text, any_length):
            return tuple(self.model.renderer.raw_ids(text))

    @contextmanager
    def _bounded(self, text: str, any_length: bool) -> Iterator[None]:
        """The text may be encoded in the block. A beginning that takes twice the context doesn't come to fit by what
        follows it; one that doesn't is doubled and tried again."""
        size = HEAD * self.model.context
        if len(text) <= size:
            yield
            return
        with self._long:
            while size < len(text) and not any_length:
                if (head := len(self.model.renderer.raw_ids(text[:size]))) > FAR * self.model.context:
                    what = f"the prompt has more than {head:,} tokens, and the context holds {self.model.context:,}"
                    raise wrong(what, code="context_length_exceeded")
                size *= 2
            yield

    def _renderer(self, served: Served | None) -> Renderer:
        """The base's, or one with the template that lies beside the adapter's weights."""
        file = served.template if served else None
        if file is None:
            return self.model.renderer
        changed = file.stat().st_mtime_ns
        if self._renderers.get(file, (0,))[0] != changed:
            self._renderers[file] = changed, Renderer(self.model.renderer.tokenizer, template=str(file))
        return self._renderers[file][1]

    def _base(self) -> dict[str, Any]:
        return {
            **_entry(self.base, 0),
            "parent": None,
            "max_model_len": self.model.context,
            **self._asked("", "", False),
        }

    def _adapter(self, served: Served) -> dict[str, Any]:
        return {
            **_entry(served.name, served.modified),
            "parent": served.parent,
            "max_model_len": self.model.context,
            "rank": served.rank,
            "report": _report(served.path) is not None,
            "problem": served.problem or None,
            **self._asked(_template(served.path), served.system, True),
        }

    def _asked(self, template: str, system: str, adapter: bool) -> dict[str, Any]:
        has_template = self.model.renderer.template is not None
        how = asking.known(template, system, has_template=has_template, adapter=adapter)
        return {"asking": "chat" if how.chat else "plain", "system": how.system}


def shown(served: Served) -> dict[str, Any]:
    """An entry of `/v1/adapters`. Its path stays here."""
    return {
        "id": served.name,
        "object": "adapter",
        "parent": served.parent,
        "attached": served.number is not None,
        "rank": served.rank,
        "digest": served.digest or None,
        "modified": served.modified,
        "problem": served.problem or None,
    }


def _entry(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "deltaw"}


def _unweighted(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "weight"}


def _report(path: Path) -> Path | None:
    """The report of an adapter's run: a run's adapter lies in its folder `adapter`."""
    file = path.parent / REPORT
    return file if path.name == "adapter" and is_run(path.parent) and file.is_file() else None


def _template(path: Path) -> str:
    """Which template an adapter was trained under, as its record has it; empty where nothing says so."""
    try:
        base = read_json(path / RECORD).get("base")
    except InputError:
        return ""
    template = base.get("template") if isinstance(base, dict) else None
    return template if isinstance(template, str) else ""
