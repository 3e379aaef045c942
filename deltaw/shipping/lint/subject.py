"""What lint checks: an adapter's folder in PEFT's layout, read leniently and without trusting a byte of it.

`Adapter.load` refuses what deltaw can't represent, but lint has to read just such folders. So the config stays raw
JSON, the tensors are their names and shapes from the header, and numbers are read one tensor at a time and only when a
rule asks for them. Pickles are never opened, and a stranger's regular expressions are matched in a process where they
can do no harm (files/patterns.py), or not at all.
"""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from deltaw.adapter.file import CONFIG, RECORD, WEIGHTS, Adapter, BaseId
from deltaw.adapter.peft_config import WEIGHT
from deltaw.config import AdapterSpec, RunConfig
from deltaw.errors import InputError, command
from deltaw.files.patterns import first_matches
from deltaw.files.safetensors import readable_tensors
from deltaw.files.strict_json import read_json
from deltaw.shipping.lint.base import Base
from deltaw.shipping.lint.chat import Chat
from deltaw.shipping.lint.finding import Finding
from deltaw.shipping.lint.keys import EMBEDDING_A, EMBEDDING_B, A, B, Key, Names, parse
from deltaw.show.progress import Display

MANY_MATCHES = 400_000_000  # patterns times letters of paths: more aren't tried
MANY_NAMES = 5_000_000  # names times paths: with more, deltaw doesn't try to load it
LONG_PATTERN = 2_000  # characters


@dataclass(frozen=True)
class Numbers:
    """A summary of a tensor's numbers."""

    floating: bool
    finite: bool
    peak: float  # the largest absolute one
    least: float  # the smallest one
    most: float

    @property
    def zero(self) -> bool:
        return self.finite and self.peak == 0

    @property
    def constant(self) -> bool:
        return self.finite and self.least == self.most


class Undecided(Exception):
    """Raised if a config's patterns can't be matched against the modules; the message is for people."""


@dataclass(frozen=True, eq=False)
class Subject:
    """An adapter's folder. `name` is what the user typed; `early` are the findings made while it was read."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    early: tuple[Finding, ...] = ()
    base: Base | None = None
    base_option: str | None = None
    kind: str = ""  # the base's model_type
    no_base: str = ""  # why the base isn't available
    recorded: BaseId = field(default_factory=BaseId)
    spec: AdapterSpec | None = None  # as deltaw recorded it
    run: RunConfig | None = None
    max_rank: int = 16  # of the vLLM that it is for
    display: Display = field(default_factory=lambda: Display(quiet=True))

    @cached_property
    def chat(self) -> Chat:
        return Chat(self.folder, self.recorded, self.base, self.run)

    @cached_property
    def keys(self) -> list[Key]:
        return [parse(name) for name in self.shapes]

    @cached_property
    def factors(self) -> dict[str, dict[str, Key]]:
        """module path -> part -> the tensor, for all factors, with or without their partners."""
        by_path: dict[str, dict[str, Key]] = {}
        for key in self.keys:
            if key.part in (A, B, EMBEDDING_A, EMBEDDING_B):
                by_path.setdefault(key.path, {})[key.part] = key
        return by_path

    @cached_property
    def layers(self) -> list[str]:
        """The paths of linear layers that have factors."""
        return [
            path
            for path, parts in self.factors.items()
            if any(k.part in (A, B) and not k.expert for k in parts.values())
        ]

    def get(self, field_name: str, default: Any = None) -> Any:
        """A field of the config; null counts as missing."""
        value = self.config.get(field_name)
        return default if value is None else value

    def texts(self, field_name: str) -> list[str]:
        """The texts of a field that holds a name or a list of names."""
        value = self.get(field_name, [])
        given = value if isinstance(value, list) else [value]
        return [text for text in given if isinstance(text, str)]

    # How PEFT reads the config

    @property
    def default_rank(self) -> int | None:
        """`r`, 8 if it is missing as in PEFT; None if it isn't a rank."""
        rank = self.config.get("r", 8)
        return rank if type(rank) is int and rank > 0 else None

    @property
    def default_alpha(self) -> float | None:
        """`lora_alpha`, 8 if it is missing; None if it isn't a number."""
        return number(self.config.get("lora_alpha", 8))

    def pattern(self, field_name: str) -> dict[str, Any]:
        """module path -> what `rank_pattern` or `alpha_pattern` gives it. Raises Undecided."""
        pattern = self.get(field_name, {})
        if not isinstance(pattern, dict):
            raise Undecided(f"{field_name} is {pattern!r:.60}, not a mapping")
        called = {path: f"{path}{WEIGHT}" if self.by_weight(path) else path for path in self.layers}
        taken = self._first(list(pattern), called.values())
        return {path: pattern[taken[name]] for path, name in called.items() if name in taken}

    def scales(self) -> dict[str, float]:
        """module path -> the scale that PEFT gives B A, where it is a number. Raises Undecided."""
        ranks, alphas, scales = self.pattern("rank_pattern"), self.pattern("alpha_pattern"), {}
        for path in self.layers:
            rank, alpha = ranks.get(path, self.default_rank), number(alphas.get(path, self.default_alpha))
            if alpha is not None and type(rank) is int and rank > 0:
                scales[path] = alpha / (math.sqrt(rank) if self.get("use_rslora") else rank)
        return scales

    def covered(self, paths: Iterable[str]) -> set[str]:
        """The `paths` that PEFT would adapt, by its targets. Raises Undecided."""
        paths = list(paths)
        asked = self.get("target_modules")
        if asked is None and not self.get("target_parameters"):
            raise Undecided("target_modules is missing, so PEFT goes by its own list for the architecture")
        if asked == "all-linear":
            chosen = {path for path in paths if self.base is None or path != self.base.head}
        elif isinstance(asked, str):
            chosen = self._whole(asked, paths)
        else:
            names = Names(self.texts("target_modules"))
            chosen = {path for path in paths if names.of(path) is not None}
        excluded = self.get("exclude_modules")
        if isinstance(excluded, str):
            chosen -= self._whole(excluded, paths)
        else:
            names = Names(self.texts("exclude_modules"))
            chosen -= {path for path in paths if names.of(path) is not None}
        layers = self.get("layers_to_transform", [])
        if layers != [] and not isinstance(asked, str):
            below = self.texts("layers_pattern")
            if any(not name.isidentifier() for name in below):
                raise Undecided("layers_pattern names the layers by a pattern")
            wanted = layers if isinstance(layers, list) else [layers]
            exact = set(self.texts("target_modules"))
            chosen = {path for path in chosen if path in exact or _layer(path, below) in wanted}
        return chosen | {path for path in paths if self.by_weight(path)}

    def by_weight(self, path: str) -> bool:
        """Whether a layer is named by its weight, in target_parameters."""
        return self._parameters.of(path) is not None

    @cached_property
    def _parameters(self) -> Names:
        entries = self.texts("target_parameters")
        return Names(entry.removesuffix(WEIGHT) for entry in entries if entry.endswith(WEIGHT))

    def _whole(self, pattern: str, paths: list[str]) -> set[str]:
        """The paths that a regular expression matches as a whole."""
        return set(self._first([f"^(?:{pattern})"], paths))

    @staticmethod
    def _first(keys: list[str], paths: Iterable[str]) -> dict[str, str]:
        paths = list(paths)
        if len(keys) * sum(map(len, paths)) > MANY_MATCHES or any(len(key) > LONG_PATTERN for key in keys):
            raise Undecided(f"{len(keys):,} patterns on {len(paths):,} modules are too many to try")
        try:
            return first_matches(keys, paths)
        except InputError as error:
            raise Undecided(error.what) from None

    def rank(self, path: str) -> int | None:
        """The rank of a module's tensors, whatever the config says."""
        parts = self.factors[path]
        for part, side in ((A, 0), (B, 1), (EMBEDDING_A, 0), (EMBEDDING_B, 1)):
            if part in parts and len(shape := self.shapes[parts[part].name]) == 2:
                return shape[side]
        return None

    # Numbers

    @cached_property
    def numbers(self) -> dict[str, Numbers]:
        """A summary of every tensor's numbers, one in memory at a time; tensors that can't be read are left out."""
        seen = {}
        names = list(self.shapes)
        # An error means that the file was removed or changed after its header was read.
        with self.display.task("checking the numbers", max(1, len(names))) as progress, suppress(InputError):
            for done, (name, tensor) in enumerate(readable_tensors(self.folder / WEIGHTS, names), 1):
                seen[name] = _seen(tensor)
                progress(done)
        return seen

    # Fixes

    @cached_property
    def readable(self) -> bool:
        """Whether deltaw itself can load it, so that its commands help."""
        lists = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
        names = sum(len(value) for field_name in lists if isinstance(value := self.get(field_name), list | dict))
        if self.config.get("task_type") == "SEQ_2_SEQ_LM" or names * len(self.shapes) > MANY_NAMES:
            return False  # a base that deltaw doesn't train; a file that nobody trained
        try:
            Adapter.load(self.folder)
        except (InputError, ValueError):
            return False
        return True

    def export(self, to: str, *options: str) -> str | None:
        """The command that writes another form of it, or None where deltaw can't load it."""
        return self._command("export", "--to", to, *options, end=to)

    def merge(self) -> str | None:
        """The command that merges it with its base into a model folder."""
        return self._command("merge", end="merged")

    def _command(self, verb: str, *options: str, end: str) -> str | None:
        if not self.readable:
            return None
        base = ["--base", self.base_option] if self.base_option else []
        return command(verb, self.name, options=[*options, *base, "-o", f"{Path(self.name).name or 'adapter'}-{end}"])


def number(value: Any) -> float | None:
    """A JSON number as a float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def read_spec(folder: Path) -> AdapterSpec | None:
    """The spec in deltaw.json, or None if it can't be read."""
    try:
        return AdapterSpec.model_validate_json(json.dumps(_record(folder).get("spec")))
    except (ValidationError, ValueError):
        return None


def read_record(folder: Path) -> BaseId:
    """The base in deltaw.json, as far as it can be read; all of it is optional."""
    raw = _record(folder).get("base")
    known = raw if isinstance(raw, dict) else {}
    texts = {name: known[name] for name in BaseId.__dataclass_fields__ if isinstance(known.get(name), str)}
    return BaseId(**texts)


def recorded_base(folder: Path, config: Mapping[str, Any]) -> BaseId:
    """The base that an adapter names: in deltaw's record, else in PEFT's config."""
    if (record := read_record(folder)) != BaseId():
        return record
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return BaseId(name if isinstance(name, str) else "", revision if isinstance(revision, str) else None)


def _record(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / RECORD, max_bytes=1_000_000)
    except InputError:
        return {}


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as it is. Raises InputError."""
    return read_json(folder / CONFIG, max_bytes=1_000_000, allow_nan=True)


def _layer(path: str, below: list[str]) -> int | None:
    """The number that PEFT takes for a module's layer: the last one right below a name of `layers_pattern`, which
    itself stands below another; without such names the first one that stands below two others."""
    parts = path.split(".")
    for name in below:
        for at in range(len(parts) - 3, 0, -1):
            if parts[at] == name and parts[at + 1].isdecimal() and parts[at + 1].isascii():
                return int(parts[at + 1][:9])
    if below:
        return None
    inner = [part for part in path.split(".")[2:-1] if part.isdecimal() and part.isascii()]
    return int(inner[0][:9]) if inner else None


def _seen(tensor: torch.Tensor) -> Numbers:
    wide = tensor.float() if tensor.is_floating_point() or not tensor.is_complex() else tensor.real.float()
    if wide.numel() == 0:
        return Numbers(tensor.is_floating_point(), True, 0.0, 0.0, 0.0)
    least, most = (float(extreme) for extreme in torch.aminmax(wide))  # NaN is handed on
    finite = math.isfinite(least) and math.isfinite(most)
    return Numbers(tensor.is_floating_point(), finite, max(abs(least), abs(most)) if finite else math.nan, least, most)
