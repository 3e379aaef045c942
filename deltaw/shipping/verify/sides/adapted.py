"""A run or an adapter folder as a side: the base with the adapter on it, as deltaw itself answers.

Prompts are written as they were in training (data/render.py), with the template that the adapter was trained under, and
answers end where that template's turns end. The others are usually compared with this side.
"""

from collections.abc import Sequence

from deltaw.adapter.attach import attach
from deltaw.base.forward import plan_forward
from deltaw.base.load import as_kept, open_base
from deltaw.base.stand_in import disabled
from deltaw.generate.cache import context
from deltaw.shipping.trained import open_trained
from deltaw.shipping.verify.sides.local import Local, Running, running, working_type
from deltaw.shipping.verify.sides.side import Prompt
from deltaw.show.progress import Display


class Adapted(Running):
    """What `open_trained` opens. Raises InputError: no adapter, another base, a template that isn't available."""

    def __init__(self, name: str, *, base: str | None, display: Display) -> None:
        self.name, self.notes = name, []
        self.trained = open_trained(name, base=base, display=display)
        self.source = self.trained.base
        # On the weights that it was trained on, as they are kept there.
        config = self.trained.config
        self.weights = as_kept(self.source, config.base_weights) if config else "auto"
        if self.weights != "auto":
            self.notes.append(
                f"{name} is asked on {self.weights} weights of its base, as it was trained (base_weights): a side on "
                "others differs by more than rounding"
            )
        self._dtype = working_type(self.source)
        self.numbers = running(self._dtype, "float32")
        self.chats = not self.trained.plain and bool(self.trained.renderer.template)

    def load(self) -> None:
        opened = open_base(self.trained.base, dtype=self._dtype, weights=self.weights)
        plan_forward(opened.model)
        attached = attach(opened.model, self.trained.adapter, tokens=self.trained.renderer.tokens)
        renderer = self.trained.renderer
        self.stops = frozenset(renderer.stop_ids)
        stand_ins = list(attached.stand_ins.values())
        self.local = Local(
            opened.model,
            renderer.stop_ids,
            lambda ids: renderer.decode(ids, skip_special=False),
            off=attached.disabled,
            plain=lambda: disabled(stand_ins),
        )
        self.context = context(opened.model)

    def ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...] | None]:
        render = self.trained.renderer.prompt_ids
        return [tuple(render(prompt.content, prompt.tools)) for prompt in prompts]

    def decode(self, ids: Sequence[int]) -> str | None:
        return self.trained.renderer.decode(ids, skip_special=False)
