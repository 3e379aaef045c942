"""An adapter folder in PEFT's own code, as whoever downloads it runs it. The home of peft, which is optional.

The base is the one that its config names, or `--base`. The tokenizer is the adapter folder's where it has one, else the
base's with the folder's chat_template.jinja; answers end where the folder's generation config says, else the base's.
What PEFT is given is checked first: safetensors only, and a config without
fields that would import code or match by a stranger's regular expression (peft_config.py).
"""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from deltaw.adapter.file import CONFIG, WEIGHTS, is_run
from deltaw.adapter.peft_config import check_config
from deltaw.base.frozen import embedding_of
from deltaw.base.load import open_base
from deltaw.base.source import find_base, found_as
from deltaw.data.render import open_tokenizer
from deltaw.errors import InputError
from deltaw.files.safetensors import read_header
from deltaw.files.strict_json import read_json
from deltaw.generate.cache import context
from deltaw.named import Named
from deltaw.shipping.beside import GENERATION_CONFIG
from deltaw.shipping.trained import TEMPLATE
from deltaw.shipping.verify.sides.local import Local, Running, Words, running, stops_of, working_type
from deltaw.shipping.verify.sides.side import Prompt
from deltaw.show.progress import Display

INSTALL = "pip install peft"


class Peft(Running):
    """`folder` is an adapter's or a run's. Raises InputError: no peft, no adapter, a base that isn't to be had."""

    def __init__(self, name: str, folder: Path, *, base: str | None, display: Display) -> None:
        if importlib.util.find_spec("peft") is None:
            raise InputError(f"{name}: asking PEFT needs a package that isn't installed", fix=INSTALL)
        self.name, self.notes = name, []
        if is_run(folder):
            base = base or Named(str(folder)).base
            folder = folder / "adapter"
        config = read_json(folder / CONFIG, max_bytes=1_000_000, allow_nan=True)
        check_config(config, str(folder / CONFIG))
        read_header(folder / WEIGHTS)
        self.folder = folder
        self.source = source = find_base(
            base or _base_of(config.get("base_model_name_or_path"), folder), display=display
        )
        own = (folder / "tokenizer_config.json").is_file()
        template = folder / TEMPLATE
        self._words = Words(
            open_tokenizer(folder if own else source.directory),
            template.read_text(encoding="utf-8") if template.is_file() else None,
        )
        self.chats = self._words.has_template
        self._dtype = working_type(source)
        self.numbers = running(self._dtype, "float32")

    def load(self) -> None:
        assert self.source is not None
        from peft import PeftModel

        opened = open_base(self.source, dtype=self._dtype)
        stops = stops_of(opened.model, self.folder)
        if (self.folder / GENERATION_CONFIG).is_file():  # else they are the base's, whatever the adapter learnt
            self.stops = frozenset(stops)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                _make_room(opened.model, self.folder)
                model = PeftModel.from_pretrained(opened.model, str(self.folder))
            except Exception as error:  # whatever PEFT makes of the folder
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"{self.folder}: PEFT can't load it ({type(error).__name__}: {reason})") from None
        warned = [" ".join(str(one.message).split())[:200] for one in told if issubclass(one.category, UserWarning)]
        self.notes += [f"PEFT warns: {words}" for words in warned[:3]]
        inner = cast(nn.Module, model.base_model.model)
        self.local = Local(inner.eval(), stops, self._words.decode, off=model.disable_adapter)
        self.context = context(opened.model)

    def ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...] | None]:
        return [self._words.ids(prompt) for prompt in prompts]

    def decode(self, ids: Sequence[int]) -> str | None:
        return self._words.decode(ids)


def _make_room(model: Any, folder: Path) -> None:
    """Rows for tokens that the adapter adds, as its card tells its users to make."""
    tokens = read_json(folder / CONFIG, max_bytes=1_000_000, allow_nan=True).get("trainable_token_indices") or []
    lists = tokens.values() if isinstance(tokens, dict) else [tokens]
    most = max((id for ids in lists for id in ids), default=-1) + 1
    if most > embedding_of(model).shape[0]:
        model.resize_token_embeddings(most, mean_resizing=False)


def _base_of(name: object, folder: Path) -> str:
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder} doesn't say which base it belongs to", fix="name it with --base")
    return found_as(name)
