"""What is shipped: a trained adapter with its base's folder and tokenizer, found and checked against each other.

No model is built and no adapter attached: merging, exporting and linting work on files (base_files.py) and values. The
base is opened only if its files hold other tensors than the model, so that they can't tell which base it is.

The chat template that ships is the one that was trained under. A run knows it by its settings, an adapter's folder by
the `chat_template.jinja` beside the weights (written if it isn't the tokenizer's own). If neither has it, that is an
error: a template that changes on the way is the commonest reason why a shipped adapter answers worse than measured.
"""

from dataclasses import dataclass
from pathlib import Path

from deltaw.adapter.file import Adapter
from deltaw.base.fingerprint import same_base
from deltaw.base.load import open_base
from deltaw.base.source import Source, find_base
from deltaw.config import RunConfig
from deltaw.data.opening import open_renderer
from deltaw.data.render import TEMPLATE as TEMPLATE
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.model import PLAIN
from deltaw.named import Named
from deltaw.run import Run
from deltaw.shipping.base_files import BaseFiles
from deltaw.show.progress import Display


@dataclass(frozen=True)
class Trained:
    """An adapter and what belongs to it. `name` is what the user typed, `run` the run that it comes from, if any."""

    name: str
    adapter: Adapter
    base_files: BaseFiles
    renderer: Renderer
    run: Run | None = None
    config: RunConfig | None = None

    @property
    def base(self) -> Source:
        return self.base_files.source

    @property
    def sources(self) -> tuple[Path, Path]:
        """The folders that it is read from."""
        return Path(self.name).expanduser(), self.base.directory

    @property
    def plain(self) -> bool:
        """Whether it was trained on prompts as they are, without the chat template."""
        return self.adapter.base.template == PLAIN

    @property
    def form_note(self) -> str | None:
        """That the base's files aren't quite what it was trained on, where they aren't."""
        base = self.adapter.base
        line = (
            f"it was trained on {base.weights_in_words} weights of the base, and what is shipped goes on its files' "
            "own: answers may differ a little from those that were measured"
        )
        return line if base.weights else None


def open_trained(name: str | Path, *, base: str | None = None, display: Display | None = None) -> Trained:
    """A run or an adapter folder, with its base (`base` instead of the one it names).

    Raises InputError: no adapter, another base (by fingerprint), a chat template that isn't available.
    """
    display = display or Display(quiet=True)
    named = Named.of(name)
    adapter, config = named.adapter, named.config
    source = find_base(base or named.base, display=display)
    files = BaseFiles(source)
    _check_base(name, adapter, files)
    renderer = open_renderer(source, named.local, named.template, named.tokens)
    if adapter.base.template not in ("", PLAIN, renderer.template_fingerprint):
        raise InputError(
            f"{name} was trained under another chat template than the tokenizer's of {source.name}",
            fix=f"put the one that it was trained under beside its weights, as {TEMPLATE}",
        )
    return Trained(str(name), adapter, files, renderer, Run(named.path) if config else None, config)


def _check_base(name: str | Path, adapter: Adapter, files: BaseFiles) -> None:
    recorded, source = adapter.base.fingerprint, files.source
    if not recorded or same_base(recorded, files.fingerprint):
        return
    here = open_base(source, dtype="bfloat16", device="cpu").fingerprint
    if not same_base(recorded, here):
        raise InputError(
            f"{name} was trained on {adapter.base.name or 'another base'}, and {source.name} isn't that base",
            fix="name its own base with --base",
        )
