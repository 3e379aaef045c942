"""The run file: YAML -> frozen, strict values.

Everything a run depends on is in one `RunConfig`, which is saved with the run and never passed into a layer.
Strict means: an unknown key, a wrong type or an impossible number is an error that names the file, the line and the
field, and the nearest name that exists. All problems are reported at once.

A setting that has no effect beside others is well formed, but doesn't do what its writer thinks. A file with
settings that need something more is refused (`without_effect`); those that were switched off elsewhere, as one does to
cut a run short, are named (`switched_off`). Only a value other than the default counts, since a run's own config.yaml
has every default written out; and 0 samples, which is what one gets. Bounds that aren't reached (`data.max_length`,
`train.keep`, …) aren't looked at.

Rejected: dataclasses with hand-written checks (the messages were the larger half), and a separate class for the
adapter's options here and in `adapter/` (two definitions of one thing): `AdapterSpec` is defined here, at the bottom
of the import order, and `adapter/targets.py` gives it its meaning on a model.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from deltaw.errors import InputError, listed
from deltaw.files.paths import PathText
from deltaw.files.run_yaml import PROBLEMS, Dumper, Loader, line_of, not_yaml

Metric = Literal["exact_match", "phoneme_error_rate"]
Dtype = Literal["auto", "bfloat16", "float32"]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MANY, SEEDS = 10**12, 2**63  # more than any run counts; what generators take
Count = Annotated[int, Field(ge=1, le=MANY)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
TARGET_GROUPS = ("all-linear", "attention", "mlp")
BEGUN = ("before.json", "metrics.jsonl", "checkpoints", "adapter", "result.json")  # beside the config.yaml of a run
FACTOR_FIELDS = (  # of AdapterSpec
    "rank", "alpha", "scaling", "init", "magnitude", "dropout", "rank_overrides", "alpha_overrides",
)  # fmt: skip


class Strict(BaseModel):
    """Frozen; unknown keys refused; no silent conversion ("4" is not 4, true is not 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def checked(cls, **fields: Any) -> Self:
        """The value, or an InputError that names every wrong field."""
        try:
            return cls(**fields)
        except ValidationError as error:
            lines = [f"{e['loc'][0]}: {e['msg']} (got {e['input']!r:.60})" for e in error.errors()]
            raise InputError("; ".join(lines)) from None


class AdapterSpec(Strict):
    """What to adapt and how large. Scale is alpha / rank (LoRA §4.1) or alpha / sqrt(rank) (rsLoRA).

    `full`: ΔW itself is trained, a matrix of the weight's size, and the fields about factors say nothing. In a run
    file `adapter: full` is short for it.
    """

    full: bool = False
    rank: int = Field(16, ge=1, le=65536)
    alpha: PositiveFloat = 32.0
    targets: str | tuple[str, ...] = "all-linear"
    scaling: Literal["lora", "rslora"] = "lora"
    init: Literal["lora", "pissa", "olora", "eva", "lora-ga"] = "lora"
    magnitude: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    rank_overrides: dict[str, Annotated[int, Field(ge=1, le=65536)]] = {}
    alpha_overrides: dict[str, PositiveFloat] = {}

    @field_validator("targets", mode="before")
    @classmethod
    def _targets(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("must be a name or a list of names")
        if not names or not all(name.strip() for name in names):
            raise ValueError("is empty: name at least one module, or all-linear, attention, mlp")
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _full_has_no_factors(self) -> "AdapterSpec":
        if self.full:
            given = [name for name in FACTOR_FIELDS if getattr(self, name) != AdapterSpec.model_fields[name].default]
            if given:
                raise ValueError(f"full fine-tuning has no {', '.join(given)}: leave these out, or full")
        return self

    @model_validator(mode="after")
    def _magnitude_starts_at_the_base(self) -> "AdapterSpec":
        if self.magnitude and self.moves_base:
            raise ValueError(f"magnitude (DoRA) starts at B = 0, but init {self.init} doesn't: use init lora or eva")
        return self

    @property
    def kind(self) -> Literal["lora", "dora", "full"]:
        """What kind of update it trains."""
        return "full" if self.full else "dora" if self.magnitude else "lora"

    @property
    def moves_base(self) -> bool:
        """Whether training starts at B A ≠ 0, which is taken off again: the trained update has twice the rank."""
        return self.init in ("pissa", "olora", "lora-ga")

    @property
    def from_data(self) -> bool:
        """Whether the start is made of the first batches."""
        return self.init in ("eva", "lora-ga")

    def rank_of(self, path: str) -> int:
        """The rank of the module at `path`: the first override that names it, else `rank`."""
        return next((r for name, r in self.rank_overrides.items() if names_module(name, path)), self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha of the module at `path`: the first override that names it, else `alpha`."""
        return next((a for name, a in self.alpha_overrides.items() if names_module(name, path)), self.alpha)

    def scale(self, path: str) -> float:
        """The factor in front of B A for the module at `path`."""
        if self.full:
            return 1.0
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.scaling == "rslora" else rank)


def names_module(name: str, path: str) -> bool:
    """True where `name` is the module's path or its dotted end: `q_proj` names `model.layers.0.self_attn.q_proj`.

    Literal, never a regular expression; what a trained adapter's patterns mean is `files/patterns.py`'s to say.
    """
    return path == name or path.endswith("." + name)


class DataConfig(Strict):
    """Where the rows are and how they become tokens and masks."""

    train: PathText
    eval: Count | PathText | None = Field(None, description="rows held out of train, or a separate file")
    form: Literal["auto", "text", "chat", "completion", "alpaca", "sharegpt"] = "auto"
    train_on: Literal["auto", "assistant", "completion", "all"] = "auto"
    template: PathText | None = Field(
        None, description="chatml, or a .jinja file, for a base that has no chat template"
    )
    rendered: bool = Field(
        False,
        description="text, prompts and completions already hold control tokens, bos and eos: they are taken as tokens",
    )
    max_length: int = Field(2048, ge=2, le=MANY)
    too_long: Literal["drop", "truncate"] = "drop"
    bad_rows: float = Field(0.01, ge=0, le=1, description="share of rows that may be unusable")
    limit: Count | None = None
    seed: Seed = Field(0, description="seed of the choice of held-out rows")


class TrainConfig(Strict):
    """How long, how fast, how much at a time."""

    epochs: PositiveFloat = Field(1.0, le=1e9)
    steps: Count | None = Field(None, description="stop after this many steps, whatever epochs says")
    lr: PositiveFloat = Field(5e-4, le=1.0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int | None = Field(None, ge=0, le=MANY, description="null: 10, or a tenth of a short run")
    lr_ratio_b: PositiveFloat = Field(1.0, le=1e6, description="LoRA+: learning rate of B divided by that of A")
    weight_decay: float = Field(0.0, ge=0, le=1)
    clip: PositiveFloat = 1.0
    tokens_per_step: Count = 4096
    tokens_per_batch: Count = Field(2048, description="tokens in one forward and backward; bounds the memory")
    seed: Seed = 0
    dtype: Dtype = "auto"
    device: str = "auto"
    eval_every: Count | None = None
    sample_every: Count | None = None
    save_every: Count = 100
    keep: Count = Field(2, description="checkpoints kept besides the best")
    skip_nonfinite: int = Field(
        0, ge=0, le=MANY, description="steps with a NaN that may be skipped before the run stops"
    )
    skip_spikes: float | None = Field(
        None, gt=1, allow_inf_nan=False, description="skip steps whose loss is this many times the recent median"
    )


class EvaluateConfig(Strict):
    """What is measured on the held-out rows besides the loss."""

    metrics: tuple[Metric, ...] = ()
    general: PathText | None = Field(
        "builtin:general", description="text on which forgetting is measured; null: not measured"
    )
    max_new_tokens: int = Field(64, ge=1, le=65536)
    samples: int = Field(3, ge=0, le=100)
    report: bool = Field(True, description="write report.html at the end")

    @field_validator("metrics", mode="before")
    @classmethod
    def _metrics(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class RunConfig(Strict):
    """A whole run: `base`, `adapter`, `data`, `train`, `evaluate`, `output`."""

    base: PathText = Field(min_length=1)
    adapter: AdapterSpec = AdapterSpec()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    output: PathText = Field(min_length=1)

    @field_validator("adapter", mode="before")
    @classmethod
    def _full(cls, value: Any) -> Any:
        return {"full": True} if value == "full" else value

    @model_validator(mode="after")
    def _all_has_an_effect(self, info: ValidationInfo) -> "RunConfig":
        idle = [] if info.context == BEGUN else self.without_effect()
        if idle:
            raise ValueError("; ".join(idle))
        return self

    def without_effect(self) -> list[str]:
        """Each setting that does nothing, and what it would need."""
        data, train, evaluate = self.data, self.train, self.evaluate
        no_rows = {
            "train.eval_every": train.eval_every is not None,
            "train.sample_every": train.sample_every is not None,
            "evaluate.metrics": bool(evaluate.metrics),
            "evaluate.samples": evaluate.samples not in (0, _default(evaluate, "samples")),
        }
        needs = {name: "held-out rows: set data.eval" for name, given in no_rows.items() if given and data.eval is None}
        if self.adapter.full and train.lr_ratio_b != 1:
            needs["train.lr_ratio_b"] = "factors, and adapter: full has none"
        if data.seed and not isinstance(data.eval, int) and data.limit is None:
            needs["data.seed"] = "rows to choose from: data.eval as a number, or data.limit"
        return [f"{name} does nothing without {what}" for name, what in needs.items()]

    def switched_off(self) -> list[str]:
        """Each setting that others switch off, in words."""
        train, evaluate = self.train, self.evaluate
        answered = self.data.eval is not None and (evaluate.metrics or evaluate.samples)
        lines = []
        if train.steps and train.epochs != _default(train, "epochs"):
            lines.append(f"train.steps: {train.steps} sets the length, so train.epochs: {train.epochs:g} does nothing")
        if train.sample_every and not evaluate.samples:
            lines.append(f"train.sample_every: {train.sample_every} shows nothing: evaluate.samples is 0")
        if not answered and evaluate.max_new_tokens != _default(evaluate, "max_new_tokens"):
            lines.append(f"evaluate.max_new_tokens: {evaluate.max_new_tokens} does nothing: no row is answered")
        return lines

    def to_yaml(self) -> str:
        """The resolved run file, every default written out."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run file and apply `key.sub=value` overrides. Raises InputError that lists every problem."""
    path = Path(path)
    text = read_text(path)
    try:
        node = yaml.compose(text, Loader=Loader)
        raw = yaml.load(text, Loader=Loader)
    except PROBLEMS as error:
        raise InputError(not_yaml(error, str(path), text)) from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a run file is a mapping with base, data and output; this is {_kind(raw)}")
    begun = path.name == "config.yaml" and any((path.parent / name).exists() for name in BEGUN)
    for item in overrides:
        _override(raw, item)
    return parse_config(raw, source=str(path), node=node, begun=begun)


def parse_config(
    raw: Mapping[str, Any], *, source: str = "config", node: yaml.Node | None = None, begun: bool = False
) -> RunConfig:
    """Validate a plain mapping. `node` (the YAML tree) lends the line numbers. `begun`: a run's own, accepted already,
    so a setting without an effect doesn't keep it from being read."""
    try:
        # JSON mode: a list is a tuple, an int is a float, and nothing else converts.
        return RunConfig.model_validate_json(json.dumps(raw), context=BEGUN if begun else None)
    except ValidationError as error:
        lines = _problems(error, source, node)
    except (TypeError, ValueError) as problem:
        lines = [f"{source}: {problem}"]
    raise InputError("\n".join([f"{source} has {len(lines)} problem{'s' * (len(lines) > 1)}:", listed(lines)]))


def read_text(path: Path) -> str:
    """A small text file the user wrote. Raises InputError when it is missing, a folder, huge or not UTF-8."""
    try:
        if path.stat().st_size > 10_000_000:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes is too large for a run file")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", fix=_similar_file(path)) from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, not a file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text", fix="save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise InputError(f"{item!r} is not an override", fix="write key=value, for example train.lr=1e-3")
    *parents, last = key.split(".")
    for name in parents:
        if raw.get(name) is None:  # absent, or a section whose lines are all commented out
            raw[name] = {}
        raw = raw[name]
        if not isinstance(raw, dict):
            raise InputError(f"{item!r}: {name} is a single value, it has no fields")
    try:
        raw[last] = yaml.load(value, Loader=Loader)
    except PROBLEMS:
        raise InputError(f"{item!r:.200}: the value is not valid YAML") from None


def _problems(error: ValidationError, source: str, node: yaml.Node | None) -> list[str]:
    """One line per field, names before values: a misspelt key explains the missing one, and only the first few show."""
    by_field: dict[tuple[Any, ...], Any] = {}
    for problem in error.errors():
        # A union's branch name (`str`, `int`) isn't a field of the file; its branches' problems are one problem.
        field = (
            tuple(p for p in problem["loc"] if p not in ("str", "int", "constrained-int") and "[" not in str(p))
            or problem["loc"]  # a key of the user's own that looks like one
        )
        words = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        words = words.replace("an object", "a mapping")
        if field in by_field and problem["type"] != "value_error":
            words = by_field[field]["msg"] + " or " + words.removeprefix("must be ")
        by_field[field] = {**problem, "loc": field, "msg": words}
    order = ("extra_forbidden", "missing")
    ranked = sorted(by_field.values(), key=lambda p: order.index(p["type"]) if p["type"] in order else len(order))
    return [_problem(problem, source, node) for problem in ranked]


def _problem(problem: Mapping[str, Any], source: str, node: yaml.Node | None) -> str:
    location = problem["loc"]
    field = ".".join(part if str(part).isprintable() else ascii(part) for part in map(str, location))
    line = line_of(node, location)
    where = f"{source}:{line}" if line else source
    if problem["type"] == "extra_forbidden":
        known = fields_at(RunConfig, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{where}: unknown key {field!r:.80}; {hint}"
    if problem["type"] == "missing":
        return f"{where}: {field!r} is missing"
    value = problem.get("input")
    got = f" (got {json.dumps(value, ensure_ascii=False):.60})" if not isinstance(value, dict | list) else ""
    return f"{where}: {field + ': ' if field else ''}{problem['msg']}{got}"


def fields_at(model: type[BaseModel], location: Iterable[Any]) -> list[str]:
    """The field names of the section at `location`, for near-miss hints."""
    for part in location:
        field = model.model_fields.get(str(part))
        kinds = [field.annotation, *get_args(field.annotation)] if field else []
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), Strict)
    return list(model.model_fields)


def _default(section: Strict, name: str) -> Any:
    return type(section).model_fields[name].default


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "empty"}.get(type(value), f"a {type(value).__name__}")


def _similar_file(path: Path) -> str | None:
    folder = path.parent if path.parent.is_dir() else Path(".")
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    return f"did you mean {folder / near[0]}?" if near else None
