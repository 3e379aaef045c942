"""Which runs a sweep is of, read off a command line, before anything is loaded.

    deltaw sweep run.yaml train.lr=1e-4,3e-4 adapter.rank=4,16     one run for each combination of the values
    deltaw sweep --runs alice.yaml bob.yaml                        one for each run file, in the folder that it names

A comma that stands in no bracket and in no quotes separates values; a key with one value is an override like any other.
The runs of a grid lie in the run file's `output`, each in a folder that is called by what sets it apart; those of
`--runs` where their own `output` says, and the sweep in the folder that these share.

What may vary is all but what makes another base, or the same one in other numbers or elsewhere: `COMMON`. The adapters
stand on one base in one process, and a sweep that silently opened a second one would be no faster than two commands.

    lr-1e-4_rank-16_seed-0       the last part of each key, and its value as it was written
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.config import RunConfig, load_config
from deltaw.errors import InputError, listed

COMMON = ("base", "base_weights", "train.dtype", "train.device", "train.checkpointing", "train.shard")
SEED = "train.seed"  # runs that differ in it alone tell what chance does
MOST = 256  # runs of one sweep: more are a slip of the finger
LONGEST = 120  # characters of a folder's name


@dataclass(frozen=True)
class Variant:
    """One run of a sweep. `settings`: what sets it apart, by key, as values, and a whole section as it was written (all
    of its defaults would be no name for it); `config.output` is its folder."""

    name: str
    config: RunConfig
    settings: Mapping[str, Any]

    @property
    def setting(self) -> str:
        """In words, but for the seed: what it shares with runs that differ in nothing else."""
        return words({key: value for key, value in self.settings.items() if key != SEED})

    @property
    def seed(self) -> int:
        return self.config.train.seed


@dataclass(frozen=True)
class Grid:
    """A sweep as it was asked for: its folder and its runs. `halving`: the worse half stops early, again and again."""

    folder: Path
    variants: tuple[Variant, ...]
    halving: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """What varies."""
        return tuple(self.variants[0].settings)

    def checked(self) -> "Grid":
        """The same. Raises InputError where its runs can't be trained together."""
        if not self.variants:
            raise InputError("a sweep of no runs", fix="give a run file and values: train.lr=1e-4,3e-4")
        if len(self.variants) > MOST:
            raise InputError(f"that would be {len(self.variants):,} runs, and a sweep takes up to {MOST}")
        _check_common(self.variants)
        _check_apart(self.variants)
        if self.halving:
            _check_halving(self.variants)
        return self


def of_grid(run: Path, overrides: Sequence[str], *, halving: bool = False) -> Grid:
    """Every combination of the values. Raises InputError, also for each run's own settings."""
    pairs = [_key_and_values(item) for item in overrides]
    if not any(len(values) > 1 for _, values in pairs):
        raise InputError(
            "nothing varies: a sweep wants several values of a setting, separated by commas",
            fix="deltaw sweep run.yaml train.lr=1e-4,3e-4 train.seed=0,1,2   (one run: deltaw train run.yaml)",
        )
    keys = [key for key, values in pairs if len(values) > 1]
    if wrong := [key for key in keys if key == "output"]:
        raise InputError(f"{wrong[0]} is the sweep's folder, and there is one", fix="leave one value")
    short = _short(keys)
    choices = list(itertools.product(*([f"{key}={value}" for value in values] for key, values in pairs)))
    if len(choices) > MOST:
        raise InputError(f"that would be {len(choices):,} runs, and a sweep takes up to {MOST}")
    folder, variants, names = Path(), list[Variant](), set[str]()
    for choice in choices:
        config = load_config(run, choice)
        folder = Path(config.output)
        texts = [item.partition("=")[2] for item in choice if item.partition("=")[0] in short]
        name = _unused("_".join(f"{short[key]}-{_plain(text)}" for key, text in zip(keys, texts, strict=True)), names)
        config = config.model_copy(update={"output": str(folder / name)})
        given = {key: value_of(config, key) for key in keys}
        told = {
            key: text if isinstance(given[key], dict) else given[key] for key, text in zip(keys, texts, strict=True)
        }
        variants.append(Variant(name, config, told))
    return Grid(folder, tuple(variants), halving).checked()


def of_runs(files: Sequence[Path], folder: Path | None = None, *, halving: bool = False) -> Grid:
    """A run for each file. `folder`: the sweep's, where not all of their outputs lie in one. Raises InputError."""
    configs = [load_config(file) for file in files]
    parents = {Path(config.output).parent for config in configs}
    if folder is None and len(parents) > 1:
        raise InputError(
            "the runs' outputs lie in several folders, and a sweep has one of its own", fix="name it: -o runs/sweep"
        )
    names = set[str]()
    variants = [Variant(_unused(Path(c.output).name, names), c, {"run": Path(c.output).name}) for c in configs]
    return Grid(folder or parents.pop(), tuple(variants), halving).checked()


def value_of(config: RunConfig, key: str) -> Any:
    """The value at a dotted key, as JSON."""
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def words(settings: Mapping[str, Any]) -> str:
    """`lr 0.0001, rank 16`."""
    short = _short(settings)
    return ", ".join(f"{short[key]} {_word(value)}" for key, value in settings.items()) or "one setting"


def _word(value: Any) -> str:
    """As a run file has it; a list with + between."""
    if isinstance(value, list):
        return "+".join(map(_word, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key, or all of it where two would be alike."""
    keys = list(keys)
    last = [key.rpartition(".")[2] for key in keys]
    return {key: end if last.count(end) == 1 else key for key, end in zip(keys, last, strict=True)}


def _key_and_values(item: str) -> tuple[str, list[str]]:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise InputError(f"{item!r} isn't a setting", fix="write key=value,value: train.lr=1e-4,3e-4")
    values = [value.strip() for value in _split(text)]
    if len(values) > 1 and "" in values:
        raise InputError(f"{item!r}: a value is missing between two commas")
    if twice := [value for value in values if values.count(value) > 1]:
        raise InputError(f"{key}: {twice[0]} stands there twice", fix="give each value once")
    return key, values


def _split(text: str) -> list[str]:
    """At commas in no bracket and in no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _plain(text: str) -> str:
    """As a part of a folder's name."""
    text = Path(text).stem if "/" in text else text
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-.") or "none"


def _unused(name: str, names: set[str]) -> str:
    """The name, shortened, with a number where it is taken."""
    name = name[:LONGEST].strip("-.") or "run"
    tried = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    free = next(one for one in tried if one not in names)
    names.add(free)
    return free


def _check_common(variants: Sequence[Variant]) -> None:
    for key in COMMON:
        values = [value_of(variant.config, key) for variant in variants]
        if other := next((n for n, value in enumerate(values) if value != values[0]), 0):
            pair = f"{variants[0].name} has {_word(values[0])}, {variants[other].name} {_word(values[other])}"
            raise InputError(
                f"the runs of a sweep share one base in one process, so {key} can't differ: {pair}",
                fix="sweep those that share it, and the others after them",
            )
    if rewarded := [variant.name for variant in variants if variant.config.objective.is_rewarded]:
        raise InputError(
            f"runs on rewards aren't swept together yet, each samples for itself: {rewarded[0]} is one",
            fix="train these runs one after the other: deltaw train run.yaml",
        )
    if variants[0].config.train.shard == "always":
        raise InputError("train.shard: always spreads a base over several processes, and a sweep is one process")


def _check_apart(variants: Sequence[Variant]) -> None:
    """Each run is another one, in a folder of its own."""
    folders = [str(Path(variant.config.output).absolute()) for variant in variants]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise InputError(f"two runs have one output: {twice[0]}", fix="give each run file an output of its own")
    seen: dict[str, str] = {}
    for variant in variants:
        what = variant.config.model_copy(update={"output": "."}).model_dump_json()
        if what in seen:
            raise InputError(f"{seen[what]} and {variant.name} are the same run", fix="give each value once")
        seen[what] = variant.name


def _check_halving(variants: Sequence[Variant]) -> None:
    without = [variant.name for variant in variants if variant.config.data.eval is None]
    if without:
        raise InputError(
            f"--halving compares losses on held-out rows, and these runs have none:\n{listed(without)}",
            fix="set data.eval",
        )
    if len({variant.config.objective.model_dump_json() for variant in variants}) > 1:
        raise InputError(
            "--halving compares losses of one objective, and these runs have several", fix="leave --halving out"
        )
    rows = {variant.config.data.model_copy(update={"train": ""}).model_dump_json() for variant in variants}
    if len(rows) > 1 or any(variant.config.data.train != variants[0].config.data.train for variant in variants):
        raise InputError(
            "--halving compares losses on the same held-out rows, and these runs differ in data",
            fix="leave --halving out",
        )
