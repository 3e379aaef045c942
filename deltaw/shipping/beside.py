"""The files beside exported weights, so that answers come out as trained: tokenizer, chat template, stop tokens.

    tokenizer.json, …         the base's own files, byte for byte; local paths in tokenizer_config.json are removed.
                              Where tokens were added: as transformers writes the tokenizer that has them
    chat_template.jinja       the template that was trained under, if it isn't the tokenizer's own; the tokenizer's
                              config then names none, since loaders differ in which of the two they take
    generation_config.json    the base's, with every token that ends an answer: its own, the tokenizer's eos, and the
                              template's end of turn, which many bases' files forget

Servers prefer the files in an adapter's or a model's folder to the base's, so a missing tokenizer means the base's,
with the base's template.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from deltaw.files.atomic import write_text_atomic
from deltaw.files.strict_json import read_json
from deltaw.shipping.trained import TEMPLATE, Trained

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
TOKENIZER = (
    "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", TEMPLATE,
)  # fmt: skip
MORE_TEMPLATES = "additional_chat_templates"  # of a tokenizer that has several
PATHS = ("name_or_path", "tokenizer_file", "special_tokens_map_file")  # where it once lay on somebody's machine


def write_beside(trained: Trained, folder: Path) -> None:
    """Write tokenizer, template and generation config into `folder`. Raises RunError for what the disk refuses."""
    base = trained.base.directory
    if trained.renderer.grown:
        trained.renderer.tokenizer.save_pretrained(folder)
    for name in () if trained.renderer.grown else TOKENIZER:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if (base / MORE_TEMPLATES).is_dir() and trained.renderer.own_template:
        shutil.copytree(base / MORE_TEMPLATES, folder / MORE_TEMPLATES)
    if (folder / TOKENIZER_CONFIG).is_file():
        _clean(trained, folder / TOKENIZER_CONFIG)
    if trained.renderer.template and not trained.renderer.own_template:
        write_text_atomic(folder / TEMPLATE, trained.renderer.template)
    write_text_atomic(folder / GENERATION_CONFIG, json.dumps(generation_config(trained), indent=2) + "\n")


def beside_size(trained: Trained) -> int:
    """At least the bytes that `write_beside` writes."""
    files = [trained.base.directory / name for name in (*TOKENIZER, GENERATION_CONFIG)]
    return sum(file.stat().st_size for file in files if file.is_file()) + len(trained.renderer.template or "") * 4


def generation_config(trained: Trained) -> dict[str, Any]:
    """The base's generation config, with all tokens that end an answer."""
    file = trained.base.directory / GENERATION_CONFIG
    config = read_json(file, allow_nan=True) if file.is_file() else {}
    config.pop("_from_model_config", None)  # that it is: transformers might make it again, without our stops
    stops = stop_ids(trained)
    return {**config, "eos_token_id": stops[0] if len(stops) == 1 else stops}


def stop_ids(trained: Trained) -> list[int]:
    """The tokens that end an answer, the tokenizer's eos first: some programs pad with the first."""
    eos = trained.renderer.tokenizer.eos_token_id
    return [eos, *sorted(trained.renderer.stop_ids - {eos})]


def missing_stop(trained: Trained) -> str | None:
    """The token that ends a turn, as text, if the base alone wouldn't stop at it."""
    end = trained.renderer.end_of_turn
    if trained.plain or end is None or end in trained.renderer.model_stop_ids:
        return None
    return str(trained.renderer.tokenizer.convert_ids_to_tokens(end))


def _clean(trained: Trained, file: Path) -> None:
    config = read_json(file)
    dropped = [key for key in PATHS if Path(str(config.get(key) or "")).is_absolute()]
    dropped += ["chat_template"] if not trained.renderer.own_template and "chat_template" in config else []
    if dropped:
        cleaned = {key: value for key, value in config.items() if key not in dropped}
        write_text_atomic(file, json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n")
