"""Which modules an `AdapterSpec` names on a given model.

Targets are a group (`all-linear`, `attention`, `mlp`), or names and patterns (patterns.py).
`all-linear` is every linear layer but the output head (LoRA Without Regret: adapting all layers, the MLP above all,
is what matches full fine-tuning; the head is the one linear whose update nobody's loader expects). Which layers form
the attention or the MLP is read off the path, the only place where all architectures say it.

A name that matches nothing is an error that lists what could match, never a warning: a run that trains less than was
asked for is a wasted run. A group asks for what can be done. It leaves out, with the reason, a layer narrower than the
rank, one that has no form in the file (DoRA beside experts, peft_config.py), one whose weight the model reads itself,
and one that gets no gradient (trial.py). The same layer asked for by its name, or by an override of its rank, is an
error with the same reason.

A model with a tower for pictures or sound is trained on text, so the language model is what is meant, by groups and by
names: `q_proj` is the language model's. Only a name that matches nothing in it is looked for in the rest, so that a
path can name a layer there; one that doesn't run on text, which would never learn, is refused when the adapter is
attached (trial.py). The language model is the part that is built from the text config.

The experts of a mixture are named, too (expert_targets.py): by `experts`, and by names that no layer has.

A trained adapter adapts what it holds factors for, whatever its spec's names would match (`targets_of`).
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltaw.adapter.expert_targets import GROUP, Experts, ends, experts_of
from deltaw.adapter.patterns import NOT, is_literal, problem
from deltaw.adapter.peft_config import rewritten_names
from deltaw.base.frozen import FrozenLinear
from deltaw.base.language import language_part
from deltaw.base.packed import PackedEmbedding, PackedLinear
from deltaw.config import TARGET_GROUPS, AdapterSpec, names_module
from deltaw.config.adapter import expert_of, parameter_of
from deltaw.errors import InputError, listed
from deltaw.show.text import counted
from deltaw.updates import Update

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
OUTSIDE = "lies outside the language model: name it by its path"


@dataclass(frozen=True)
class Targets:
    """What a spec amounts to: the paths to adapt, what holds weights but can't be or isn't adapted, and why a group
    left a layer out."""

    paths: tuple[str, ...]
    unmatched: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    spec: AdapterSpec = field(default_factory=AdapterSpec)  # its overrides named to the letter
    words: str = ""  # what is adapted, where that was chosen by more than a group


def find_targets(model: nn.Module, spec: AdapterSpec, unfit: Mapping[str, str] | None = None) -> Targets:
    """Resolve `spec` on `model`; `unfit`: why layers can't be adapted, as far as the caller knows.

    Raises InputError: no match, an override of nothing, a layer asked for by name that can't be adapted.
    """
    linear = linear_paths(model)
    experts = experts_of(model)
    if not linear and not experts.shapes:
        raise InputError(f"this model has no linear layer that LoRA could adapt{_other_kinds(model)}")
    every = (*linear, *experts.shapes)
    asked = _asked(model, spec, every, experts)
    language = language_paths(model, every)
    named = {path for name in _names(spec) for path in _called(name, every, language, experts)}.intersection(asked)
    named |= {path for name in spec.rank_overrides for path in _called(name, asked, language, experts)}
    spec = experts.ranked(_by_path(spec, asked, experts), asked)
    if refused := experts.refused(spec, asked):
        lines = listed([f"{path} {reason}" for path, reason in refused.items()], 2)
        raise InputError(f"adapter.targets: these can't be adapted:\n{lines}", fix="leave experts out of the targets")
    reasons = dict.fromkeys(set(asked).difference(language, named), OUTSIDE)
    reasons |= _narrow(model, spec, [path for path in asked if path not in named])
    reasons |= _unwritable(model, spec, asked) | dict(unfit or {})
    paths = tuple(path for path in asked if path not in reasons)
    left_out = {path: reasons[path] for path in asked if path in reasons and path not in named}
    wrong = [f"{path} {reasons[path]}" for path in asked if path in reasons and (path in named or not paths)]
    if wrong:
        fix = "leave them out" if paths else "choose others, or lower the rank"
        raise InputError(f"adapter.targets: these can't be adapted:\n{listed(wrong)}", fix=fix)
    wide = _narrow(model, spec, paths, 2 if spec.moves_base else 1)
    if wide:
        more = f" for init {spec.init}, whose update has twice the rank" if spec.moves_base else ""
        lines = listed([f"{path} {reason}" for path, reason in wide.items()])
        raise InputError(f"adapter.rank is too high{more}:\n{lines}", fix="lower rank, or set rank_overrides")
    layers = [path for path in paths if path not in experts.shapes]
    some = "" if set(_names(spec)) <= set(TARGET_GROUPS) else in_words(layers, len(linear))
    words = "; ".join(filter(None, (some, experts.in_words(spec, paths, stacks(experts.among(paths))))))
    return Targets(paths, _unmatched(model, set(paths)), left_out, spec, words)


def _asked(model: nn.Module, spec: AdapterSpec, linear: tuple[str, ...], experts: Experts) -> tuple[str, ...]:
    """The layers that the spec asks for. Raises InputError for names and overrides that mean nothing."""
    names = _names(spec)
    wanted, unwanted = ([name for name in names if name.startswith(NOT) == left_out] for left_out in (False, True))
    unwanted = [name.removeprefix(NOT).strip() for name in unwanted]
    overrides = [*spec.rank_overrides, *spec.alpha_overrides]
    for name in [*wanted, *unwanted, *overrides]:
        if reason := problem(name) if name not in TARGET_GROUPS else None:
            raise InputError(
                f"adapter.targets: {name!r:.80} matches no layer: {reason}", fix=f"could match: {_choices(linear)}"
            )
    head = head_path(model)
    if head and any(names_module(name, head) for name in wanted):
        end = head.rpartition(".")[2]
        raise InputError(f"adapter.targets: {head} is the output head", fix=f"name it in adapter.also: {{{end}: lora}}")
    if not wanted:
        raise InputError("adapter.targets says only what isn't adapted", fix="begin with all-linear: [all-linear, …]")
    taken = {name: _meant(name, linear, experts) for name in wanted}
    taken |= {name: _meant(name, linear, experts, too=True) for name in unwanted}
    # The head never is adapted: who asks for that gets it.
    missing = [
        name for name in taken if not taken[name] and not (head and name in unwanted and names_module(name, head))
    ]
    if missing:
        raise InputError(f"adapter.targets: {_unknown(missing, linear)}", fix=f"could match: {_choices(linear)}")
    chosen = {path for name in wanted for path in taken[name]}.difference(*(taken[name] for name in unwanted))
    asked = tuple(path for path in linear if path in chosen)
    if not asked:
        raise InputError(f"adapter.targets: nothing is left without {', '.join(unwanted)}")
    idle = [name for name in overrides if not _meant(name, asked, experts)]
    if idle:
        raise InputError(f"adapter overrides: {_unknown(idle, asked)}", fix=f"could match: {_choices(asked)}")
    return asked


def _names(spec: AdapterSpec) -> tuple[str, ...]:
    return (spec.targets,) if isinstance(spec.targets, str) else spec.targets


def _meant(name: str, paths: tuple[str, ...], experts: Experts, *, too: bool = False) -> list[str]:
    """The layers and experts that a group, a name or a pattern means; `too`: experts also where it means layers."""
    if name == GROUP:
        return experts.among(paths)
    if name in TARGET_GROUPS:
        return [path for path in paths if path not in experts.shapes and _matches(name, path)]
    return experts.meant(name, paths, too=too)


def _by_path(spec: AdapterSpec, paths: tuple[str, ...], experts: Experts) -> AdapterSpec:
    """The spec whose overrides are names, to the letter: each layer's own path where there are patterns among them."""
    changes: dict[str, dict[str, Any]] = {}
    for given, default in (("rank_overrides", spec.rank), ("alpha_overrides", spec.alpha)):
        overrides = getattr(spec, given)
        if all(name not in TARGET_GROUPS and any(names_module(name, path) for path in paths) for name in overrides):
            continue
        layers = {name: set(_meant(name, paths, experts)) for name in overrides}
        values = {
            path: next((overrides[name] for name in overrides if path in layers[name]), default) for path in paths
        }
        # The long ones first: one may end as another does.
        changes[given] = {path: values[path] for path in sorted(paths, key=len, reverse=True)}
    return spec.model_copy(update=changes)


def targets_of(
    model: nn.Module, spec: AdapterSpec, updates: Mapping[str, Update], unfit: Mapping[str, str] | None = None
) -> Targets:
    """What trained updates adapt on `model`, by their paths. Raises InputError unless each has its layer, of its shape,
    and each layer of the language model that the spec names has its update."""
    linear, experts = linear_paths(model), experts_of(model)
    names = _names(spec)
    every = (*linear, *experts.shapes)
    if updates and not any(_matches(name, path) for name in names for path in every):
        raise InputError(f"the adapter belongs to another model: {_unknown(list(names), every)}")
    single = {path: update for path, update in updates.items() if expert_of(path) is not None}
    strays = [path for path in updates if path not in linear and path not in single]
    problems = [f"{path:.120}: no such linear layer in this model" for path in strays] + experts.misfits(single)
    problems += [f"{path} {why}" for path, why in (unfit or {}).items() if path in updates]
    problems += [
        f"{path}: targeted, but the adapter has no factors for it"
        for path in language_paths(model, linear)
        if path not in updates and any(names_module(name, path) for name in names)
    ]
    for path in set(linear) & set(updates):
        layer, shape = FrozenLinear(model.get_submodule(path)), updates[path].shape
        if shape != (layer.out_features, layer.in_features):
            problems.append(f"{path}: update is {shape}, the layer {(layer.out_features, layer.in_features)}")
    if problems:
        raise InputError(f"the adapter doesn't fit this model; {len(problems)} mismatches:\n{listed(problems)}")
    adapted = {parameter_of(path) for path in updates}
    paths = tuple(path for path in every if path in adapted)
    return Targets(paths, _unmatched(model, set(paths)), spec=spec)


def language_paths(model: nn.Module, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `paths` that lie in the language model (base/language.py); all, where that is none."""
    return tuple(filter(language_part(model), paths)) or paths


def _called(name: str, paths: tuple[str, ...], language: tuple[str, ...], experts: Experts) -> list[str]:
    """The layers that are asked for by name: the language model's, and the rest's only where that has none. A pattern
    asks for what can be done, as a group does, unless all that it means lies outside."""
    if name in TARGET_GROUPS or name.startswith(NOT):
        return []
    layers = _meant(name, paths, experts)
    inside = [path for path in layers if path in language]
    return (inside if is_literal(name) else []) if inside else layers


def _narrow(model: nn.Module, spec: AdapterSpec, paths: Sequence[str], times: int = 1) -> dict[str, str]:
    """The layers that are narrower than `times` their rank."""
    if spec.full:
        return {}
    experts = experts_of(model).shapes
    shapes = {p: experts[p][1:] if p in experts else FrozenLinear(model.get_submodule(p)).weight.shape for p in paths}
    sizes = {path: (m, n, times * spec.rank_of(path)) for path, (m, n) in shapes.items()}
    return {path: f"is {m} x {n}: rank {r} > {min(m, n)}" for path, (m, n, r) in sizes.items() if r > min(m, n)}


def _unwritable(model: nn.Module, spec: AdapterSpec, paths: Sequence[str]) -> dict[str, str]:
    """The layers that have no form in the file."""
    by_weight = rewritten_names(model) if spec.magnitude else frozenset()
    reason = "is taken for the experts' by PEFT, which then can't read DoRA on it"
    return dict.fromkeys([path for path in paths if path.rpartition(".")[2] in by_weight], reason)


def linear_paths(model: nn.Module) -> tuple[str, ...]:
    """Every module that can be adapted, in the model's order: linear layers but the output head."""
    head = _head(model)
    return tuple(
        path
        for path, module in model.named_modules()
        if module is not head and FrozenLinear.can_wrap(module) and not _is_scanned(path)
    )


def lines_of(left_out: Mapping[str, str]) -> list[str]:
    """What a group left out, for logs: a line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in left_out.items():
        by_reason.setdefault(reason, []).append(path)
    more = {reason: f" (and {len(paths) - 1} more)" for reason, paths in by_reason.items() if len(paths) > 1}
    return [f"{paths[0]} {reason}{more.get(reason, '')}" for reason, paths in by_reason.items()]


def explicit_targets(model: nn.Module, paths: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest list of names that matches exactly `paths`: last parts where that is unambiguous, else paths."""
    experts = experts_of(model)
    own, layers = experts.among(paths), [path for path in paths if path not in experts.shapes]
    last = sorted({path.rpartition(".")[2] for path in layers})
    named = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in last]
    stems = sorted({ends(path) for path in own})
    all_stems = {path for path in experts.shapes if any(names_module(stem, path) for stem in stems)}
    return (*(last if set(named) == set(layers) else layers), *(stems if all_stems == set(own) else own))


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]


def head_path(model: nn.Module) -> str | None:
    """The output head's."""
    head = _head(model)
    return next((path for path, module in model.named_modules() if module is head), None)


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


def _other_kinds(model: nn.Module) -> str:
    head = _head(model)
    kinds = {
        type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    }
    return f": {', '.join(sorted(kinds))} computes something other than x Wᵀ + b" if kinds else ""


def _unmatched(model: nn.Module, adapted: set[str]) -> tuple[str, ...]:
    """Weights of two or more dimensions of the language model that stay as they are: embeddings and the head aside, the
    ones a user of `all-linear` would want to know of (an MoE's experts are 3-D parameters, not linear layers)."""
    head = _head(model)
    holders = tuple(path for path, module in model.named_modules() if any(module.named_parameters(recurse=False)))
    language, unmatched = set(language_paths(model, holders)), list[str]()
    for path, module in model.named_modules():
        embedding = isinstance(module, nn.Embedding | PackedEmbedding)
        if path in adapted or path not in language or module is head or embedding:
            continue
        names = [name for name, value in module.named_parameters(recurse=False) if value.ndim >= 2]
        whole = names == ["weight"] or isinstance(module, PackedLinear)
        unmatched += [path] if whole else [each for name in names if (each := f"{path}.{name}") not in adapted]
    return tuple(unmatched)


def _unknown(names: list[str], paths: tuple[str, ...]) -> str:
    ends = sorted({path.rpartition(".")[2] for path in paths} | set(TARGET_GROUPS))
    parts = {part for path in paths for part in path.split(".")}
    problems = []
    for name in names:
        near = difflib.get_close_matches(name, ends, n=1)
        if not near and "." in name:  # a part of it may be misspelt
            strange = next((part for part in name.split(".") if is_literal(part) and part not in parts), None)
            near = difflib.get_close_matches(strange, parts, n=1) if strange else []
        problems.append(
            f"{name!r} matches no layer that can be adapted" + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    return "; ".join(problems)


def _choices(paths: tuple[str, ...]) -> str:
    counts = Counter(path.rpartition(".")[2] for path in paths)
    groups = [group for group in TARGET_GROUPS if group != GROUP or any(f".{GROUP}." in path for path in paths)]
    return ", ".join([*groups, *(f"{name} ({count})" for name, count in counts.items()), *stacks(paths)])


def stacks(paths: Iterable[str]) -> list[str]:
    """The numbered modules that paths lie in first, as patterns: `layers.0-29`, `layers.0-3, 8`."""
    numbers: dict[str, set[int]] = {}
    for path in paths:
        parts = path.split(".")
        at = next((at for at, part in enumerate(parts) if at and part.isdecimal()), None)
        if at:
            numbers.setdefault(parts[at - 1], set()).add(int(parts[at]))
    return [f"{name}.{', '.join(_runs(sorted(some)))}" for name, some in numbers.items()]


def _runs(numbers: Sequence[int]) -> list[str]:
    """1, 2, 3, 7 -> 1-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]


def in_words(paths: Sequence[str], of: int) -> str:
    """What is adapted, for logs: "48 of 210 linear layers: gate_proj, up_proj, down_proj in layers.14-29"."""
    ends = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    where = f" in {', '.join(stacks(paths))}" if stacks(paths) else ""
    return f"{len(paths):,} of {counted(of, 'linear layer')}: {', '.join(ends)}{where}"
