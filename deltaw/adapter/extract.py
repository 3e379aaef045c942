"""A LoRA out of full fine-tuning: the nearest low-rank update to what each weight changed by.

    Δ = W_tuned − W_base ≈ B A,   ‖Δ − B A‖_F the least there is at that rank

One pair of weights is in memory at a time. With an energy to keep, the whole spectrum is needed and the full SVD is
taken. With a rank well below min(M, N) a randomised one does (linalg/svd.py). Its error is measured, not assumed, and
the power steps are doubled until that makes the error less than 0.3 % smaller. What is left is then of that size (over
the spectra of the tests the error is within 0.05 % of the optimum's; the tests ask for 1 %). Where eight steps don't
suffice the full SVD decides.

What a LoRA on linear layers can't say is not dropped in silence: `Report.unadapted` lists every other parameter that
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

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.adapter.algebra import Loss, adapter_of, check_size, relative_error, wanted_rank
from deltaw.adapter.checkpoints import Change, Checkpoint, changes, compared
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.peft_config import rewritten_names
from deltaw.adapter.targets import explicit_targets, linear_paths
from deltaw.base.linear_weights import LinearWeights
from deltaw.base.load import open_base, open_skeleton
from deltaw.base.source import Source, check_folder, find_base
from deltaw.config import AdapterSpec
from deltaw.data.render import Renderer, open_tokenizer
from deltaw.errors import InputError, listed
from deltaw.factors import Dense, LowRank
from deltaw.linalg.rounding import NONE, Noise, noise
from deltaw.linalg.svd import OVERSAMPLE, Approximation, randomised_svd, truncated_svd
from deltaw.show.progress import QUIET, Display

SMALL = 8  # times (rank + oversample) must fit in min(M, N) for the randomised SVD to be the cheaper one
POWERS = (2, 4, 8)
SETTLED = 3e-3  # a relative gain in error below which more power steps are not worth it
ROUNDING = 1e-6  # of ‖Δ‖: float32 products tell no smaller error apart
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
        said = [str(change) for change in self.unadapted]
        said += [f"config.json: {name} differs" for name in self.config]
        parts = [f"not in the adapter, which covers linear layers only:\n{listed(said)}"] if said else []
        if self.rounding > NOTABLE:
            parts.append(
                f"{self.rounding:.1%} of the change (‖Δ‖²) is what rounding the tuned weights alone would give"
            )
        return "\n".join(parts) or None


def extract(
    tuned: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    paths: Iterable[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    display: Display = QUIET,
) -> tuple[dict[str, LowRank], list[Loss]]:
    """The nearest updates by module path, scale 1, float32; a module that didn't change is left out.

    `tuned`, `base`: weights [M, N] by path, asked for once each. At `rank` (or min(M, N) where that is less), or at
    the least rank that keeps the share `energy` of ‖Δ‖²_F. Raises InputError for shapes that differ.
    """
    return _nearest_all(paths, lambda path: _difference(path, tuned[path], base[path]), rank, energy, display)[:2]


def extract_adapter(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None, display: Display = QUIET
) -> tuple[Adapter, list[Loss]]:
    """A LoRA out of an adapter that holds full fine-tuning. Raises InputError if it doesn't, or holds only zeros."""
    deltas = {path: update.delta_MN for path, update in adapter.factors.items() if isinstance(update, Dense)}
    if not adapter.spec.full:
        raise InputError("this adapter is a LoRA already", fix="make it smaller with resize")
    _check_room(rank, [tuple(delta.shape) for delta in deltas.values()])
    factors, losses, _ = _nearest_all(deltas, lambda path: (deltas[path], NONE), rank, energy, display)
    if not factors:
        raise InputError("the adapter changes nothing: there is nothing to extract")
    return adapter_of(factors, adapter), losses


def extract_folders(
    tuned: Path,
    base: Source | str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    display: Display = QUIET,
) -> tuple[Adapter, Report]:
    """A LoRA out of a fine-tuned model's folder and the base it came from, and what it can't hold.

    The base is opened once for its fingerprint, in bfloat16. Raises InputError where the two are not one architecture
    with the same tensors, and where no linear layer differs.
    """
    check_size(rank, energy)
    source = base if isinstance(base, Source) else find_base(str(base))
    kinds = [check_folder(folder)["model_type"] for folder in (tuned, source.directory)]
    if kinds[0] != kinds[1]:
        raise InputError(f"{tuned} and {source.name} are different architectures: {' and '.join(kinds)}")
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
    here, there = LinearWeights(tuned, transposed), LinearWeights(source.directory, transposed)
    factors, losses, share = _nearest_all(
        paths, lambda path: _difference(path, here[path], there[path]), rank, energy, display
    )
    report = Report(losses, unadapted, config, share)
    if not factors:
        raise InputError(f"{tuned}: no linear layer differs from {source.name}, nothing to extract", report.warning())
    spec = AdapterSpec(targets=explicit_targets(skeleton, tuple(factors)))
    return adapter_of(factors, Adapter(spec, factors, identity, transposed, rewritten_names(skeleton))), report


def nearest(
    delta_MN: Tensor, *, rank: int | None = None, energy: float | None = None, edge: float = 0.0
) -> tuple[LowRank, float]:
    """The nearest update of a rank (or of the least rank for an energy), scale 1, and its relative error.

    `edge`: the largest singular value that rounding alone gives; an energy below 1 is not filled up with smaller ones.
    """
    if rank is not None and SMALL * (rank + OVERSAMPLE) <= min(delta_MN.shape):
        found = _randomised(delta_MN, rank)
        size = float(torch.linalg.matrix_norm(delta_MN))
        return _update(found.u_MK, found.s_K, found.vt_KN), float(found.error_frobenius) / (size or 1)
    u_MK, s_K, vt_KN = Dense(delta_MN).svd()
    k = wanted_rank(s_K, rank, energy)
    if energy is not None and energy < 1:
        k = max(1, min(k, int((s_K > edge).sum())))
    return _update(u_MK[:, :k], s_K[:k], vt_KN[:k]), relative_error(s_K.double(), k)


def _update(u_MK: Tensor, s_K: Tensor, vt_KN: Tensor) -> LowRank:
    root_K = s_K.sqrt()
    return LowRank(root_K[:, None] * vt_KN, u_MK * root_K)


def _randomised(delta_MN: Tensor, rank: int) -> Approximation:
    """With as many power steps as the spectrum needs, or the full SVD."""
    floor = ROUNDING * float(torch.linalg.matrix_norm(delta_MN))
    best = float("inf")
    for power in POWERS:
        found = randomised_svd(delta_MN, rank, power=power, generator=torch.Generator(delta_MN.device).manual_seed(0))
        error = float(found.error_frobenius)
        if error <= floor or error >= (1 - SETTLED) * best:
            return found
        best = error
    return truncated_svd(delta_MN, rank)


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


def _difference(path: str, tuned_MN: Tensor, base_MN: Tensor) -> tuple[Tensor, Noise]:
    """Δ and what the rounding of the tuned weights does to it."""
    if tuned_MN.shape != base_MN.shape:
        raise InputError(f"{path}: {tuple(tuned_MN.shape)} in the tuned model, {tuple(base_MN.shape)} in the base")
    return tuned_MN.float() - base_MN.float(), noise(tuned_MN)


def _check_room(rank: int | None, shapes: Iterable[tuple[int, ...]]) -> None:
    most = max((min(shape) for shape in shapes), default=0)
    if rank is not None and rank > most:
        raise InputError(f"rank {rank} is more than any of the modules can have, {most}")


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
