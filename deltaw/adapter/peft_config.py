"""adapter_config.json <-> AdapterSpec: PEFT's description of a LoRA.

Reading is strict where PEFT is lenient. A field that would change the mathematics and that deltaw does not have (a
bias, trained tokens, saved modules ...) is refused by name; a field that this file has never heard of is refused
unless it is empty, since what it means is unknown and dropping it silently would load another adapter than was
trained. Fields that name code or only steer PEFT's own targeting are ignored and never imported.

`rank_pattern` and `alpha_pattern` are regular expressions to PEFT, run on load. Here they are compared literally, after
undoing the two notations that PEFT users write (`^` for "the whole path" and `\\.` for a dot): a pattern that needs a
regex engine is refused, because a stranger's pattern can take exponential time.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from deltaw.config import AdapterSpec, names_module
from deltaw.errors import InputError, listed

# Fields with a meaning deltaw lacks: refused unless they hold this neutral value (or are absent, null, empty, false).
UNSUPPORTED = {
    "lora_bias": "a bias on B",
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters",
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
    "alpha_pattern", "fan_in_fan_out", "bias", "init_lora_weights",
}  # fmt: skip
# Initialisers that move the base, so that the saved factors are relative to weights nobody else has (peft#2270).
MOVES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def to_spec(config: dict[str, Any], paths: Iterable[str], source: str) -> AdapterSpec:
    """The spec of a trained adapter whose tensors name `paths`. Raises InputError that lists every problem."""
    problems = list(_problems(config))
    if problems:
        raise InputError(f"{source}: this adapter can't be loaded:\n{listed(problems)}")
    paths = tuple(paths)
    names, pattern = config.get("target_modules"), config.get("rank_pattern") or {}
    # A string is a regular expression to PEFT, and these fields cut the list down: then the tensors are the truth.
    if isinstance(names, str) or any(config.get(field) not in (None, []) for field in NARROWS):
        names = paths
    elif strays := [f"{path!r:.120}" for path in paths if not any(names_module(name, path) for name in names or ())]:
        raise InputError(f"{source}: target_modules doesn't name what the weights are for:\n{listed(strays)}")
    fields: dict[str, Any] = {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "targets": tuple(names or ()),
        "scaling": "rslora" if config.get("use_rslora") else "lora",
        "magnitude": config.get("use_dora", False),
        "dropout": 0.0 if config.get("lora_dropout") is None else config["lora_dropout"],
    }
    try:
        fields["rank_overrides"] = {_literal(key): value for key, value in pattern.items()}
        fields["alpha_overrides"] = {_literal(k): v for k, v in (config.get("alpha_pattern") or {}).items()}
        return AdapterSpec.model_validate(fields)
    except ValidationError as error:
        lines = [f"{_field(e['loc'])}: {e['msg']} (got {e.get('input')!r:.60})" for e in error.errors()]
        raise InputError(f"{source}: wrong values:\n{listed(lines)}") from None
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None


def from_spec(spec: AdapterSpec, base_name: str, revision: str | None, fan_in_fan_out: bool) -> dict[str, Any]:
    """PEFT's classic fields, and no others: servers differ in what newer ones they know."""
    from deltaw.version import PEFT_VERSION

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": spec.rank,
        "lora_alpha": _plain(spec.alpha),
        "lora_dropout": spec.dropout,
        "bias": "none",
        "target_modules": [spec.targets] if isinstance(spec.targets, str) else list(spec.targets),
        "modules_to_save": None,
        "rank_pattern": dict(spec.rank_overrides),
        "alpha_pattern": {name: _plain(alpha) for name, alpha in spec.alpha_overrides.items()},
        "use_rslora": spec.scaling == "rslora",
        "use_dora": spec.magnitude,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "peft_version": PEFT_VERSION,
    }


def _problems(config: dict[str, Any]) -> Iterable[str]:
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r:.60}; only LORA is supported"
    names = config.get("target_modules")
    if not isinstance(names, str | list) or not names or not all(isinstance(name, str) and name for name in names):
        yield f"target_modules: a list of names is needed, got {names!r:.60}"
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field), dict | None):
            yield f"{field}: a mapping is needed, got {config[field]!r:.60}"
    for field in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if not isinstance(config.get(field, False), bool):
            yield f"{field}: true or false is needed, got {config[field]!r:.60}"
    if config.get("bias", "none") not in ("none", None):
        yield f"bias={config['bias']!r:.60}: trained biases aren't supported"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(MOVES_BASE):
        yield f"init_lora_weights={init!r:.60} changes the base; save it with PEFT's conversion to plain LoRA"
    for field, meaning in UNSUPPORTED.items():
        if config.get(field):
            yield f"{field}: {meaning} isn't supported"
    for field in sorted(config.keys() - UNSUPPORTED.keys() - IGNORED - READ):
        if config[field]:
            yield f"{field!r:.60} is unknown, so what it does can't be kept"


def _literal(pattern: str) -> str:
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if re.search(r"[\\*+?()\[\]{}|^$]", name):
        raise ValueError(f"the pattern {pattern!r:.80} needs a regular expression; only module names are supported")
    return name


def _plain(number: float) -> int | float:
    """32 rather than 32.0: some loaders type lora_alpha as an int."""
    return int(number) if math.isfinite(number) and number == int(number) else number


def _field(location: tuple[Any, ...]) -> str:
    names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
    names |= {"rank_overrides": "rank_pattern", "alpha_overrides": "alpha_pattern"}
    return ".".join(names.get(str(part), str(part)) for part in location if part not in ("tuple", "str"))
