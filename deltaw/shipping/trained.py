"""What is shipped: a trained adapter with the folder of its base and its tokenizer, found and held to each other.

No model is built and no adapter attached: merging, exporting and linting work on files and values, so that a base of
any size costs its largest tensor. The base's fingerprint is taken from the files by the model's own names, a tensor at
a time; where the files hold other tensors than the model does (experts that transformers stacks when it loads them),
the base is opened once after all.

The chat template that ships is the one that was trained under. A run knows it by its settings, an adapter's folder by
the `chat_template.jinja` beside the weights (written where it isn't the tokenizer's own). One that is neither there nor
the tokenizer's is an error: a template that changes on the way is the commonest reason why a shipped adapter answers
worse than it was measured.
"""

from dataclasses import dataclass
from pathlib import Path

from deltaw.adapter.checkpoints import Checkpoint
from deltaw.adapter.file import Adapter
from deltaw.base.fingerprint import fingerprint_of, same_base
from deltaw.base.load import open_base, open_skeleton
from deltaw.base.source import Source, find_base
from deltaw.config import RunConfig, load_config
from deltaw.data.render import TEMPLATE as TEMPLATE
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.files.shards import read_tensors
from deltaw.model import PLAIN, base_name, is_run, load_adapter, open_renderer, template_beside
from deltaw.run import Run
from deltaw.show.progress import Display


@dataclass(frozen=True)
class Trained:
    """An adapter and what it goes with. `name` is what the user typed, `run` the run that it comes from, if it does."""

    name: str
    adapter: Adapter
    base: Source
    renderer: Renderer
    run: Run | None = None
    config: RunConfig | None = None

    @property
    def sources(self) -> tuple[Path, Path]:
        """The folders that it is read from."""
        return Path(self.name).expanduser(), self.base.directory

    @property
    def plain(self) -> bool:
        """Whether it was trained on prompts as they are, without the chat template."""
        return self.adapter.base.template == PLAIN


def open_trained(name: str | Path, *, base: str | None = None, display: Display | None = None) -> Trained:
    """A run or an adapter folder, with its base (`base` instead of the one it names).

    Raises InputError: no adapter there, another base (by fingerprint), a chat template that is not to be had.
    """
    display = display or Display(quiet=True)
    path = Path(name).expanduser()
    adapter = load_adapter(path)
    config = load_config(path / "config.yaml") if is_run(path) else None
    source = find_base(base or (config.base if config else base_name(adapter, path)), display=display)
    _check_base(name, adapter, source)
    renderer = open_renderer(source, config, template_beside(path))
    if adapter.base.template not in ("", PLAIN, renderer.template_fingerprint):
        raise InputError(
            f"{name} was trained under another chat template than the tokenizer's of {source.name}",
            fix=f"put the one it was trained under beside its weights, as {TEMPLATE}",
        )
    return Trained(str(name), adapter, source, renderer, Run(path) if config else None, config)


def _check_base(name: str | Path, adapter: Adapter, source: Source) -> None:
    recorded = adapter.base.fingerprint
    if not recorded or same_base(recorded, fingerprint_of_folder(source)):
        return
    here = open_base(source, dtype="bfloat16", device="cpu").fingerprint
    if not same_base(recorded, here):
        raise InputError(
            f"{name} was trained on {adapter.base.name or 'another base'}, {source.name} is not that one",
            fix="name its own base with --base",
        )


def fingerprint_of_folder(source: Source) -> str:
    """The fingerprint that the opened model has, from its files, one tensor in memory at a time; "" where the files
    don't hold the model's parameters one by one."""
    skeleton = open_skeleton(source)
    checkpoint = Checkpoint(source.directory, skeleton)
    stored = [checkpoint.find(name) for name, _ in skeleton.named_parameters()]
    places = [place for place in stored if place is not None]
    if len(places) < len(stored):
        return ""
    names = {place.name for place in places}
    weights = (tensor for name, tensor in read_tensors(source.directory) if name in names)
    return fingerprint_of(weights, skeleton.config)
