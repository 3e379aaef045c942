"""An opened model: base, tokenizer and adapter together, ready to be trained, measured or asked.

`open_model` is where the pieces meet, so it is where mismatches are caught: an adapter of another base is refused by
fingerprint, and one trained under another chat template is named.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os import fspath
from pathlib import Path
from typing import Any

from deltaw.adapter.attach import Attached, attach
from deltaw.adapter.file import BaseId
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.load import Base, open_base
from deltaw.base.source import find_base
from deltaw.config import Dtype
from deltaw.data.opening import open_renderer
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.generate.cache import context
from deltaw.generate.engine import generate, stream
from deltaw.generate.sampling import Sampling
from deltaw.named import Named
from deltaw.show.progress import Display, Progress, unseen
from deltaw.show.text import counted

PLAIN = "plain"  # in place of a template's fingerprint: trained on prompts as they are
Prompt = str | Sequence[dict[str, Any]]  # text as it is, or a chat's messages


@dataclass(frozen=True, repr=False)
class Model:
    """A base with its tokenizer, and an adapter or none."""

    base: Base
    renderer: Renderer
    forward: Forward
    attached: Attached | None = None
    trained_plain: bool = False  # the adapter was trained on prompts without the chat template

    def __repr__(self) -> str:
        adapted = (
            "no adapter" if self.attached is None else f"an adapter on {counted(len(self.attached.layers), 'module')}"
        )
        return f"Model({self.base!r}, {adapted})"

    @property
    def plain_prompts(self) -> bool:
        """Whether a prompt is to be written as it is rather than as a chat."""
        return self.trained_plain or self.renderer.template_fingerprint == "none"

    def describe(self) -> str:
        """One line for logs and results: which path a pass takes."""
        path = self.forward.describe()
        return path if self.attached is None else f"{path}, {self.attached.describe()}"

    @property
    def id(self) -> BaseId:
        """What an adapter trained here records of its base."""
        source = self.base.source
        return BaseId(source.public_name, source.revision, self.base.fingerprint, self.renderer.template_fingerprint)

    def generate(self, prompt: Prompt, *, adapter: bool = True, **sampling: Any) -> str:
        """The model's answer as text. `adapter=False`: the base's. `sampling`: the fields of `Sampling`."""
        with self._switch(adapter):
            (ids,) = generate(
                self.base.model, [self.renderer.prompt_ids(prompt)], Sampling.checked(**sampling), self._stop
            )
        return self.renderer.decode(ids)

    def stream(self, prompt: Prompt, *, adapter: bool = True, **sampling: Any) -> Iterator[str]:
        """The same answer in pieces, as they come."""
        with self._switch(adapter):
            ids: list[int] = []
            shown = ""
            for token in stream(
                self.base.model, self.renderer.prompt_ids(prompt), Sampling.checked(**sampling), self._stop
            ):
                ids.append(token)
                text = self.renderer.decode(ids)
                # Half a character (bytes of an emoji, say) decodes to U+FFFD until its other half has come.
                if not text.endswith("�"):
                    yield text[len(shown) :]
                    shown = text
            rest = self.renderer.decode(ids)[len(shown) :]
            if rest:
                yield rest

    def generate_all(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, progress: Progress = unseen
    ) -> list[str]:
        """Answers to many tokenised prompts, batched."""
        rows = generate(self.base.model, prompts, sampling, self._stop, progress=progress)
        return [self.renderer.decode(row) for row in rows]

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return context(self.base.model)

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
    device: str = "auto",
    display: Display | None = None,
) -> Model:
    """Open a run folder, an adapter folder, or a base (any name `open_base` takes).

    `base` is what the run or the adapter goes on, in place of the one it names; `dtype` is the run's own unless given.
    Raises InputError where they don't belong together.
    """
    display, named = display or Display(quiet=True), Named.of(name)
    # With a base beside it, it is an adapter: else a broken adapter's folder would open as the plain base.
    adapter = named.adapter if named.holds_adapter or base is not None else None
    config = named.config
    source = find_base(fspath(base) if base else named.base if adapter else named.name, display=display)
    dtype = dtype or (config.train.dtype if config else "auto")
    opened = open_base(source, dtype=dtype, device=device, display=display)
    renderer = open_renderer(source, config, named.template)
    model = Model(opened, renderer, plan_forward(opened.model))
    if adapter is None:
        return model
    wrong = adapter.base.mismatch(model.id)
    if wrong:
        raise InputError(f"{named.name} doesn't belong to this base: {wrong}", fix="name its own base with --base")
    if adapter.base.template not in ("", PLAIN, renderer.template_fingerprint):
        display.say(
            f"{named.name} was trained under another chat template than this tokenizer's, so answers may suffer"
        )
    attached = attach(opened.model, adapter)
    return Model(opened, renderer, model.forward, attached, trained_plain=adapter.base.template == PLAIN)
