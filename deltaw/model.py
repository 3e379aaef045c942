"""An opened model: base, tokenizer and adapter together, ready to be trained, measured or asked.

`open_model` is where the pieces meet, so it is where mismatches are caught: an adapter of another base is refused by
fingerprint, and one trained under another chat template is named.

A text is asked as the adapter was trained (data/asking.py), unless whoever asks wants it otherwise; messages go through
the chat template as they are.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from os import fspath
from pathlib import Path
from typing import Any, overload

from deltaw.adapter.attach import Attached, attach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.load import Base, as_kept, open_base
from deltaw.base.source import Source, find_base
from deltaw.config import BaseWeights, Dtype
from deltaw.data import asking
from deltaw.data.asking import PLAIN as PLAIN
from deltaw.data.asking import RAW, Asking, Prompt
from deltaw.data.opening import open_renderer
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.generate.cache import context
from deltaw.generate.engine import answers, generate, stream
from deltaw.generate.sampling import Sampling
from deltaw.kernels.copies import making
from deltaw.named import Named
from deltaw.show.progress import Display, Progress, unseen
from deltaw.show.text import counted

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True, repr=False)
class Model:
    """A base with its tokenizer, and an adapter or none."""

    base: Base
    renderer: Renderer
    forward: Forward
    attached: Attached | None = None
    asking: Asking = RAW

    def __repr__(self) -> str:
        adapted = (
            "no adapter" if self.attached is None else f"an adapter on {counted(len(self.attached.layers), 'module')}"
        )
        return f"Model({self.base!r}, {adapted})"

    def describe(self) -> str:
        """One line for logs and results: which path a pass takes."""
        path = self.forward.describe()
        return path if self.attached is None else f"{path}, {self.attached.describe()}"

    @property
    def id(self) -> BaseId:
        """What an adapter trained here records of its base."""
        source = self.base.source
        template = self.renderer.template_fingerprint
        return BaseId(source.public_name, source.revision, self.base.fingerprint, template, weights=self.base.rounded)

    @overload
    def generate(
        self, prompt: str | Messages, *, adapter: bool = ..., chat: bool | None = ..., **sampling: Any
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Messages],
        *,
        adapter: bool = ...,
        chat: bool | None = ...,
        **sampling: Any,
    ) -> list[str]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        adapter: bool = True,
        chat: bool | None = None,
        **sampling: Any,
    ) -> str | list[str]:
        """The model's answer to a text or to a chat's messages, or its answers to a list of them, decoded side by side.

        `adapter=False`: the base's. `chat`: whether a text is a user's message or goes to the model as it is; None is
        as the adapter was trained. `sampling`: the fields of `Sampling`.
        """
        one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], dict))
        prompts: Sequence[Any] = [prompt] if one else prompt
        ids = [self.prompt_ids(each, chat=chat) for each in prompts]
        with self._switch(adapter), making():
            answers = self.generate_all(ids, Sampling.checked(**sampling))
        return answers[0] if one else answers

    def stream(
        self, prompt: Prompt, *, adapter: bool = True, chat: bool | None = None, **sampling: Any
    ) -> Generator[str, None, bool]:
        """The same answer in pieces, as they come. What the generator returns is whether it was cut short."""
        prompt_ids, settings = self.prompt_ids(prompt, chat=chat), Sampling.checked(**sampling)
        with self._switch(adapter):
            ids: list[int] = []
            shown = ""
            for token in stream(self.base.model, prompt_ids, settings, self._stop):
                ids.append(token)
                text = self.renderer.decode(ids)
                # Half a character (bytes of an emoji, say) decodes to U+FFFD until its other half has come.
                if not text.endswith("�"):
                    yield text[len(shown) :]
                    shown = text
            rest = self.renderer.decode(ids)[len(shown) :]
            if rest:
                yield rest
        return len(ids) == self._room(prompt_ids, settings)

    def prompt_ids(self, prompt: Prompt, *, chat: bool | None = None, tools: Messages = ()) -> list[int]:
        """What the model is given of a prompt. Raises InputError where it can't be asked this."""
        if isinstance(prompt, str):
            has_template = self.renderer.template is not None
            prompt = self.asking.changed(chat=chat, template=has_template).prompt(prompt)
        return self.renderer.prompt_ids(prompt, tools)

    def generate_all(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, progress: Progress = unseen
    ) -> list[str]:
        """Answers to many tokenised prompts, batched."""
        rows = generate(self.base.model, prompts, sampling, self._stop, progress=progress)
        return [self.renderer.decode(row) for row in rows]

    def answers(
        self, prompts: Mapping[int, Sequence[int]], sampling: Sampling, *, adapter: bool = True
    ) -> Iterator[tuple[int, str, bool]]:
        """(number, answer, whether it was cut short) of each tokenised prompt, as they end."""
        room = {number: self._room(ids, sampling) for number, ids in prompts.items()}
        with self._switch(adapter):
            for ended in answers(self.base.model, prompts, sampling, self._stop):
                for number, ids in ended.items():
                    yield number, self.renderer.decode(ids), len(ids) == room[number]

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return context(self.base.model)

    def _room(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """The most tokens of an answer: one that has as many didn't end by itself."""
        return min(sampling.max_new_tokens, self.context - len(prompt))

    @property
    def _stop(self) -> set[int]:
        return self.renderer.stop_ids

    def _switch(self, adapter: bool) -> AbstractContextManager[None]:
        return nullcontext() if adapter or self.attached is None else self.attached.disabled()


def open_model(
    name: str | Path | Named,
    *,
    base: str | Path | None = None,
    dtype: Dtype | None = None,
    weights: BaseWeights | None = None,
    device: str = "auto",
    chat: bool | None = None,
    system: str | None = None,
    display: Display | None = None,
) -> Model:
    """Open a run folder, an adapter folder, or a base (any name `open_base` takes).

    `base` is what the run or the adapter goes on, in place of the one it names; `dtype` and `weights` (how the
    base's are kept in memory) are the run's own unless given.
    `chat`, `system`: how a text is asked, in place of how the adapter was trained. Raises InputError where they don't
    belong together, before the weights are read where that is possible.
    """
    display, named = display or Display(quiet=True), Named.of(name)
    # With a base beside it, it is an adapter: else a broken adapter's folder would open as the plain base.
    adapter = named.adapter if named.holds_adapter or base is not None else None
    config = named.local
    source = _found(named, fspath(base) if base else named.base if adapter else None, display)
    dtype = dtype or (config.train.dtype if config else "auto")
    renderer = open_renderer(source, config, named.template, named.tokens if adapter else None)
    how = asked_as(adapter, renderer).changed(chat=chat, system=system, template=renderer.template is not None)
    weights = weights or (as_kept(source, config.base_weights) if config else "auto")
    opened = open_base(source, dtype=dtype, device=device, display=display, weights=weights)
    model = Model(opened, renderer, plan_forward(opened.model), asking=how)
    if adapter is None:
        return model
    wrong = adapter.base.mismatch(model.id)
    if wrong:
        raise InputError(f"{named.name} doesn't belong to this base: {wrong}", fix="name its own base with --base")
    if adapter.base.template not in ("", PLAIN, renderer.template_fingerprint):
        display.say(
            f"{named.name} was trained under another chat template than this tokenizer's, so answers may suffer"
        )
    if adapter.base.weights != opened.rounded:
        display.say(
            f"{named.name} was trained on {adapter.base.weights_in_words} weights of its base, and here are "
            f"{model.id.weights_in_words}: answers differ a little from those that were measured"
        )
    return replace(model, attached=attach(opened.model, adapter, tokens=renderer.tokens))


def _found(named: Named, base: str | None, display: Display) -> Source:
    """The base of this name, or the one that is named by itself."""
    if base is not None:
        return find_base(base, display=display)
    try:
        return find_base(named.name, display=display)
    except InputError as error:
        raise named.refused(error) from None


def asked_as(adapter: Adapter | None, renderer: Renderer) -> Asking:
    """How a text is asked of a base with this adapter, or of the base alone."""
    template, system = ("", "") if adapter is None else (adapter.base.template, adapter.base.system)
    has_template = renderer.template is not None
    return asking.known(template, system, has_template=has_template, adapter=adapter is not None)
