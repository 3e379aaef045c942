"""adapter_config.json <-> AdapterSpec: PEFT's description of a LoRA.

Reading. A trained adapter adapts the modules that it has tensors for; the config gives each of them its scale. PEFT
ignores names and patterns that match nothing (a list made for many architectures, the rank of a module that isn't
targeted), and so does this. A field that would change the mathematics and that deltaw does not have (a bias, layers
that are used twice ...) is refused by name; a field that this file has never heard of is refused unless it is empty,
since what it means is unknown and dropping it silently would load another adapter than was trained. Fields that name
code or only steer PEFT's own targeting are ignored and never imported.

`rank_pattern` and `alpha_pattern` are regular expressions, matched by PEFT's rule (patterns.py). A spec's overrides are
names: PEFT's keys stay where, as names, they say the same of every module, and are full paths otherwise.

`modules_to_save` is held against the file, which has the tensors. `trainable_token_indices` is a list, for the
embedding, or has one for each module; trained tokens of a base whose head is its embedding are written as the list,
since PEFT then puts them into both, and of any other base as a mapping.

Writing. PEFT (0.21, on transformers 5) takes gate_proj, up_proj, down_proj, gate (w1, w2, w3) in `target_modules` of
certain models with experts for those of the experts, which are parameters there and not layers, even in a full path or
a regular expression. The dense MLPs and the shared experts of the same names then stay as they are, with a warning.
What PEFT doesn't touch is `target_parameters`: for "<path>.weight" of a linear layer it makes factors of the same names
and shapes and the same sum W + s B A, and so these layers are named there (decision 9). DoRA and dropout PEFT doesn't
know for parameters: the dropout of a trained adapter is written as 0, and DoRA leaves such layers out (targets.py).
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from torch import nn
from transformers import conversion_mapping, core_model_loading

from deltaw.adapter import peft_experts
from deltaw.config import AdapterSpec, names_module
from deltaw.config.adapter import expert_of
from deltaw.errors import InputError, listed
from deltaw.files.patterns import first_matches

CONFIG = "adapter_config.json"
# Fields with a meaning deltaw lacks: refused unless they hold this neutral value (or are absent, null, empty, false).
UNSUPPORTED = {
    "lora_bias": "a bias on B",
    "layer_replication": "replicated layers",
    "loftq_config": "a base changed by LoftQ",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron's parallel layers",
}
# Fields that steer how PEFT builds or initialises a new adapter; a trained one's keys and shapes already tell.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
NARROWS = ("exclude_modules", "layers_to_transform", "layers_pattern")
READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern", "fan_in_fan_out", "bias", "init_lora_weights", "target_parameters", "modules_to_save",
    "trainable_token_indices",
}  # fmt: skip
# Initialisers that move the base, so that the saved factors are relative to weights nobody else has (peft#2270).
MOVES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


# What PEFT takes for experts, by the family that transformers counts a model to.
REWRITTEN = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
WEIGHT = ".weight"  # of a layer that PEFT is told of as a parameter


def rewritten_names(model: nn.Module) -> frozenset[str]:
    """The last names of the layers that PEFT must be told about by their weights on this model."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    # A table that PEFT reads, too; the families themselves are in it whatever its version.
    families: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return REWRITTEN.get(families.get(str(kind), str(kind)), frozenset())


def is_rewritten_here(model: nn.Module) -> bool:
    """Whether the transformers that is installed has PEFT rewrite this model's targets. The families
    themselves stand in the table of some versions only."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    families: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return families.get(str(kind)) in REWRITTEN


def missed_by_peft(model: nn.Module, paths: Collection[str]) -> tuple[str, ...]:
    """The layers among `paths` whose factors PEFT won't find: it renames an adapter's keys as transformers renames a
    checkpoint's, and some of those rules (Laguna's) also rename what is called right already."""
    try:
        rules = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
        renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
        renamed = {path: core_model_loading.rename_source_key(f"{path}.", renamings, [])[0] for path in paths}
    except (AttributeError, TypeError):  # a transformers that has them otherwise; PEFT then renames nothing that way
        return ()
    # Where a prefix alone was taken off or put on, PEFT takes that back.
    return tuple(path for path, new in renamed.items() if not (f"{path}.".endswith(new) or new.endswith(f"{path}.")))


def weight_names(config: Mapping[str, Any]) -> frozenset[str]:
    """The last names of the layers that a config names by their weights."""
    entries = config.get("target_parameters") or ()
    return frozenset(entry.removesuffix(WEIGHT).rpartition(".")[2] for entry in entries if entry.endswith(WEIGHT))


def token_rows(config: Mapping[str, Any], paths: Sequence[str]) -> dict[str, list[int]]:
    """Which rows the trained tokens of each module are; `config` has passed `check_config`."""
    given = config.get("trainable_token_indices") or []
    if isinstance(given, list):
        return dict.fromkeys(paths, given)
    return {path: next((rows for name, rows in given.items() if names_module(name, path)), []) for path in paths}


def to_spec(
    config: dict[str, Any],
    paths: Iterable[str],
    source: str,
    *,
    embeddings: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> AdapterSpec:
    """The spec of a trained adapter whose tensors name `paths`, some of them `embeddings`, and `whole` modules;
    `config` has passed `check_config`."""
    paths = tuple(paths)
    listed_whole = config.get("modules_to_save") or ()
    if strays := [f"{path!r:.120}" for path in whole if not any(names_module(name, path) for name in listed_whole)]:
        raise InputError(f"{source}: modules_to_save doesn't name what the weights are for:\n{listed(strays)}")
    if gone := [f"{name!r:.120}" for name in listed_whole if not any(names_module(name, path) for path in whole)]:
        raise InputError(f"{source}: modules_to_save names what the file doesn't hold:\n{listed(gone)}")
    names = config.get("target_modules")
    weights = config.get("target_parameters") or ()
    by_weight = [path for path in paths if any(names_module(entry, path + WEIGHT) for entry in weights)]
    experts = peft_experts.named(paths, weights)
    # A string is a regular expression to PEFT, and these fields cut the list down: then the tensors are the truth.
    if isinstance(names, str) or any(config.get(field) not in (None, []) for field in NARROWS):
        names = paths
    else:
        names = [name for name in names or () if any(names_module(name, path) for path in paths)] + by_weight
        names += list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in experts))
    if strays := [f"{path!r:.120}" for path in paths if not any(names_module(name, path) for name in names)]:
        raise InputError(f"{source}: target_modules doesn't name what the weights are for:\n{listed(strays)}")
    keys = {path: path + WEIGHT if path in by_weight else path for path in paths}
    fields: dict[str, Any] = {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "targets": tuple(names) or tuple(paths),
        "also": dict.fromkeys(embeddings, "lora") | dict.fromkeys(whole, "whole"),
        "scaling": "rslora" if config.get("use_rslora") else "lora",
        "magnitude": config.get("use_dora", False),
        "dropout": 0.0 if config.get("lora_dropout") is None else config["lora_dropout"],
    }
    try:
        fields["rank_overrides"] = _overrides(config.get("rank_pattern") or {}, fields["rank"], keys)
        fields["alpha_overrides"] = _overrides(config.get("alpha_pattern") or {}, fields["alpha"], keys)
        return AdapterSpec.model_validate(fields)
    except ValidationError as error:
        lines = [f"{_field(e['loc'])}: {e['msg']} (got {e.get('input')!r:.60})" for e in error.errors()]
        raise InputError(f"{source}: wrong values:\n{listed(lines)}") from None
    except InputError as error:
        raise InputError(f"{source}: {error.what}") from None


def from_spec(
    spec: AdapterSpec,
    paths: Iterable[str],
    rewritten: Collection[str],
    *,
    base: str,
    revision: str | None,
    fan_in_fan_out: bool,
    whole: Sequence[str] = (),
    tokens: Mapping[str, Sequence[int]] = {},
) -> dict[str, Any]:
    """PEFT's classic fields of an adapter of `paths`, and `target_parameters` and `trainable_token_indices` where they
    have to be; no others: servers differ in what newer ones they know. `whole`: modules that are replaced; `tokens`:
    the rows that are, by module."""
    from deltaw.version import PEFT_VERSION

    paths = tuple(paths)
    experts = peft_experts.parameters(paths)
    paths = tuple(path for path in paths if expert_of(path) is None)
    by_weight = [path for path in paths if _last(path) in rewritten]
    names = [spec.targets] if isinstance(spec.targets, str) else list(spec.targets)
    if experts:  # a name may be of both, `down_proj` say
        names = [name for name in names if any(names_module(name, path) for path in paths)]
    names += [_last(path) for path in paths if not any(names_module(name, path) for name in names)]  # of the ends
    paths = (*paths, *experts)
    keys = {path: path + WEIGHT if path in set(by_weight) else path for path in paths}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": spec.rank,
        "lora_alpha": _plain(spec.alpha),
        "lora_dropout": 0.0 if by_weight or experts else spec.dropout,
        "bias": "none",
        "target_modules": [name for name in names if _last(name) not in rewritten],
        "modules_to_save": [_last(path) for path in whole] or None,
        "rank_pattern": _pattern(spec.rank_overrides, {path: spec.rank_of(path) for path in paths}, spec.rank, keys),
        "alpha_pattern": {
            key: _plain(alpha)
            for key, alpha in _pattern(
                spec.alpha_overrides, {path: spec.alpha_of(path) for path in paths}, spec.alpha, keys
            ).items()
        },
        "use_rslora": spec.scaling == "rslora",
        "use_dora": spec.magnitude,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "peft_version": PEFT_VERSION,
    }
    if parameters := [path + WEIGHT for path in by_weight] + experts:
        config["target_parameters"] = parameters
    if tokens:
        rows = {_last(path): list(index) for path, index in tokens.items()}
        config["trainable_token_indices"] = rows if len(rows) > 1 else next(iter(rows.values()))
    return config


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Raise InputError that names every field with a meaning that can't be kept; another kind of adapter by its kind
    alone, since its fields are its own."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{source}: peft_type is {kind!r:.60}; only LORA is supported, with or without DoRA")
    problems = list(_problems(config))
    if problems:
        raise InputError(f"{source}: this adapter can't be loaded:\n{listed(problems)}")


def _overrides(pattern: Mapping[str, Any], default: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    """What a spec says for what PEFT's `pattern` says of the modules path -> what PEFT calls it."""
    by_key = first_matches(list(pattern), keys.values())
    taken = {path: by_key[key] for path, key in keys.items() if key in by_key}
    names = [name for name in pattern if any(names_module(name, path) for path in keys)]
    if all(next((n for n in names if names_module(n, path)), None) == taken.get(path) for path in keys):
        return {name: pattern[name] for name in names}
    # Full paths, the long ones first, and also those that end as another one that has an override.
    values = {path: pattern[taken[path]] if path in taken else default for path in keys}
    named = [p for p in keys if p in taken or any(p.split(".", n)[-1] in taken for n in range(1, p.count(".") + 1))]
    return {path: values[path] for path in sorted(named, key=len, reverse=True)}


def _pattern(
    overrides: Mapping[str, Any], values: Mapping[str, Any], default: Any, keys: Mapping[str, str]
) -> dict[str, Any]:
    """A pattern from which PEFT reads `values`: the overrides' own names, or anchored paths where those won't do."""
    by_weight = [path for path, key in keys.items() if key != path]
    named: dict[str, Any] = {}
    for name, value in overrides.items():
        named[name] = value
        if any(names_module(name, path) for path in by_weight):
            named[name + WEIGHT] = value
    if all(re.fullmatch(r"[\w.-]+", name) for name in named):
        by_key = first_matches(list(named), keys.values())
        if all(named.get(by_key.get(keys[path], ""), default) == value for path, value in values.items()):
            return named
    paths = [path for path, value in values.items() if value != default]
    return {f"^{re.escape(key)}": values[path] for path in paths for key in dict.fromkeys((path, keys[path]))}


def _problems(config: Mapping[str, Any]) -> Iterable[str]:
    weights = config.get("target_parameters")
    if not isinstance(weights, list | None) or not all(isinstance(entry, str) for entry in weights or ()):
        yield f"target_parameters: a list of names is needed, got {weights!r:.60}"
    elif bare := [e for e in weights or () if not e.endswith(WEIGHT) and not peft_experts.is_parameter(e)]:
        yield f"target_parameters: LoRA on bare parameters isn't supported ({', '.join(bare):.80})"
    names = config.get("target_modules")
    if not isinstance(names, str | list) or not (names or weights) or not all(isinstance(n, str) and n for n in names):
        yield f"target_modules: a list of names is needed, got {names!r:.60}"
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field), dict | None):
            yield f"{field}: a mapping is needed, got {config[field]!r:.60}"
    if not _names(config.get("modules_to_save") or []):
        yield f"modules_to_save: a list of names is needed, got {config['modules_to_save']!r:.60}"
    rows = config.get("trainable_token_indices") or []
    if not all(_row_numbers(some) for some in (rows.values() if isinstance(rows, dict) else [rows])):
        yield f"trainable_token_indices: numbers of rows are needed, got {rows!r:.60}"
    for field in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if not isinstance(config.get(field, False), bool):
            yield f"{field}: true or false is needed, got {config[field]!r:.60}"
    if config.get("bias", "none") not in ("none", None):
        yield f"bias={config['bias']!r:.60}: trained biases aren't supported"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(MOVES_BASE):
        way = "have PEFT save it with path_initial_model_for_weight_conversion"
        yield f"init_lora_weights={init!r:.60} changes the base; {way}"
    for field, meaning in UNSUPPORTED.items():
        if config.get(field):
            yield f"{field}: {meaning} isn't supported"
    for field in sorted(config.keys() - UNSUPPORTED.keys() - IGNORED - READ):
        if config[field]:
            yield f"{field!r:.60} is unknown, so what it does can't be kept"


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _row_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(row) is int and row >= 0 for row in value)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _plain(number: float) -> int | float:
    """32 rather than 32.0: some loaders type lora_alpha as an int."""
    return int(number) if math.isfinite(number) and number == int(number) else number


def _field(location: tuple[Any, ...]) -> str:
    names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
    names |= {"rank_overrides": "rank_pattern", "alpha_overrides": "alpha_pattern"}
    return ".".join(names.get(str(part), str(part)) for part in location if part not in ("tuple", "str"))
