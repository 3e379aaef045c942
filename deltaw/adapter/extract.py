"""Extracting a LoRA from full fine-tuning: the low-rank update nearest to each weight's change.

    Δ = W_tuned − W_base ≈ B A,   ‖Δ − B A‖_F the least possible at that rank

One pair of weights is in memory at a time; `nearest` (cut.py) makes the factors.

What a LoRA on linear layers can't express isn't silently dropped: `Report.unadapted` lists every other parameter that
differs (norms, embeddings, the head, biases) with its relative change, `Report.config` the settings that do
(checkpoints.py).

A tuned model that was saved in bfloat16 differs from its base in every direction: by its rounding. With an energy to
keep, directions that rounding alone would give (linalg/rounding.py) are not kept to reach it, or 99 % of a change of
rank 4 would have rank 148; with an energy of 1 all are. `Report.rounding` is the share of ‖Δ‖² that they come to.

Letters: M outputs, N inputs, K singular values.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.adapter.algebra import adapter_of
from deltaw.adapter.checkpoints import Change, Checkpoint, changes, compared
from deltaw.adapter.cut import Loss, check_size, nearest
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.peft_config import rewritten_names
from deltaw.adapter.targets import explicit_targets, linear_paths
from deltaw.base.linear_weights import LinearWeights
from deltaw.base.load import open_base, open_skeleton
from deltaw.base.source import Source, check_folder, find_base
from deltaw.config import AdapterSpec
from deltaw.data.render import Renderer, open_tokenizer
from deltaw.errors import InputError, listed
from deltaw.factors import LowRank
from deltaw.kernels.weight import Weight
from deltaw.linalg.rounding import NONE, Noise, noise
from deltaw.show.progress import QUIET, Display
from deltaw.show.text import percent

NOTABLE = 0.01  # of ‖Δ‖²: a smaller share of rounding isn't worth a line
HARMLESS = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}  # settings of no effect


@dataclass(frozen=True)
class Report:
    """What `extract_folders` lost (a `Loss` per module) and left out. `rounding`: the share of the modules' ‖Δ‖²
    that the rounding of the tuned weights alone would give."""

    losses: list[Loss]
    unadapted: list[Change]
    config: list[str]
    rounding: float = 0.0

    def warning(self) -> str | None:
        """What the adapter lacks, in a few lines, or None if it is all there."""
        lacking = [str(change) for change in self.unadapted]
        lacking += [f"config.json: {name} differs" for name in self.config]
        parts = [f"not in the adapter, which covers linear layers only:\n{listed(lacking)}"] if lacking else []
        if self.rounding > NOTABLE:
            parts.append(
                f"{percent(self.rounding, 1)} of the change (‖Δ‖²) is what rounding the tuned weights alone would give"
            )
        return "\n".join(parts) or None


def extract(
    tuned: Mapping[str, Weight],
    base: Mapping[str, Weight],
    paths: Iterable[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    display: Display = QUIET,
) -> tuple[dict[str, LowRank], list[Loss]]:
    """The nearest updates by module path, scale 1, float32; a module that didn't change is left out.

    `tuned`, `base`: weights by path, asked for once each. At `rank` (or min(M, N) where that is less), or at
    the least rank that keeps the share `energy` of ‖Δ‖²_F. Raises InputError for shapes that differ.
    """
    return _nearest_all(paths, lambda path: _difference(path, tuned[path], base[path]), rank, energy, display)[:2]


def extract_adapter(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None, display: Display = QUIET
) -> tuple[Adapter, list[Loss]]:
    """A LoRA from an adapter that holds full fine-tuning. Raises InputError if it doesn't, or holds only zeros."""
    if not adapter.spec.full:
        raise InputError("this adapter is already a LoRA", fix="make it smaller with resize")
    deltas = {path: update.plain().dense() for path, update in adapter.factors.items()}
    _check_room(rank, [tuple(delta.shape) for delta in deltas.values()])
    factors, losses, _ = _nearest_all(deltas, lambda path: (deltas[path], NONE), rank, energy, display)
    if not factors:
        raise InputError("the adapter changes nothing, so there is nothing to extract")
    return adapter_of(factors, adapter), losses


def extract_folders(
    tuned: Path,
    base: Source | str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    display: Display = QUIET,
) -> tuple[Adapter, Report]:
    """A LoRA from a fine-tuned model's folder and the base it came from, and what it can't hold.

    The base is opened once for its fingerprint, in bfloat16. Raises InputError where the two are not one architecture
    with the same tensors, and where no linear layer differs.
    """
    check_size(rank, energy)
    source = base if isinstance(base, Source) else find_base(str(base))
    kinds = [check_folder(folder)["model_type"] for folder in (tuned, source.directory)]
    if kinds[0] != kinds[1]:
        raise InputError(f"{tuned} and {source.name} have different architectures: {' and '.join(kinds)}")
    skeleton = open_skeleton(source)
    tuned_skeleton = open_skeleton(Source(str(tuned), tuned))
    config = _settings(tuned_skeleton, skeleton)
    new, old = Checkpoint(tuned, tuned_skeleton), Checkpoint(source.directory, skeleton)
    names = compared(new, old)
    paths = [path for path in linear_paths(skeleton) if f"{path}.weight" in names]
    linear = {f"{path}.weight" for path in paths}
    _check_room(rank, [new.stored[name].shape for name in linear])
    unadapted = list(changes(new, old, names, linear))
    identity = BaseId(
        source.public_name,
        source.revision,
        open_base(source, dtype="bfloat16", device="cpu").fingerprint,
        _template(tuned, source.directory),
    )
    transposed = any(isinstance(skeleton.get_submodule(path), Conv1D) for path in paths)
    tuned_weights, base_weights = LinearWeights(tuned, transposed), LinearWeights(source.directory, transposed)
    factors, losses, share = _nearest_all(
        paths, lambda path: _difference(path, tuned_weights[path], base_weights[path]), rank, energy, display
    )
    report = Report(losses, unadapted, config, share)
    if not factors:
        raise InputError(
            f"{tuned}: no linear layer differs from {source.name}, so there is nothing to extract", report.warning()
        )
    spec = AdapterSpec(targets=explicit_targets(skeleton, tuple(factors)))
    return adapter_of(factors, Adapter(spec, factors, identity, transposed, rewritten_names(skeleton))), report


def _nearest_all(
    paths: Iterable[str],
    delta: Callable[[str], tuple[Tensor, Noise]],
    rank: int | None,
    energy: float | None,
    display: Display,
) -> tuple[dict[str, LowRank], list[Loss], float]:
    """The updates, what each lost, and the share of ‖Δ‖² that rounding alone gives."""
    check_size(rank, energy)
    rounded_off = moved = 0.0
    factors: dict[str, LowRank] = {}
    losses: list[Loss] = []
    paths = tuple(paths)
    with display.task("extracting", len(paths)) as progress:
        for done, path in enumerate(paths, 1):
            delta_MN, rounded = delta(path)
            if delta_MN.any():
                most = min(delta_MN.shape)
                size = None if rank is None else min(rank, most)
                factors[path], error = nearest(delta_MN, rank=size, energy=energy, edge=rounded.edge)
                rounded_off, moved = rounded_off + rounded.energy, moved + float(delta_MN.double().square().sum())
                losses.append(Loss(path, most, factors[path].rank, error))
            progress(done)
    return factors, losses, min(1.0, rounded_off / moved) if moved else 0.0


def _difference(path: str, tuned: Weight, base: Weight) -> tuple[Tensor, Noise]:
    """Δ and what the rounding of the tuned weights does to it."""
    if tuned.shape != base.shape:
        raise InputError(f"{path}: {tuned.shape} in the tuned model, {base.shape} in the base")
    tuned_MN = tuned.dense()
    return tuned_MN.float() - base.dense().float(), noise(tuned_MN)


def _check_room(rank: int | None, shapes: Iterable[tuple[int, ...]]) -> None:
    most = max((min(shape) for shape in shapes), default=0)
    if rank is not None and rank > most:
        raise InputError(f"rank {rank} is more than any of the modules can have ({most})")


def _settings(tuned: nn.Module, base: nn.Module) -> list[str]:
    """The settings that differ and may change what the model computes, defaults filled in."""
    new, old = (json.loads(model.config.to_json_string(use_diff=False)) for model in (tuned, base))  # type: ignore
    return [name for name in sorted((new.keys() | old.keys()) - HARMLESS) if new.get(name) != old.get(name)]


def _template(*folders: Path) -> str:
    """The fingerprint of the chat template in the first folder that has a usable tokenizer: what the model was tuned
    under. (Some tokenizer classes make an empty one of a folder without its files.)"""
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            with contextlib.suppress(InputError):
                return Renderer(open_tokenizer(folder)).template_fingerprint
    return ""
