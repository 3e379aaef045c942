"""`deltaw merge`: base and adapter -> one model folder that transformers loads.

    planned      which tensor changes, is copied, is written on its own (plan.py); said before anything is written
    written      piece by piece, the base's files under their own names, into a hidden folder (rewrite.py, target.py)
    surveyed     what survives the rounding, from the same pass; said, and refused, before the folder has its name
    beside       config, tokenizer, the template and the stop tokens that were trained (beside.py), the card
    read         the folder's headers are held to the model that its config describes: every parameter is there

The config is the base's, with the type of the weights and with nothing tied where that isn't so any more. Local paths
go, and `auto_map`, the names of code that isn't beside the weights and wasn't run.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deltaw.adapter.checkpoints import Checkpoint
from deltaw.base.fingerprint import mathematics
from deltaw.base.load import open_skeleton
from deltaw.base.source import Source
from deltaw.errors import InputError, RunError, listed
from deltaw.files.atomic import write_text_atomic
from deltaw.files.safetensors import read_header
from deltaw.files.shards import weights_file
from deltaw.files.strict_json import read_json
from deltaw.linalg.rounding import Survival
from deltaw.shipping.beside import beside_size, write_beside
from deltaw.shipping.card import Form, write_card
from deltaw.shipping.merge import survey
from deltaw.shipping.merge.older_config import with_older_names
from deltaw.shipping.merge.plan import MergePlan, counts, plan_merge
from deltaw.shipping.merge.rewrite import TYPES, WORDS, entries, rewrite, size
from deltaw.shipping.target import check_output, target
from deltaw.shipping.trained import Trained, open_trained
from deltaw.shipping.usage import transformers_usage
from deltaw.show.progress import Display

DTYPES = ("bfloat16", "float16", "float32")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # of towers
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
LOCAL = ("_name_or_path", "name_or_path", "auto_map")
MILLION = 1_000_000
Shown = tuple[dict[str, Any], str]  # for machines, for people


def merge_named(
    name: str,
    output: str,
    *,
    dtype: str | None = None,
    base: str | None = None,
    replace: bool = False,
    force: bool = False,
    display: Display | None = None,
) -> Shown:
    """Merge a run or an adapter into its base. Raises InputError and RunError; then there is no folder `output`."""
    display = display or Display(quiet=True)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: no type of a merged model", fix=f"one of {', '.join(DTYPES)}")
    number = None if dtype is None else getattr(torch, dtype)
    check_output(output, replace)
    trained = open_trained(name, base=base, display=display)
    plan = plan_merge(trained)
    type_name = _type_name(plan, number)
    for line in _planned(plan, type_name):
        display.say(line)
    what = {"kind": "merge", "base": trained.adapter.base.fingerprint, "dtype": type_name}
    needed = _needed(trained, plan, number)
    with target(output, what=what, needed=needed, replace=replace, sources=trained.sources) as folder:
        began = time.perf_counter()
        survivals = _write_weights(plan, folder, number, display)
        seconds = time.perf_counter() - began
        warning = survey.warning(survivals, type_name)
        for said in [*survey.said(survivals, type_name), *([warning] if warning else [])]:
            display.say(said)
        survey.check_floating(survivals, type_name, force=force)
        _write_beside(trained, plan, folder, number)
        _check_whole(folder, plan)
        files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    result = {
        "output": output,
        "base": trained.base.public_name,
        "dtype": type_name,
        "seconds": seconds,
        "fates": _fates(plan),
        "tensors": [row for file in plan.by_file for row in _shown(plan, file, number)],
        "survival": survey.to_json(survivals),
        "warning": warning,
        "files": files,
    }
    return result, f"{output}: a model in {type_name}, {sum(files.values()):,} bytes, {len(files)} files"


def _write_weights(
    plan: MergePlan, folder: Path, dtype: torch.dtype | None, display: Display
) -> Mapping[str, Survival]:
    total = max(1, sum(file.stat().st_size for file in plan.by_file) // MILLION)
    with display.task("merging, MB", total) as update:
        survivals = rewrite(plan, folder, dtype, progress=lambda done: update(min(done // MILLION, total - 1)))
        update(total)
    return survivals


def _write_beside(trained: Trained, plan: MergePlan, folder: Path, dtype: torch.dtype | None) -> None:
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


def _needed(trained: Trained, plan: MergePlan, dtype: torch.dtype | None) -> int:
    more = sum(file.stat().st_size for file in _more_files(trained.base.directory))
    report = trained.run.report if trained.run else None
    more += report.stat().st_size if report is not None and report.is_file() else 0
    return size(plan, dtype) + beside_size(trained) + more


def _config(base: Path, plan: MergePlan, dtype: torch.dtype | None) -> dict[str, Any]:
    """The base's config with what is no longer so: its type, if another was asked for, and what is tied."""
    config = read_json(base / "config.json", allow_nan=True)
    config = {key: value for key, value in config.items() if key not in LOCAL}
    word = _type_name(plan, dtype)
    for part in _parts(config):
        for key in ("dtype", "torch_dtype"):
            if key in part and dtype is not None:
                part[key] = word
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
    sizes = {name: e.size for file in plan.by_file for name, e in entries(plan, file, _header(file), dtype).items()}
    metadata = {key: value for key, value in (old.get("metadata") or {}).items() if key != "total_parameters"}
    return {
        "metadata": {**metadata, "total_size": sum(sizes.values())},
        "weight_map": {planned.name: planned.file.name for planned in sorted(plan.tensors, key=lambda p: p.name)},
    }


def _header(file: Path) -> Any:
    return read_header(file, max_header_bytes=100_000_000, max_tensors=MILLION)


def _check_whole(folder: Path, plan: MergePlan) -> None:
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


def _type_name(plan: MergePlan, dtype: torch.dtype | None) -> str:
    """ "bfloat16": the type of most numbers of the merged model."""
    numbers: Counter[str] = Counter()
    for planned in plan.tensors:
        if planned.parameter in plan.weights and planned.dtype in TYPES:
            numbers[planned.dtype] += max(1, torch.Size(planned.shape).numel())
    word = WORDS[dtype] if dtype is not None else numbers.most_common(1)[0][0]
    return str(TYPES[word]).removeprefix("torch.")


def _fates(plan: MergePlan) -> dict[str, int]:
    return dict(counts(plan))


def _planned(plan: MergePlan, type_name: str) -> list[str]:
    fates = _fates(plan)
    lines = [
        f"plan: {len(plan.tensors)} tensors in {len(plan.by_file)} file(s), in {type_name}: "
        f"{fates['changed']} changed, {fates['copied']} copied, {fates['untied']} untied"
    ]
    if plan.unties:
        names = [planned.name for planned in plan.tensors if planned.fate == "untied"]
        lines.append(
            f"the update goes to one of two tied weights, so they are tied no more: {', '.join(names)} is written"
        )
    return lines


def _shown(plan: MergePlan, file: Path, dtype: torch.dtype | None) -> list[dict[str, Any]]:
    """The plan of a file, a line for each tensor."""
    new = entries(plan, file, _header(file), dtype)
    return [
        {
            "name": planned.name,
            "file": file.name,
            "fate": planned.fate,
            "dtype": new[planned.name].dtype,
            "shape": list(planned.shape),
            "module": planned.module,
        }
        for planned in plan.by_file[file]
    ]
