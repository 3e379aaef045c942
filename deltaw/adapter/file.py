"""An adapter as a value and as a folder in PEFT's layout.

    adapter_model.safetensors    base_model.model.<module path>.lora_A.weight [R, N] and .lora_B.weight [M, R], float32;
                                 for DoRA .lora_magnitude_vector [M], too
    adapter_config.json          PEFT's classic fields (peft_config.py)
    delta.safetensors            instead of both for full fine-tuning (full.py), which PEFT has no form for
    deltaw.json                  which base it was trained on: name, revision, fingerprint, chat template
    README.md                    how to use it, for people

PEFT, vLLM and the rest read the first two. deltaw.json is beside them because PEFT's config has no place for a
fingerprint, and without one an adapter on the wrong base of the right shapes answers nonsense without an error.

Loading refuses what it can't represent or can't match, naming it; a silent no-op load is the commonest complaint about
other tools. Shapes are checked against the config, and every number against NaN, before a model is touched.

Letters: R rank, N inputs, M outputs.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from deltaw.adapter.full import DELTAS, load_deltas
from deltaw.adapter.peft_config import check_config, from_spec, to_spec, weight_names
from deltaw.base.fingerprint import describe, same_base
from deltaw.base.source import PICKLES
from deltaw.config import TARGET_GROUPS, AdapterSpec
from deltaw.errors import InputError, RunError, command, listed
from deltaw.factors import Dense, DoRA, LowRank, Update
from deltaw.files.atomic import write_text_atomic
from deltaw.files.safetensors import load_safetensors, save_safetensors
from deltaw.files.strict_json import read_json
from deltaw.version import VERSION

if TYPE_CHECKING:
    from deltaw.adapter.into import MergedInto

WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "deltaw.json"
PREFIX, A, B, MAGNITUDE = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
# What PEFT may write that is no plain LoRA on a linear layer, and how to say so.
FOREIGN = {
    ".lora_embedding_A": "LoRA on an embedding",
    ".lora_embedding_B": "LoRA on an embedding",
    ".base_layer.weight": "a copy of a base layer (PEFT writes none with save_embedding_layers=False)",
    ".trainable_tokens_delta": "trained token embeddings",
    ".lora_B.bias": "a bias on B",
}


@dataclass(frozen=True)
class BaseId:
    """Which base an adapter belongs to. Empty fields are unknown (an adapter made by another tool)."""

    name: str = ""
    revision: str | None = None
    fingerprint: str = ""
    template: str = ""

    def mismatch(self, other: "BaseId") -> str | None:
        """Why an adapter of this base may not go on `other`, or None. Weights and settings count, names don't."""
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

    @property
    def parameters(self) -> int:
        return sum(update.parameters for update in self.factors.values())

    def save(self, directory: str | Path) -> Path:
        """Write PEFT's layout into `directory`, each file whole or not at all. RunError on NaN or a full disk."""
        directory = Path(directory)
        kind = Dense if self.spec.full else DoRA if self.spec.magnitude else LowRank
        for path, update in self.factors.items():
            fits = update.rank == self.spec.rank_of(path) and update.scale == self.spec.scale(path)
            if not isinstance(update, kind) or not (fits or self.spec.full):
                raise ValueError(f"{path}: rank {update.rank}, scale {update.scale} are not what the spec says")
        tensors = self._tensors()
        bad = _not_finite(tensors)
        if bad:
            raise RunError(f"the adapter holds NaN or infinity, it was not saved:\n{listed(bad)}")
        directory.mkdir(parents=True, exist_ok=True)
        if self.spec.full:
            save_safetensors(tensors, directory / DELTAS)
        else:
            save_safetensors(tensors, directory / WEIGHTS, {"format": "pt"})
            write_text_atomic(directory / CONFIG, json.dumps(self._peft_config(), indent=2) + "\n")
        record: dict[str, Any] = {"deltaw": VERSION, "base": asdict(self.base)}
        record |= {"spec": self.spec.model_dump(mode="json"), "fan_in_fan_out": self.fan_in_fan_out}
        write_text_atomic(directory / RECORD, json.dumps(record, indent=2) + "\n")
        write_text_atomic(directory / "README.md", self._card())
        return directory

    def merge_into(self, model: nn.Module) -> "MergedInto":
        """Put W + ΔW in the place of each adapted weight of a loaded model; `undo()`, or the end of a `with` block,
        puts the very same layers back. Raises InputError for what `attach` refuses, and for another base."""
        from deltaw.adapter.into import merge_into

        return merge_into(model, self)

    def _tensors(self) -> dict[str, Tensor]:
        """What the weights' file holds."""
        tensors = {}
        for path, update in self.factors.items():
            if isinstance(update, Dense):
                tensors[path] = update.delta_MN
                continue
            low = update.low if isinstance(update, DoRA) else update
            tensors |= {PREFIX + path + A: low.a_RN, PREFIX + path + B: low.b_MR}
            if isinstance(update, DoRA):
                tensors[PREFIX + path + MAGNITUDE] = update.magnitude_M
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}

    def _peft_config(self) -> dict[str, Any]:
        names = {self.spec.targets} if isinstance(self.spec.targets, str) else set(self.spec.targets)
        # A group is a word of deltaw's own: to other tools it is spelt out.
        spec = self.spec.model_copy(update={"targets": tuple(self.factors)} if names & set(TARGET_GROUPS) else {})
        return from_spec(
            spec,
            self.factors,
            self.rewritten,
            base=self.base.name,
            revision=self.base.revision,
            fan_in_fan_out=self.fan_in_fan_out,
        )

    @staticmethod
    def load(directory: str | Path) -> "Adapter":
        """Read PEFT's layout, deltaw's own or another tool's. Raises InputError that lists what is wrong."""
        directory = Path(directory)
        if (directory / DELTAS).is_file():
            return _load_full(directory)
        _check_folder(directory)
        config = read_json(directory / CONFIG, max_bytes=1_000_000, allow_nan=True)
        check_config(config, str(directory / CONFIG))
        tensors = load_safetensors(directory / WEIGHTS)
        magnitudes = {key: tensor for key, tensor in tensors.items() if key.endswith(MAGNITUDE)}
        pairs = _pair({k: tensor for k, tensor in tensors.items() if k not in magnitudes}, str(directory / WEIGHTS))
        spec = to_spec(config, pairs, str(directory / CONFIG))
        _check_shapes(pairs, spec, str(directory / WEIGHTS))
        _check_magnitudes(magnitudes, pairs, spec, directory)
        # float32 first: not every narrow type can be asked whether it is finite, and a wide one may not fit.
        bad = _not_finite({key: tensor.float() for key, tensor in tensors.items()})
        if bad:
            raise InputError(f"{directory / WEIGHTS} holds NaN or infinity:\n{listed(bad)}")
        factors: dict[str, Update] = {}
        for path, (a, b) in pairs.items():
            low = LowRank(a.float(), b.float(), spec.scale(path))
            factors[path] = DoRA(low, magnitudes[PREFIX + path + MAGNITUDE].float()) if spec.magnitude else low
        transposed = bool(config.get("fan_in_fan_out"))
        return Adapter(spec, factors, _base_of(directory, config), transposed, weight_names(config))

    def _card(self) -> str:
        """A few words; what goes out into the world gets a whole card (shipping/card.py)."""
        base = self.base.name or "unknown"
        if self.spec.full:
            return (
                f"# Full fine-tuning of {base}\n\nWhat {len(self.factors)} weights changed by, {self.parameters:,} "
                f"numbers in {DELTAS}. Made by deltaw {VERSION}; `deltaw extract` makes a LoRA of it.\n"
            )
        by_weight = sum(path.rpartition(".")[2] in self.rewritten for path in self.factors)
        newer = f"{by_weight} of them are named by their weights, which PEFT reads from 0.17 on.\n" if by_weight else ""
        return (
            f"# {'DoRA' if self.spec.magnitude else 'LoRA'} adapter for {base}\n\n"
            f"Rank {self.spec.rank}, alpha {self.spec.alpha:g}, {len(self.factors)} modules, "
            f"{self.parameters:,} parameters. Made by deltaw {VERSION}; `deltaw export` writes it for other programs, "
            f"with a card that says how it was trained.\n{newer}"
        )


def is_adapter(directory: Path) -> bool:
    """Whether a folder looks like an adapter: PEFT's layout, or full fine-tuning's."""
    return (directory / CONFIG).is_file() or (directory / DELTAS).is_file()


def _load_full(directory: Path) -> Adapter:
    factors = load_deltas(directory)
    record = read_json(directory / RECORD, max_bytes=1_000_000)
    try:
        spec = AdapterSpec.model_validate_json(json.dumps(record.get("spec")))
    except ValidationError as error:
        raise InputError(f"{directory / RECORD}: its spec is none: {error.errors()[0]['msg']}") from None
    if not spec.full:
        raise InputError(f"{directory / RECORD} describes no full fine-tuning, but {DELTAS} lies beside it")
    return Adapter(spec, factors, _base_of(directory, {}), bool(record.get("fan_in_fan_out")))


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
    gone = [name for name in (WEIGHTS, CONFIG) if not (directory / name).is_file()]
    raise InputError(f"{directory} is no adapter: {' and '.join(gone)} missing")


def _pair(tensors: Mapping[str, Tensor], source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by module path. Raises InputError for every key that is no half of such a pair."""
    found: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        suffix = next((s for s in (A, B) if key.endswith(s)), None)
        foreign = next((said for s, said in FOREIGN.items() if key.endswith(s)), None)
        if foreign:
            problems.append(f"{key!r:.120}: {foreign} isn't supported")
        elif suffix is None:
            problems.append(f"{key!r:.120} is no lora_A or lora_B; fully trained modules aren't supported")
        elif not key.startswith(PREFIX):
            problems.append(f"{key!r:.120} doesn't begin with {PREFIX!r}")
        elif tensor.ndim != 2 or not tensor.is_floating_point():
            problems.append(f"{key!r:.120} is {tensor.dtype} of shape {tuple(tensor.shape)}, not a floating matrix")
        else:
            found.setdefault(key.removeprefix(PREFIX).removesuffix(suffix), {})[suffix] = tensor
    problems += [
        f"{path!r:.120} has {' '.join(k.split('.')[1] for k in halves)} but not its other half"
        for path, halves in found.items()
        if len(halves) == 1
    ]
    if not tensors:
        raise InputError(f"{source}: holds no tensors")
    if problems:
        raise InputError(
            f"{source}: {len(problems)} of {len(tensors)} tensors don't fit:\n{listed(problems, 2)}",
            fix=f"what each place makes of it, and what mends it: {command('lint', Path(source).parent)}",
        )
    return {path: (halves[A], halves[B]) for path, halves in found.items()}


def _check_shapes(pairs: Mapping[str, tuple[Tensor, Tensor]], spec: AdapterSpec, source: str) -> None:
    problems = []
    for path, (a, b) in pairs.items():
        rank = spec.rank_of(path)
        if (a.shape[0], b.shape[1]) != (rank, rank):
            problems.append(f"{path:.120}: A is {tuple(a.shape)}, B is {tuple(b.shape)}, the config says rank {rank}")
    if problems:
        raise InputError(f"{source}: shapes and config disagree:\n{listed(problems)}")


def _check_magnitudes(
    magnitudes: Mapping[str, Tensor], pairs: Mapping[str, tuple[Tensor, Tensor]], spec: AdapterSpec, directory: Path
) -> None:
    """DoRA's vectors: one for every module where the config says so, else none."""
    wanted = {PREFIX + path + MAGNITUDE: len(b) for path, (_, b) in pairs.items()} if spec.magnitude else {}
    if magnitudes and not wanted:
        raise InputError(f"{directory / WEIGHTS} holds DoRA's magnitudes, but {CONFIG} doesn't say use_dora")
    problems = [f"{key!r:.120} is missing" for key in wanted.keys() - magnitudes]
    for key, tensor in magnitudes.items():
        if tuple(tensor.shape) != (wanted.get(key),) or not tensor.is_floating_point():
            problems.append(
                f"{key!r:.120} is {tensor.dtype} of shape {tuple(tensor.shape)}, of {wanted.get(key, 0)} rows"
            )
    if problems:
        raise InputError(
            f"{directory / CONFIG} says use_dora, but {WEIGHTS} doesn't hold a magnitude for each row:\n"
            f"{listed(sorted(problems))}"
        )


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def _base_of(directory: Path, config: dict[str, Any]) -> BaseId:
    """The recorded base: deltaw.json where there is one, else what PEFT's config names."""
    if (directory / RECORD).is_file():
        raw = read_json(directory / RECORD, max_bytes=1_000_000).get("base")
        known = {name: raw.get(name) for name in BaseId.__dataclass_fields__} if isinstance(raw, dict) else {}
        if not known or not all(isinstance(value, str | None) for value in known.values()):
            raise InputError(f"{directory / RECORD}: its base is not name, revision, fingerprint, template")
        return BaseId(**{name: value for name, value in known.items() if value is not None})
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return BaseId(name if isinstance(name, str) else "", revision if isinstance(revision, str) else None)
