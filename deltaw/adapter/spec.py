"""Which modules an `AdapterSpec` names on a given model.

Targets are a group (`all-linear`, `attention`, `mlp`) or names: a module's path or its dotted end, compared literally.
`all-linear` is every linear layer but the output head (LoRA Without Regret: adapting all layers, the MLP above all,
is what matches full fine-tuning; the head is the one linear whose update nobody's loader expects). Which layers form
the attention or the MLP is read off the path, the only place where all architectures say it.

A name that matches nothing is an error that lists what could match, never a warning: a run that trains less than was
asked for is a wasted run.
"""

import difflib
from collections import Counter
from dataclasses import dataclass

from torch import nn

from deltaw.base.frozen import FrozenLinear
from deltaw.config import TARGET_GROUPS, AdapterSpec, names_module
from deltaw.errors import InputError, listed

ATTENTION_PARTS = {"self_attn", "attn", "attention", "self_attention", "cross_attn", "self_attn_layer"}
MLP_PARTS = {
    "mlp",
    "ffn",
    "ffn_block",
    "feed_forward",
    "block_sparse_moe",
    "shared_expert",
    "experts",
    "fc1",
    "fc2",
}
# Weights that a state-space mixer's scan reads itself: the layer is never called, so an update there would do nothing.
SCAN_PARTS, SCANNED = {"mixer", "mamba"}, {"dt_proj", "out_proj"}


@dataclass(frozen=True)
class Targets:
    """What a spec comes to: the paths to adapt, and what holds weights but can't be or isn't adapted."""

    paths: tuple[str, ...]
    unmatched: tuple[str, ...]


def find_targets(model: nn.Module, spec: AdapterSpec) -> Targets:
    """Resolve `spec` on `model`. Raises InputError: no match, an override of nothing, a rank beyond min(in, out)."""
    linear = linear_paths(model)
    if not linear:
        raise InputError("this model has no linear layer that LoRA could adapt")
    names = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
    head = _path_of(model, _head(model))
    if head and any(names_module(name, head) for name in names):
        raise InputError(f"adapter.targets: {head} is the output head, which can't be adapted yet")
    missing = [name for name in names if not any(_matches(name, path) for path in linear)]
    if missing:
        raise InputError(f"adapter.targets: {_unknown(missing, linear)}", fix=f"could match: {_choices(linear)}")
    paths = tuple(path for path in linear if any(_matches(name, path) for name in names))
    overrides = [*spec.rank_overrides, *spec.alpha_overrides]
    idle = [name for name in overrides if not any(names_module(name, path) for path in paths)]
    if idle:
        raise InputError(f"adapter overrides: {_unknown(idle, paths)}", fix=f"could match: {_choices(paths)}")
    if not spec.full:
        _check_ranks(model, spec, paths)
    return Targets(paths, _unmatched(model, set(paths)))


def _check_ranks(model: nn.Module, spec: AdapterSpec, paths: tuple[str, ...]) -> None:
    """Raise InputError unless the trained update's rank, twice the spec's where the start is taken off, fits."""
    times, said = (2, f" for init {spec.init}, whose update has twice the rank") if spec.moves_base else (1, "")
    too_high = []
    for path in paths:
        layer, rank = FrozenLinear(model.get_submodule(path)), times * spec.rank_of(path)
        limit = min(layer.in_features, layer.out_features)
        if rank > limit:
            too_high.append(f"{path} is {layer.out_features} x {layer.in_features}: rank {rank} > {limit}")
    if too_high:
        raise InputError(
            f"adapter.rank is too high{said}:\n{listed(too_high)}", fix="lower rank, or set rank_overrides"
        )


def linear_paths(model: nn.Module) -> tuple[str, ...]:
    """Every module that can be adapted, in the model's order: linear layers but the output head."""
    head = _head(model)
    return tuple(
        path
        for path, module in model.named_modules()
        if module is not head and FrozenLinear.can_wrap(module) and not _is_scanned(path)
    )


def explicit_targets(model: nn.Module, paths: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest list of names that matches exactly `paths`: last parts where that is unambiguous, else paths."""
    ends = sorted({path.rpartition(".")[2] for path in paths})
    named = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in ends]
    return tuple(ends) if set(named) == set(paths) else paths


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None)


def _matches(name: str, path: str) -> bool:
    if name not in TARGET_GROUPS:
        return names_module(name, path)
    parts = set(path.split("."))
    is_attention = bool(parts & ATTENTION_PARTS)
    if name == "attention":
        return is_attention
    return name == "all-linear" or (bool(parts & MLP_PARTS) and not is_attention)


def _is_scanned(path: str) -> bool:
    *parents, last = path.split(".")
    return last in SCANNED and bool(SCAN_PARTS.intersection(parents[-1:]))


def _unmatched(model: nn.Module, adapted: set[str]) -> tuple[str, ...]:
    """Weights of two or more dimensions that stay as they are: embeddings and the head aside, the ones a user of
    `all-linear` would want to know of (an MoE's experts are 3-D parameters, not linear layers)."""
    head = _head(model)
    found = []
    for path, module in model.named_modules():
        if path in adapted or module is head or isinstance(module, nn.Embedding):
            continue
        names = [name for name, value in module.named_parameters(recurse=False) if value.ndim >= 2]
        found += [path] if names == ["weight"] else [f"{path}.{name}" for name in names]
    return tuple(found)


def _unknown(names: list[str], paths: tuple[str, ...]) -> str:
    ends = sorted({path.rpartition(".")[2] for path in paths} | set(TARGET_GROUPS))
    said = []
    for name in names:
        near = difflib.get_close_matches(name, ends, n=1)
        said.append(
            f"{name!r} matches no layer that can be adapted" + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    return "; ".join(said)


def _choices(paths: tuple[str, ...]) -> str:
    counts = Counter(path.rpartition(".")[2] for path in paths)
    return ", ".join([*TARGET_GROUPS, *(f"{name} ({count})" for name, count in counts.items())])
