"""adapter_model.safetensors <-> updates: PEFT's names of the tensors.

    base_model.model.<module path>.lora_A.weight    A [R, N]
                                  .lora_B.weight    B [M, R]
                                  .lora_magnitude_vector    m [M], for DoRA
                                  .lora_embedding_A, _B     of an embedding [V, D]: Bᵀ [R, V] and Aᵀ [D, R]
                                  .token_adapter.trainable_tokens_delta    rows [K, D], of trained tokens
                                  .weight                   W' [V, D], of a module that was trained whole

Experts share an A and a B, named by the module that has them (peft_experts.py).

An update knows what it stores (`Update.tensors`); here its tensors get their names in the file, and the names in a file
are turned back. What a name or a shape says that isn't such an update is refused, all of it at once. The delta of
trained tokens is no difference, whatever its name: these are the rows themselves, and the config says whose. Beside
LoRA on an embedding PEFT writes a copy of the embedding, `.base_layer.weight`; it isn't read, and its size says when
the base was resized.

Letters: R rank, N inputs, M outputs, V words, D hidden size, K rows.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter import peft_experts
from deltaw.adapter.peft_config import CONFIG
from deltaw.config import AdapterSpec
from deltaw.config.adapter import expert_of, parameter_of
from deltaw.errors import InputError, command, listed
from deltaw.factors import LowRank
from deltaw.kinds import KINDS
from deltaw.replaced import Rows, Whole
from deltaw.updates import Update

PREFIX, A, B, MAGNITUDE = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
TOKENS, WHOLE, COPY = ".token_adapter.trainable_tokens_delta", ".weight", ".base_layer.weight"
WEIGHTS = "adapter_model.safetensors"
# By the kind of update: what each of its tensors is called. `turned`: the file has it the other way round.
SUFFIXES = {"a": A, "b": B, "magnitude": MAGNITUDE}
OF_EMBEDDING = {"b": EMBEDDING_A, "a": EMBEDDING_B}
REPLACES = {"tokens": {"rows": TOKENS}, "whole": {"weight": WHOLE}}
# What PEFT may write that isn't read here, and what to call it.
FOREIGN = {".lora_B.bias": "a bias on B"}


def to_tensors(updates: Mapping[str, Update], embeddings: Collection[str] = ()) -> dict[str, Tensor]:
    """What the file holds: float32, on the CPU. `embeddings`: the modules that are one. A whole ΔW, which PEFT has no
    name for, goes by its module's path."""
    tensors: dict[str, Tensor] = {}
    for path, update in updates.items():
        names = REPLACES.get(update.kind) or (OF_EMBEDDING if path in embeddings else SUFFIXES)
        for part, tensor in update.tensors().items() if expert_of(path) is None else ():
            if part in names:
                tensors[PREFIX + path + names[part]] = tensor.T if names is OF_EMBEDDING else tensor
            elif part != "index":
                tensors[path] = tensor
    experts = peft_experts.parameters(updates)
    for path, wrapper in peft_experts.wrappers(experts).items():
        count = sum(parameter_of(one) == path for one in updates)
        joined = peft_experts.joined([updates[one].tensors() for one in peft_experts.of_one(path, count)])
        tensors |= {PREFIX + wrapper + SUFFIXES[part]: tensor for part, tensor in joined.items()}
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}


def by_weight(tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors, those of experts by the paths of their parameters. Raises InputError where `target_parameters` names
    others than there are."""
    entries = [entry for entry in config.get("target_parameters") or () if peft_experts.is_parameter(entry)]
    if not entries:
        return dict(tensors)
    halves = {name: suffix for name in tensors for suffix in (A, B) if name.endswith(suffix)}
    paths = {name: _path(name, suffix) for name, suffix in halves.items()}
    wrapped = [path for path in dict.fromkeys(paths.values()) if peft_experts.is_wrapper(path, entries)]
    names = peft_experts.by_parameter(wrapped, entries, source)
    new = {name: PREFIX + names[path] + halves[name] for name, path in paths.items() if path in names}
    return {new.get(name, name): tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Modules:
    """The modules that a file has tensors of, by what these are."""

    linear: tuple[str, ...]  # A and B
    embeddings: tuple[str, ...]  # the same of an embedding
    tokens: tuple[str, ...]
    whole: tuple[str, ...]

    @property
    def low_rank(self) -> tuple[str, ...]:
        return self.linear + self.embeddings


def module_paths(tensors: Mapping[str, Tensor], file: Path) -> Modules:
    """What a file has. Raises InputError for every name that isn't one of an update's."""
    halves: dict[str, set[str]] = {}
    ends: dict[str, list[str]] = {TOKENS: [], WHOLE: []}
    problems = []
    names = [name for name in tensors if not name.endswith((MAGNITUDE, COPY))]
    for name in names:
        suffix, problem = _suffix(name, tensors[name])
        if problem:
            problems.append(f"{name!r:.120}{problem}")
        elif suffix in ends:
            ends[suffix].append(_path(name, suffix))
        else:
            halves.setdefault(_path(name, suffix), set()).add(suffix)
    pairs = ({A, B}, {EMBEDDING_A, EMBEDDING_B})
    problems += [
        f"{path!r:.120} has {suffix.split('.')[1]} but not its other half"
        for path, suffixes in halves.items()
        if suffixes not in pairs
        for suffix in suffixes
    ]
    if not names:
        raise InputError(f"{file}: holds no tensors")
    if problems:
        raise InputError(
            f"{file}: {len(problems)} of {len(names)} tensors don't fit:\n{listed(problems, 2)}",
            fix=f"what each program makes of it, and how to fix it: {command('lint', file.parent)}",
        )
    linear, embeddings = (tuple(path for path, some in halves.items() if some == pair) for pair in pairs)
    return Modules(linear, embeddings, tuple(ends[TOKENS]), tuple(ends[WHOLE]))


def to_updates(
    tensors: Mapping[str, Tensor],
    spec: AdapterSpec,
    file: Path,
    experts: Collection[str] = (),
    indices: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Update]:
    """The updates by module path, float32. `experts`: the paths that are of all experts, each of which gets its own;
    `indices`: which rows trained tokens are. Raises InputError unless shapes are what the spec says, with a magnitude
    for each row where it says DoRA, and all numbers are finite."""
    modules = module_paths(tensors, file)
    _check_shapes(tensors, modules, spec, file, experts)
    _check_magnitudes(tensors, modules.linear, spec, file)
    # float32 first: not every narrow type can be asked whether it is finite, and a wide one may not fit.
    wide = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith(COPY)}
    if bad := not_finite(wide):
        raise InputError(f"{file} holds NaN or infinity:\n{listed(bad)}")
    updates: dict[str, Update] = {}
    for path in modules.linear:
        names = {part: PREFIX + path + suffix for part, suffix in SUFFIXES.items()}
        tensors_of = {part: wide[name] for part, name in names.items() if name in wide}
        each = {path: tensors_of}
        if path in experts:
            parts = peft_experts.split(tensors_of["a"], tensors_of["b"], spec.rank_of(path))
            each = dict(zip(peft_experts.of_one(path, len(parts)), parts, strict=True))
        updates |= {one: KINDS[spec.kind].of(some, spec.scale(path)) for one, some in each.items()}
    for path in modules.embeddings:
        turned = {part: wide[PREFIX + path + suffix].T.contiguous() for part, suffix in OF_EMBEDDING.items()}
        updates[path] = LowRank.of(turned, spec.scale(path))
    for path in modules.whole:
        updates[path] = Whole(wide[PREFIX + path + WHOLE])
    for path in modules.tokens:
        updates[path] = _rows(path, wide[PREFIX + path + TOKENS], indices or {}, file)
    return updates


def _rows(path: str, rows_KD: Tensor, indices: Mapping[str, Sequence[int]], file: Path) -> Rows:
    index = indices.get(path, ())
    try:
        return Rows(torch.tensor(index, dtype=torch.long), rows_KD)
    except ValueError as error:
        raise InputError(
            f"{file}: {path}: {error}; {CONFIG} names {len(index)} in trainable_token_indices",
            fix="get the complete folder",
        ) from None


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def _suffix(name: str, tensor: Tensor) -> tuple[str, str]:
    """(which half of a pair a tensor is, what is wrong with it)."""
    named = (A, B, EMBEDDING_A, EMBEDDING_B, TOKENS, WHOLE)
    suffix = next((s for s in named if name.endswith(s)), "")
    foreign = next((kind for s, kind in FOREIGN.items() if name.endswith(s)), "")
    if foreign:
        return suffix, f": {foreign} isn't supported"
    if not suffix or (suffix == WHOLE and not name.startswith(PREFIX)):
        return suffix, " is neither lora_A nor lora_B, nor anything else that an adapter has"
    if not name.startswith(PREFIX):
        return suffix, f" doesn't begin with {PREFIX!r}"
    if tensor.ndim != 2 or not tensor.is_floating_point():
        return suffix, f" is {tensor.dtype} of shape {tuple(tensor.shape)}, not a floating matrix"
    return suffix, ""


def _path(name: str, suffix: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(suffix)


def _check_shapes(
    tensors: Mapping[str, Tensor], modules: Modules, spec: AdapterSpec, file: Path, experts: Collection[str]
) -> None:
    problems = []
    for path in modules.low_rank:
        first, second = (EMBEDDING_A, EMBEDDING_B) if path in modules.embeddings else (A, B)
        rank, a_RN, b_MR = spec.rank_of(path), tensors[PREFIX + path + first], tensors[PREFIX + path + second]
        count = max(1, a_RN.shape[0] // rank) if path in experts else 1
        if (a_RN.shape[0], b_MR.shape[1]) != (count * rank, count * rank):
            shapes = f"A is {tuple(a_RN.shape)}, B is {tuple(b_MR.shape)}"
            problems.append(f"{path:.120}: {shapes}, but the config says rank {rank}")
    if problems:
        raise InputError(f"{file}: shapes and config disagree:\n{listed(problems)}")


def _check_magnitudes(tensors: Mapping[str, Tensor], paths: Iterable[str], spec: AdapterSpec, file: Path) -> None:
    """DoRA's vectors: one for every module where the config says so, else none."""
    magnitudes = {name: tensor for name, tensor in tensors.items() if name.endswith(MAGNITUDE)}
    if magnitudes and not spec.magnitude:
        raise InputError(f"{file} holds DoRA's magnitudes, but {CONFIG} doesn't say use_dora")
    wanted = {PREFIX + path + MAGNITUDE: len(tensors[PREFIX + path + B]) for path in paths if spec.magnitude}
    problems = [f"{name!r:.120} is missing" for name in wanted.keys() - magnitudes]
    for name, tensor in magnitudes.items():
        if tuple(tensor.shape) != (wanted.get(name),) or not tensor.is_floating_point():
            shape = tuple(tensor.shape)
            problems.append(f"{name!r:.120} is {tensor.dtype} of shape {shape}, of {wanted.get(name, 0)} rows")
    if problems:
        raise InputError(
            f"{file.with_name(CONFIG)} says use_dora, but {file.name} doesn't hold a magnitude for each row:\n"
            f"{listed(sorted(problems))}"
        )
