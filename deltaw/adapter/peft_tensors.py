"""adapter_model.safetensors <-> updates: PEFT's names of the tensors.

    base_model.model.<module path>.lora_A.weight    A [R, N]
                                  .lora_B.weight    B [M, R]
                                  .lora_magnitude_vector    m [M], for DoRA

Experts share an A and a B, named by the module that has them (peft_experts.py).

An update knows what it stores (`Update.tensors`); here its tensors get their names in the file, and the names in a file
are turned back. What a name or a shape says that isn't such an update is refused, all of it at once.

Letters: R rank, N inputs, M outputs.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter import peft_experts
from deltaw.adapter.peft_config import CONFIG
from deltaw.config import AdapterSpec
from deltaw.config.adapter import expert_of, parameter_of
from deltaw.errors import InputError, command, listed
from deltaw.kinds import KINDS
from deltaw.updates import Update

PREFIX, A, B, MAGNITUDE = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
WEIGHTS = "adapter_model.safetensors"
SUFFIXES = {"a": A, "b": B, "magnitude": MAGNITUDE}
# What PEFT may write that isn't a plain LoRA on a linear layer, and what to call it.
FOREIGN = {
    ".lora_embedding_A": "LoRA on an embedding",
    ".lora_embedding_B": "LoRA on an embedding",
    ".base_layer.weight": "a copy of a base layer (PEFT writes none with save_embedding_layers=False)",
    ".trainable_tokens_delta": "trained token embeddings",
    ".lora_B.bias": "a bias on B",
}


def to_tensors(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """What the file holds: float32, on the CPU. A whole ΔW, which PEFT has no name for, goes by its module's path."""
    parts = {path: update.tensors() for path, update in updates.items() if expert_of(path) is None}
    experts = peft_experts.parameters(updates)
    for path, wrapper in peft_experts.wrappers(experts).items():
        count = sum(parameter_of(one) == path for one in updates)
        parts[wrapper] = peft_experts.joined([updates[one].tensors() for one in peft_experts.of_one(path, count)])
    tensors = {
        PREFIX + path + SUFFIXES[part] if part in SUFFIXES else path: tensor
        for path, some in parts.items()
        for part, tensor in some.items()
    }
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


def module_paths(tensors: Mapping[str, Tensor], file: Path) -> list[str]:
    """The modules that have an A and a B. Raises InputError for every name that isn't one of an update's."""
    halves: dict[str, set[str]] = {}
    problems = []
    names = [name for name in tensors if not name.endswith(MAGNITUDE)]
    for name in names:
        suffix, problem = _suffix(name, tensors[name])
        if problem:
            problems.append(f"{name!r:.120}{problem}")
        else:
            halves.setdefault(_path(name, suffix), set()).add(suffix)
    problems += [
        f"{path!r:.120} has {suffix.split('.')[1]} but not its other half"
        for path, suffixes in halves.items()
        if len(suffixes) == 1
        for suffix in suffixes
    ]
    if not names:
        raise InputError(f"{file}: holds no tensors")
    if problems:
        raise InputError(
            f"{file}: {len(problems)} of {len(names)} tensors don't fit:\n{listed(problems, 2)}",
            fix=f"what each program makes of it, and how to fix it: {command('lint', file.parent)}",
        )
    return list(halves)


def to_updates(
    tensors: Mapping[str, Tensor], spec: AdapterSpec, file: Path, experts: Collection[str] = ()
) -> dict[str, Update]:
    """The updates by module path, float32; `experts`: the paths that are of all experts, each of which gets its own.
    Raises InputError unless shapes are what the spec says, with a magnitude for each row where it says DoRA, and all
    numbers are finite."""
    paths = module_paths(tensors, file)
    _check_shapes(tensors, paths, spec, file, experts)
    _check_magnitudes(tensors, paths, spec, file)
    # float32 first: not every narrow type can be asked whether it is finite, and a wide one may not fit.
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    if bad := not_finite(wide):
        raise InputError(f"{file} holds NaN or infinity:\n{listed(bad)}")
    updates: dict[str, Update] = {}
    for path in paths:
        names = {part: PREFIX + path + suffix for part, suffix in SUFFIXES.items()}
        tensors_of = {part: wide[name] for part, name in names.items() if name in wide}
        each = {path: tensors_of}
        if path in experts:
            parts = peft_experts.split(tensors_of["a"], tensors_of["b"], spec.rank_of(path))
            each = dict(zip(peft_experts.of_one(path, len(parts)), parts, strict=True))
        updates |= {one: KINDS[spec.kind].of(some, spec.scale(path)) for one, some in each.items()}
    return updates


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def _suffix(name: str, tensor: Tensor) -> tuple[str, str]:
    """(which half of a pair a tensor is, what is wrong with it)."""
    suffix = next((s for s in (A, B) if name.endswith(s)), "")
    foreign = next((kind for s, kind in FOREIGN.items() if name.endswith(s)), "")
    if foreign:
        return suffix, f": {foreign} isn't supported"
    if not suffix:
        return suffix, " is neither lora_A nor lora_B; fully trained modules aren't supported"
    if not name.startswith(PREFIX):
        return suffix, f" doesn't begin with {PREFIX!r}"
    if tensor.ndim != 2 or not tensor.is_floating_point():
        return suffix, f" is {tensor.dtype} of shape {tuple(tensor.shape)}, not a floating matrix"
    return suffix, ""


def _path(name: str, suffix: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(suffix)


def _check_shapes(
    tensors: Mapping[str, Tensor], paths: Iterable[str], spec: AdapterSpec, file: Path, experts: Collection[str]
) -> None:
    problems = []
    for path in paths:
        rank, a_RN, b_MR = spec.rank_of(path), tensors[PREFIX + path + A], tensors[PREFIX + path + B]
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
