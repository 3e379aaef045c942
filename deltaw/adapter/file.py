"""An adapter as a value and as a folder in PEFT's layout.

    adapter_model.safetensors    the factors (peft_tensors.py), float32
    adapter_config.json          PEFT's classic fields (peft_config.py)
    delta.safetensors            instead of both for full fine-tuning, which no other tool has a form for:
                                 <module path> -> ΔW [M, N], float32
    deltaw.json                  which base it was trained on (name, revision, fingerprint), how it is asked (chat
                                 template, system prompt), and how it came about (history.py)
    README.md                    how to use it, for people

PEFT, vLLM and the rest read the first two. deltaw.json is beside them because PEFT's config has no place for a
fingerprint, and without one an adapter on a wrong base of the right shapes would answer nonsense without an error.

Loading refuses what it can't represent or can't match, naming it; a silent no-op load is the commonest complaint about
other tools. Shapes are checked against the config, and every number against NaN, before a model is touched.

Letters: N inputs, M outputs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn

from deltaw.adapter import peft_experts
from deltaw.adapter.history import NOTHING, History
from deltaw.adapter.peft_config import CONFIG, check_config, from_spec, to_spec, token_rows, weight_names
from deltaw.adapter.peft_tensors import WEIGHTS, by_weight, module_paths, not_finite, to_tensors, to_updates
from deltaw.base.fingerprint import describe, same_base
from deltaw.base.source import PICKLES
from deltaw.config import TARGET_GROUPS, AdapterSpec
from deltaw.config.adapter import parameter_of
from deltaw.errors import InputError, RunError, command, listed
from deltaw.files.atomic import write_text_atomic
from deltaw.files.safetensors import load_safetensors, save_safetensors
from deltaw.files.strict_json import read_json
from deltaw.kinds import Dense
from deltaw.replaced import Rows, Whole
from deltaw.show.text import counted
from deltaw.updates import Update
from deltaw.version import VERSION

if TYPE_CHECKING:
    from deltaw.adapter.into import MergedInto

DELTAS, RECORD = "delta.safetensors", "deltaw.json"


@dataclass(frozen=True)
class BaseId:
    """Which base an adapter belongs to, and how it is asked. Empty fields are unknown (an adapter made by another
    tool); `system` is the prompt that all chats of its training began with, empty where there was none. `weights`: the
    form in which the base's matrices had other digits in its training than its files have (nf4, int8, keep), empty
    where they had the same."""

    name: str = ""
    revision: str | None = None
    fingerprint: str = ""
    template: str = ""
    system: str = ""
    weights: str = ""

    @property
    def weights_in_words(self) -> str:
        """For people: "trained on … weights of the base"."""
        return {"": "the files' own", "keep": "the GGUF's own, unrounded"}.get(self.weights, self.weights)

    def mismatch(self, other: "BaseId") -> str | None:
        """Why an adapter of this base may not be put on `other`, or None. Weights and settings count, names don't."""
        if self.fingerprint and other.fingerprint and not same_base(self.fingerprint, other.fingerprint):
            return (
                f"it was trained on {self.name or 'another base'} ({describe(self.fingerprint)}), "
                f"this base is {other.name or 'unnamed'} ({describe(other.fingerprint)})"
            )
        return None


@dataclass(frozen=True, eq=False)
class Adapter:
    """A trained update for every adapted module: `factors` by module path, each agreeing with `spec`."""

    spec: AdapterSpec
    factors: Mapping[str, Update]
    base: BaseId = field(default_factory=BaseId)
    fan_in_fan_out: bool = False  # PEFT's word for a base that stores its weights transposed (GPT-2's Conv1D)
    rewritten: frozenset[str] = frozenset()  # last names of layers that PEFT is told of by their weights (peft_config)
    history: History = NOTHING
    embeddings: frozenset[str] = (
        frozenset()
    )  # paths of modules that are one, whose LoRA PEFT keeps in a form of its own

    def __repr__(self) -> str:
        of = (
            "full fine-tuning"
            if self.spec.full
            else f"{'DoRA' if self.spec.magnitude else 'LoRA'}, rank {self.spec.rank}"
        )
        size = f"{counted(len(self.factors), 'module')}, {counted(self.parameters, 'parameter')}"
        return f"Adapter({of}, {size}, on {self.base.name or 'a base that it does not name'})"

    @property
    def parameters(self) -> int:
        return sum(update.parameters for update in self.factors.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every number, however it is stored: of the same adapter in another file it is the same."""
        digest = hashlib.sha256()
        for path, update in sorted(self.factors.items()):
            for name, tensor in sorted(update.tensors().items()):
                digest.update(f"{path} {name} {tuple(tensor.shape)} {update.scale!r}\n".encode())
                digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    @property
    def body(self) -> dict[str, Update]:
        """The updates that the spec's kind, rank and alpha are of: all but trained tokens and whole modules."""
        return {path: update for path, update in self.factors.items() if update.kind == self.spec.kind}

    @property
    def replaced(self) -> dict[str, Update]:
        """The others."""
        return {path: update for path, update in self.factors.items() if update.kind != self.spec.kind}

    @property
    def tokens(self) -> dict[int, str]:
        """The trained tokens by number, as far as their texts are known."""
        index = next((one.index_K.tolist() for one in self.factors.values() if isinstance(one, Rows)), [])
        return dict(zip(index, self.spec.tokens, strict=False))

    def save(self, directory: str | Path) -> Path:
        """Write PEFT's layout into `directory`, each file whole or not at all. RunError on NaN or a full disk."""
        directory = Path(directory)
        for path, update in self.factors.items():
            if not describes(self.spec, path, update):
                raise ValueError(f"{path}: rank {update.rank}, scale {update.scale} aren't what the spec says")
        tensors = to_tensors(self.factors, self.embeddings)
        if bad := not_finite(tensors):
            raise RunError(f"the adapter holds NaN or infinity and wasn't saved:\n{listed(bad)}")
        directory.mkdir(parents=True, exist_ok=True)
        if self.spec.full:
            save_safetensors(tensors, directory / DELTAS)
        else:
            save_safetensors(tensors, directory / WEIGHTS, {"format": "pt"})
            write_text_atomic(directory / CONFIG, json.dumps(self._peft_config(), indent=2) + "\n")
        base = {name: value for name, value in asdict(self.base).items() if name not in ("system", "weights") or value}
        record: dict[str, Any] = {"deltaw": VERSION, "base": base}
        record |= {"spec": self.spec.model_dump(mode="json", exclude={"start"}), "fan_in_fan_out": self.fan_in_fan_out}
        record |= {"history": self.history.to_json()} if self.history.known else {}
        write_text_atomic(directory / RECORD, json.dumps(record, indent=2) + "\n")
        write_text_atomic(directory / "README.md", self._card())
        return directory

    def merge_into(self, model: nn.Module) -> "MergedInto":
        """Put W + ΔW in the place of each adapted weight of a loaded model; `undo()`, or the end of a `with` block,
        puts the very same layers back. Raises InputError for what `attach` refuses, and for another base."""
        from deltaw.adapter.into import merge_into

        return merge_into(model, self.spec, self.factors, base=self.base.name, fingerprint=self.base.fingerprint)

    def _peft_config(self) -> dict[str, Any]:
        names = {self.spec.targets} if isinstance(self.spec.targets, str) else set(self.spec.targets)
        # A group is deltaw's own word, so it is spelt out for other tools.
        paths = tuple(dict.fromkeys(parameter_of(path) for path in self.body))
        spec = self.spec.model_copy(update={"targets": paths} if names & set(TARGET_GROUPS) else {})
        return from_spec(
            spec,
            self.body,
            self.rewritten,
            base=self.base.name,
            revision=self.base.revision,
            fan_in_fan_out=self.fan_in_fan_out,
            whole=[path for path, update in self.replaced.items() if isinstance(update, Whole)],
            tokens={p: one.index_K.tolist() for p, one in self.replaced.items() if isinstance(one, Rows)},
        )

    @staticmethod
    def load(directory: str | Path) -> "Adapter":
        """Read PEFT's layout, deltaw's own or another tool's; of a run's folder, the adapter in it. Raises InputError
        that lists what is wrong."""
        directory = adapter_folder(Path(directory).expanduser())
        if (directory / DELTAS).is_file():
            return _load_full(directory)
        _check_folder(directory)
        config = read_json(directory / CONFIG, max_bytes=1_000_000, allow_nan=True)
        check_config(config, str(directory / CONFIG))
        file, source = directory / WEIGHTS, str(directory / CONFIG)
        tensors = by_weight(load_safetensors(file), config, source)
        modules = module_paths(tensors, file)
        spec = to_spec(config, modules.low_rank, source, embeddings=modules.embeddings, whole=modules.whole)
        spec = spec.model_copy(update={"tokens": _tokens_of(directory)})
        experts = peft_experts.named(modules.linear, config.get("target_parameters") or ())
        factors = to_updates(tensors, spec, file, experts, token_rows(config, modules.tokens))
        transposed = bool(config.get("fan_in_fan_out"))
        base, history, words = base_of(directory, config), _history_of(directory), frozenset(modules.embeddings)
        return Adapter(spec, factors, base, transposed, weight_names(config), history, words)

    def _card(self) -> str:
        """A few words; what is exported gets a full card (shipping/card.py)."""
        base = self.base.name or "unknown"
        if self.spec.full:
            return (
                f"# Full fine-tuning of {base}\n\nWhat {len(self.factors)} weights changed by, {self.parameters:,} "
                f"numbers in {DELTAS}. Made by deltaw {VERSION}; `deltaw extract` makes a LoRA from it.\n"
                + self._started()
            )
        by_weight = sum(path.rpartition(".")[2] in self.rewritten for path in self.factors)
        newer = f"{by_weight} of them are named by their weights, which PEFT reads from 0.17 on.\n" if by_weight else ""
        return (
            f"# {'DoRA' if self.spec.magnitude else 'LoRA'} adapter for {base}\n\n"
            f"Rank {self.spec.rank}, alpha {self.spec.alpha:g}, {counted(len(self.factors), 'module')}, "
            f"{counted(self.parameters, 'parameter')}. Made by deltaw {VERSION}; `deltaw export` writes it for "
            "other programs, "
            f"with a card that says how it was trained.\n{newer}{self._started()}"
        )

    def _started(self) -> str:
        before = self.history.started_from
        return f"\nIts training started from {before.words()}.\n" if before else ""


def describes(spec: AdapterSpec, path: str, update: Update) -> bool:
    """Whether a reader of the spec gets the update's rank and scale right."""
    if isinstance(update, Rows | Whole):
        return True
    same = spec.full or (update.rank, update.scale) == (spec.rank_of(path), spec.scale(path))
    return update.kind == spec.kind and same


def is_run(path: Path) -> bool:
    """A folder that `deltaw train` made. Raises InputError for a name that is too long or mustn't be looked into."""
    try:
        return (path / "config.yaml").is_file()
    except OSError as error:
        raise InputError(f"{path!s:.200}: {error.strerror}") from None


def adapter_folder(path: Path) -> Path:
    """Where the adapter of a run lies; any other folder itself. Raises InputError for a run that has none yet."""
    if not is_run(path):
        return path
    if not is_adapter(path / "adapter"):
        raise InputError(f"{path} has no finished adapter yet", fix=f"finish it: {command('train', path)}")
    return path / "adapter"


def is_adapter(directory: Path) -> bool:
    """Whether a folder looks like an adapter: PEFT's layout, or full fine-tuning's."""
    return (directory / CONFIG).is_file() or (directory / DELTAS).is_file()


def _load_full(directory: Path) -> Adapter:
    tensors = load_safetensors(directory / DELTAS)
    bad = [n for n, t in tensors.items() if t.ndim != 2 or t.dtype != torch.float32 or not torch.isfinite(t).all()]
    if bad or not tensors:
        raise InputError(f"{directory / DELTAS}: not finite float32 matrices:\n{listed(bad or ['it is empty'])}")
    record = read_json(directory / RECORD, max_bytes=1_000_000)
    try:
        spec = AdapterSpec.model_validate_json(json.dumps(record.get("spec")))
    except ValidationError as error:
        raise InputError(f"{directory / RECORD}: its spec can't be read: {error.errors()[0]['msg']}") from None
    if not spec.full:
        raise InputError(f"{directory / RECORD} doesn't describe full fine-tuning, but {DELTAS} lies beside it")
    factors = {path: Dense(tensor) for path, tensor in tensors.items()}
    transposed = bool(record.get("fan_in_fan_out"))
    return Adapter(spec, factors, base_of(directory, {}), transposed, history=_history_of(directory))


def _check_folder(directory: Path) -> None:
    if (directory / WEIGHTS).is_file() and (directory / CONFIG).is_file():
        return
    if not directory.is_dir():
        raise InputError(f"{directory}: no such adapter folder")
    pickles = [p.name for p in directory.iterdir() if any(p.match(pattern) for pattern in PICKLES)]
    if pickles and not (directory / WEIGHTS).is_file():
        raise InputError(
            f"{directory / pickles[0]} is a pickle, which runs code when it is opened",
            fix="convert it to safetensors in a sandbox, or ask its author to",
        )
    missing = [name for name in (WEIGHTS, CONFIG) if not (directory / name).is_file()]
    raise InputError(f"{directory} isn't an adapter: {' and '.join(missing)} missing")


def base_of(directory: Path, config: dict[str, Any]) -> BaseId:
    """The recorded base: deltaw.json where there is one, else what PEFT's config names."""
    if (directory / RECORD).is_file():
        raw = read_json(directory / RECORD, max_bytes=1_000_000).get("base")
        known = {name: raw.get(name) for name in BaseId.__dataclass_fields__} if isinstance(raw, dict) else {}
        if not known or not all(isinstance(value, str | None) for value in known.values()):
            raise InputError(
                f"{directory / RECORD}: its base must have {', '.join(BaseId.__dataclass_fields__)} as texts"
            )
        return BaseId(**{name: value for name, value in known.items() if value is not None})
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return BaseId(name if isinstance(name, str) else "", revision if isinstance(revision, str) else None)


def _tokens_of(directory: Path) -> tuple[str, ...]:
    """The recorded texts of the trained tokens; none beside another tool's adapter."""
    spec = read_json(directory / RECORD, max_bytes=1_000_000).get("spec") if (directory / RECORD).is_file() else None
    texts = spec.get("tokens", []) if isinstance(spec, dict) else []
    return tuple(texts) if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else ()


def _history_of(directory: Path) -> History:
    """The recorded one; empty where there is none, as beside another tool's adapter."""
    if not (directory / RECORD).is_file():
        return NOTHING
    raw = read_json(directory / RECORD, max_bytes=1_000_000).get("history")
    return NOTHING if raw is None else History.of(raw, directory / RECORD)
