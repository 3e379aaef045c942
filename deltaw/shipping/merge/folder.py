"""A merged model's folder beside its weights: config, index, tokenizer, card; and whether the folder is whole.

The config is the base's, with the type of the weights and with nothing tied where that isn't so any more. Local paths
go, and `auto_map`, the names of code that isn't beside the weights and wasn't run. The folder is read back before it
gets its name: its headers are held to the model that its own config describes, so that every parameter is there.
"""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from deltaw.adapter.checkpoints import Checkpoint
from deltaw.base.fingerprint import mathematics
from deltaw.base.load import open_skeleton
from deltaw.base.source import Source
from deltaw.errors import RunError, listed
from deltaw.files.atomic import write_text_atomic
from deltaw.files.safetensors import read_header
from deltaw.files.shards import weights_file
from deltaw.files.strict_json import read_json
from deltaw.shipping.beside import beside_size, write_beside
from deltaw.shipping.card import Form, write_card
from deltaw.shipping.merge.older_config import with_older_names
from deltaw.shipping.merge.plan import MergePlan
from deltaw.shipping.merge.rewrite import TYPES, WORDS, entries, size
from deltaw.shipping.trained import Trained
from deltaw.shipping.usage import transformers_usage

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # of towers
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
LOCAL = ("_name_or_path", "name_or_path", "auto_map")
HEADER_BYTES, TENSORS = 100_000_000, 1_000_000  # what is accepted of a base's header


def write_around_weights(trained: Trained, plan: MergePlan, folder: Path, dtype: torch.dtype | None) -> None:
    """Everything but the weights."""
    base = trained.base.directory
    write_text_atomic(folder / "config.json", json.dumps(with_older_names(_config(base, plan, dtype)), indent=2) + "\n")
    index = weights_file(base)
    if index is not None and index.suffix == ".json":
        write_text_atomic(folder / index.name, json.dumps(_index(index, plan, dtype), indent=2) + "\n")
    for file in _more_files(base):
        shutil.copyfile(file, folder / file.name)
    write_beside(trained, folder)
    write_card(folder, trained, Form("finetune", "transformers"), transformers_usage(trained))


def _more_files(base: Path) -> list[Path]:
    """Licences, and what a model with a tower needs beside its tokenizer."""
    files = [base / name for name in PROCESSORS] + [file for glob in LICENCES for file in sorted(base.glob(glob))]
    return [file for file in files if file.is_file()]


def needed_bytes(trained: Trained, plan: MergePlan, dtype: torch.dtype | None) -> int:
    """What the whole folder takes on the disk."""
    more = sum(file.stat().st_size for file in _more_files(trained.base.directory))
    report = trained.run.report if trained.run else None
    more += report.stat().st_size if report is not None and report.is_file() else 0
    return size(plan, dtype) + beside_size(trained) + more


def _config(base: Path, plan: MergePlan, dtype: torch.dtype | None) -> dict[str, Any]:
    """The base's config with what changes: its type, if another was asked for, and what is tied."""
    config = read_json(base / "config.json", allow_nan=True)
    config = {key: value for key, value in config.items() if key not in LOCAL}
    word = type_name(plan, dtype)
    for part in _parts(config):
        for key in ("dtype", "torch_dtype"):
            if key in part and dtype is not None:
                part[key] = word
        if plan.words and "vocab_size" in part:
            part["vocab_size"] = plan.words
        if plan.unties:  # a family's default may be to tie, in the whole and in its language model
            part["tie_word_embeddings"] = False
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = word
    return config


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config, and that of its language model where there is a tower beside it."""
    return [config, *(config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict))]


def _index(index: Path, plan: MergePlan, dtype: torch.dtype | None) -> dict[str, Any]:
    """The index of the shards, as the plan fills them."""
    old = read_json(index, max_bytes=100_000_000)
    sizes = {name: e.size for file in plan.by_file for name, e in entries(plan, file, header(file), dtype).items()}
    metadata = {key: value for key, value in (old.get("metadata") or {}).items() if key != "total_parameters"}
    return {
        "metadata": {**metadata, "total_size": sum(sizes.values())},
        "weight_map": {planned.name: planned.file.name for planned in sorted(plan.tensors, key=lambda p: p.name)},
    }


def header(file: Path) -> Any:
    """The header of one of the base's files."""
    return read_header(file, max_header_bytes=HEADER_BYTES, max_tensors=TENSORS)


def check_whole(folder: Path, plan: MergePlan) -> None:
    """Raise RunError unless the folder's own config makes the base's model, with every parameter in its files."""
    skeleton = open_skeleton(Source(str(folder), folder))
    if mathematics(skeleton.config) != mathematics(plan.skeleton.config):
        raise RunError("the merged model's config.json doesn't mean what the base's does")
    checkpoint = Checkpoint(folder, skeleton)
    missing = [
        name
        for name, _ in skeleton.named_parameters()
        if checkpoint.find(name) is None and name not in checkpoint.converted
    ]
    if missing:
        raise RunError(f"{len(missing)} parameters of the merged model are in none of its files:\n{listed(missing)}")


def type_name(plan: MergePlan, dtype: torch.dtype | None) -> str:
    """ "bfloat16": the type of most numbers of the merged model."""
    numbers: Counter[str] = Counter()
    for planned in plan.tensors:
        if planned.parameter in plan.weights and planned.dtype in TYPES:
            numbers[planned.dtype] += max(1, torch.Size(planned.shape).numel())
    word = WORDS[dtype] if dtype is not None else numbers.most_common(1)[0][0]
    return str(TYPES[word]).removeprefix("torch.")
