"""Folders for other readers: an adapter as mlx-lm has it, and a whole model as transformers does.

mlx-lm makes LoRA layers by its config (in the last `num_layers` blocks, those that `keys` names) and then loads the
file; 0.32 refuses a tensor that matches no layer (tried), older versions silently ignored it. transformers fills in
random numbers for what a model folder's files lack, and drops what its config has no place for, both with only a line
in the log.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.adapter.checkpoints import BUFFERS
from deltaw.adapter.file import CONFIG, BaseId
from deltaw.base.source import PICKLES, Source, find_base
from deltaw.errors import DeltawError, InputError
from deltaw.files.safetensors import read_header
from deltaw.files.shards import shards
from deltaw.files.strict_json import read_json
from deltaw.shipping.lint import rules_chat
from deltaw.shipping.lint.base import Base, base_of
from deltaw.shipping.lint.chat import NO_TEMPLATE, Chat, template_of
from deltaw.shipping.lint.finding import (
    LLAMA_CPP,
    MLX,
    OLLAMA,
    PEFT,
    REFUSED,
    TRANSFORMERS,
    UNSURE,
    VLLM,
    WRONG,
    Finding,
    code,
    everywhere,
    some,
)  # fmt: skip
from deltaw.shipping.lint.forms import MLX_WEIGHTS, other_form
from deltaw.shipping.lint.rules_base import unknown_to_llama_cpp
from deltaw.shipping.lint.subject import Subject, number
from deltaw.show.progress import Display
from deltaw.show.text import counted

EXPORT = "let deltaw write it: deltaw export --to mlx"
MLX_UNREADABLE = code("DW801", "mlx-lm's files are missing or can't be read", {MLX: REFUSED}, EXPORT)
MLX_CONFIG = code("DW802", "a config from which mlx-lm can't make layers", {MLX: REFUSED}, EXPORT)
MLX_STRANGE = code(
    "DW803", "tensors for which mlx-lm's config makes no layer, or of another rank", {MLX: REFUSED}, EXPORT
)
MLX_HALF = code("DW804", "lora_a without its lora_b, or the other way round", {MLX: WRONG}, EXPORT)
MLX_SCALE = code("DW805", "a scale that is 0, NaN or infinite", {MLX: WRONG}, EXPORT)
MODEL_UNREADABLE = code(
    "DW811",
    "a model folder whose weights are missing, cut short or don't fit its config",
    everywhere(REFUSED),
    "get the complete folder again",
)
MODEL_UNSEEN = code(
    "DW812",
    "a model folder that lint doesn't open (pickles, code, quantised weights)",
    everywhere(UNSURE),
    "nothing in general: the finding says why",
)
MODEL_LACKS = code(
    "DW813",
    "parameters that the files lack: transformers fills them with random numbers",
    {TRANSFORMERS: WRONG, PEFT: WRONG, VLLM: REFUSED, LLAMA_CPP: REFUSED, OLLAMA: REFUSED, MLX: REFUSED},
    "merge it again: deltaw merge",
)
MODEL_DROPS = code(
    "DW814",
    "tensors that the config has no place for: they are dropped",
    {TRANSFORMERS: WRONG, PEFT: WRONG, VLLM: UNSURE, LLAMA_CPP: UNSURE, OLLAMA: UNSURE, MLX: UNSURE},
    "merge it again: deltaw merge",
)
MODEL_HEAD = code(
    "DW815",
    "a separate head in the files, but tie_word_embeddings in the config: vLLM and others drop the head",
    {VLLM: WRONG, LLAMA_CPP: UNSURE, OLLAMA: UNSURE, MLX: UNSURE},
    "write tie_word_embeddings: false",
)
MODEL_NO_TEMPLATE = code(
    "DW816", "a model folder without a chat template", everywhere(UNSURE), "put chat_template.jinja into it"
)
MODEL_OTHER_TEMPLATE = code(
    "DW817",
    "another chat template than the base's",
    everywhere(UNSURE),
    "nothing, if it was trained under that one; otherwise merge again",
)
BLOCK = re.compile(r"(?:.*\.)?(?:layers|h)\.(?P<number>\d{1,6})\.(?P<key>.+)")


@dataclass(frozen=True)
class MlxFolder:
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: Mapping[str, Any] = field(default_factory=dict)  # lora_parameters
    blocks: int | None = None  # how many the base has


def look_mlx(folder: Path, base: str | None, display: Display) -> Iterator[Finding]:
    """All findings about a folder with adapters.safetensors. Raises InputError for a --base that isn't one."""
    yield other_form("mlx", "export the adapter that it was made from for the place where it will run")
    source = find_base(base, display=display) if base else None
    try:
        config = read_json(folder / CONFIG, max_bytes=1_000_000, allow_nan=True)
        shapes = read_header(folder / MLX_WEIGHTS).shapes
    except InputError as error:
        yield MLX_UNREADABLE.finding(error.what)
        return
    if config.get("fine_tune_type", "lora") == "full":
        return
    given = config.get("lora_parameters")
    made = MlxFolder(config, shapes, given if isinstance(given, dict) else {}, _blocks(source))
    for rule in (mlx_config, mlx_tensors, mlx_scale):
        yield from rule(made)


def mlx_config(f: MlxFolder) -> Iterator[Finding]:
    wanted = {"rank": int, "scale": (int, float), "dropout": (int, float)}
    wrong = [
        f"lora_parameters.{name} is {f.parameters.get(name)!r:.40}"
        for name, kind in wanted.items()
        if not isinstance(f.parameters.get(name), kind) or isinstance(f.parameters[name], bool)  # type: ignore[arg-type]
    ]
    if type(f.config.get("num_layers")) is not int:
        wrong.append(f"num_layers is {f.config.get('num_layers')!r:.40}")
    if wrong:
        yield MLX_CONFIG.finding(f"{CONFIG}: {some(wrong)}")


def mlx_tensors(f: MlxFolder) -> Iterator[Finding]:
    rank, keys, layers = f.parameters.get("rank"), f.parameters.get("keys"), f.config.get("num_layers")
    ends = (".lora_a", ".lora_b", *((".m",) if f.config.get("fine_tune_type") == "dora" else ()))
    strange = [name for name in f.shapes if not name.endswith(ends)]
    for name, shape in f.shapes.items():
        path, _, part = name.rpartition(".")
        if name in strange:
            continue
        match = BLOCK.fullmatch(path)
        if isinstance(keys, list) and path not in keys and not (match and match["key"] in keys):
            strange.append(f"{name}: not among keys")
        elif match and f.blocks and type(layers) is int and int(match["number"]) < f.blocks - max(layers, 0):
            strange.append(f"{name}: num_layers is {layers} of {f.blocks}")
        elif part != "m" and len(shape) == 2 and type(rank) is int and shape[part == "lora_a"] != rank:
            strange.append(f"{name} is {shape}, but rank is {rank}")
    if strange:
        yield MLX_STRANGE.finding(f"{len(strange)} of {len(f.shapes)} tensors: {some(strange)}")
    stems = {name.rpartition(".")[0] for name in f.shapes if name.endswith((".lora_a", ".lora_b"))}
    single = sorted(stem for stem in stems if (f"{stem}.lora_a" in f.shapes) != (f"{stem}.lora_b" in f.shapes))
    if single:
        yield MLX_HALF.finding(f"{counted(len(single), 'module')}: {some(single)}")


def mlx_scale(f: MlxFolder) -> Iterator[Finding]:
    scale = number(f.parameters.get("scale"))
    if scale is not None and (scale == 0 or not math.isfinite(scale)):
        yield MLX_SCALE.finding(f"lora_parameters.scale is {scale}")


def _blocks(source: Source | None) -> int | None:
    if source is None:
        return None
    config: Any = base_of(source).files.skeleton.config
    return int(config.get_text_config().num_hidden_layers)


def look_model(name: str, folder: Path, base: str | None, display: Display) -> Iterator[Finding]:
    """All findings about a merged model's folder. Raises InputError for a --base that isn't one."""
    other = base_of(find_base(base, display=display)) if base else None
    try:
        shards(folder)
    except InputError as error:
        pickled = any(next(folder.glob(pattern), None) for pattern in PICKLES)
        yield (MODEL_UNSEEN if pickled else MODEL_UNREADABLE).finding(error.what)
        return
    try:
        own = base_of(find_base(str(folder)))
    except InputError as error:
        yield MODEL_UNSEEN.finding(error.what)
        return
    yield from _parameters(own)
    yield from unknown_to_llama_cpp(own.kind)
    subject = Subject(name, folder, {}, {}, base=own, kind=own.kind, display=display)
    for rule in (rules_chat.stop_unknown, rules_chat.stop_untrained):
        yield from rule(subject)
    if subject.chat.bases == NO_TEMPLATE:
        yield MODEL_NO_TEMPLATE.finding("the folder has no chat template")
    if other is not None:
        template = Chat(folder, BaseId(), other).bases
        if template not in ("", NO_TEMPLATE) and template != (template_of(folder) or NO_TEMPLATE):
            yield MODEL_OTHER_TEMPLATE.finding(f"{other.source.name} has another chat template than {folder.name}/")


def _parameters(own: Base) -> Iterator[Finding]:
    """Compares the model's parameters with the files' tensors."""
    try:
        checkpoint = own.files.checkpoint
        parts = {name for names in checkpoint.converted.values() for name in names}
        absent = [p for p in own.parameters if checkpoint.find(p) is None and p not in checkpoint.converted]
        strays = [name for name in checkpoint.stored if name not in checkpoint.places and name not in parts]
        strays = [name for name in strays if not name.endswith(BUFFERS)]
        head = f"{own.head}.weight"
        untied = own.tied and checkpoint.apart(head) and head in checkpoint.stored
        wrong = [
            f"{parameter} is {stored.shape}, but the config says {own.parameters[parameter]}"
            for parameter in own.parameters
            if (stored := checkpoint.find(parameter)) and tuple(stored.shape) != own.parameters[parameter]
        ]
    except DeltawError as error:
        yield MODEL_UNREADABLE.finding(error.what)
        return
    if absent:
        effects = dict(MODEL_LACKS.effects)
        if absent == [head]:  # llama.cpp then takes the embedding for it
            effects |= {LLAMA_CPP: WRONG, OLLAMA: WRONG}
        yield MODEL_LACKS.finding(f"{counted(len(absent), 'parameter')}: {some(absent)}", effects=effects)
    if strays:
        yield MODEL_DROPS.finding(f"{counted(len(strays), 'tensor')}: {some(strays)}")
    if wrong:
        yield MODEL_UNREADABLE.finding(f"{counted(len(wrong), 'tensor')}: {some(wrong)}")
    if untied:
        yield MODEL_HEAD.finding(f"{head} has numbers of its own, not the embedding's")
