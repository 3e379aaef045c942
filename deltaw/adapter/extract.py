"""A LoRA out of full fine-tuning: the nearest low-rank update to what each weight changed by.

    Δ = W_tuned − W_base ≈ B A,   ‖Δ − B A‖_F the least there is at that rank

One pair of weights is in memory at a time. With an energy to keep, the whole spectrum is needed and the full SVD is
taken. With a rank well below min(M, N) a randomised one does (linalg/svd.py). Its error is measured, not assumed, and
the power steps are doubled until that makes the error less than 0.3 % smaller. What is left is then of that size (over
the spectra of the tests the error is within 0.05 % of the optimum's; the tests ask for 1 %). Where eight steps don't
suffice the full SVD decides.

What a LoRA on linear layers can't say is not dropped in silence: `Report.unadapted` lists every other parameter that
differs (norms, embeddings, the head, biases) with its relative change, `Report.config` the settings that do.

Two folders are compared by the names that the model itself gives its parameters, since a checkpoint may lack the
leading part (a bare GPT-2: `h.0.…` for `transformer.h.0.…`), and a tied head may be written or not.

Letters: M outputs, N inputs, K singular values.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.adapter.algebra import Loss, adapter_of, check_size, relative_error, wanted_rank
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.peft_config import rewritten_names
from deltaw.adapter.spec import explicit_targets, linear_paths
from deltaw.base.linear_weights import HEADER_BYTES, TENSORS, LinearWeights
from deltaw.base.load import open_base, open_skeleton
from deltaw.base.source import Source, check_folder, find_base
from deltaw.base.weights import read_header, read_tensor, shards
from deltaw.config import AdapterSpec
from deltaw.data.render import Renderer, open_tokenizer
from deltaw.errors import InputError, listed
from deltaw.factors import Dense, LowRank
from deltaw.linalg.svd import OVERSAMPLE, Approximation, randomised_svd, truncated_svd

Progress = Callable[[int, int], None]  # (done, of how many)

SMALL = 8  # times (rank + oversample) must fit in min(M, N) for the randomised SVD to be the cheaper one
POWERS = (2, 4, 8)
SETTLED = 3e-3  # a relative gain in error below which more power steps are not worth it
ROUNDING = 1e-6  # of ‖Δ‖: float32 products tell no smaller error apart
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that old checkpoints hold
HARMLESS = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}  # settings of no effect


@dataclass(frozen=True)
class Change:
    """A parameter that differs but is not in the adapter, and ‖tuned − base‖_F / ‖base‖_F."""

    name: str
    relative: float


@dataclass(frozen=True)
class Report:
    """What `extract_folders` lost (a `Loss` a module) and what it left out."""

    losses: list[Loss]
    unadapted: list[Change]
    config: list[str]

    def warning(self) -> str | None:
        """What the adapter lacks, in a few lines, or None if it is all there."""
        said = [f"{change.name} changed by {change.relative:.2%}" for change in self.unadapted]
        said += [f"config.json: {name} differs" for name in self.config]
        return f"not in the adapter, which covers linear layers only:\n{listed(said)}" if said else None


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    name: str
    shape: tuple[int, ...]


def extract(
    tuned: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    paths: Iterable[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, LowRank], list[Loss]]:
    """The nearest updates by module path, scale 1, float32; a module that didn't change is left out.

    `tuned`, `base`: weights [M, N] by path, asked for once each. At `rank` (or min(M, N) where that is less), or at
    the least rank that keeps the share `energy` of ‖Δ‖²_F. Raises InputError for shapes that differ.
    """
    return _nearest_all(paths, lambda path: _difference(path, tuned[path], base[path]), rank, energy, progress)


def extract_adapter(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None, progress: Progress | None = None
) -> tuple[Adapter, list[Loss]]:
    """A LoRA out of an adapter that holds full fine-tuning. Raises InputError if it doesn't, or holds only zeros."""
    deltas = {path: update.delta_MN for path, update in adapter.factors.items() if isinstance(update, Dense)}
    if not adapter.spec.full:
        raise InputError("this adapter is a LoRA already", fix="make it smaller with resize")
    _check_room(rank, [tuple(delta.shape) for delta in deltas.values()])
    factors, losses = _nearest_all(deltas, deltas.__getitem__, rank, energy, progress)
    if not factors:
        raise InputError("the adapter changes nothing: there is nothing to extract")
    return adapter_of(factors, adapter), losses


def extract_folders(
    tuned: Path,
    base: Source | str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    progress: Progress | None = None,
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
    config = _settings(open_skeleton(Source(str(tuned), tuned)), skeleton)
    new, old = (_parameters(folder, skeleton) for folder in (tuned, source.directory))
    _check_same(tuned, new, source.directory, old)
    paths = [path for path in linear_paths(skeleton) if f"{path}.weight" in new]
    linear = {f"{path}.weight" for path in paths}
    _check_room(rank, [new[name].shape for name in linear])
    unadapted = [change for name in new if name not in linear and (change := _change(name, new[name], old[name]))]
    identity = BaseId(
        source.public_name,
        source.revision,
        open_base(source, dtype="bfloat16", device="cpu").fingerprint,
        _template(tuned, source.directory),
    )
    transposed = any(isinstance(skeleton.get_submodule(path), Conv1D) for path in paths)
    here, there = LinearWeights(tuned, transposed), LinearWeights(source.directory, transposed)
    factors, losses = extract(here, there, paths, rank=rank, energy=energy, progress=progress)
    report = Report(losses, unadapted, config)
    if not factors:
        raise InputError(f"{tuned}: no linear layer differs from {source.name}, nothing to extract", report.warning())
    spec = AdapterSpec(targets=explicit_targets(skeleton, tuple(factors)))
    return adapter_of(factors, Adapter(spec, factors, identity, transposed, rewritten_names(skeleton))), report


def nearest(delta_MN: Tensor, *, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float]:
    """The nearest update of a rank (or of the least rank for an energy), scale 1, and its relative error."""
    if rank is not None and SMALL * (rank + OVERSAMPLE) <= min(delta_MN.shape):
        found = _randomised(delta_MN, rank)
        size = float(torch.linalg.matrix_norm(delta_MN))
        return _update(found.u_MK, found.s_K, found.vt_KN), float(found.error_frobenius) / (size or 1)
    u_MK, s_K, vt_KN = Dense(delta_MN).svd()
    k = wanted_rank(s_K, rank, energy)
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
    delta: Callable[[str], Tensor],
    rank: int | None,
    energy: float | None,
    progress: Progress | None,
) -> tuple[dict[str, LowRank], list[Loss]]:
    check_size(rank, energy)
    factors: dict[str, LowRank] = {}
    losses: list[Loss] = []
    paths = tuple(paths)
    for done, path in enumerate(paths, 1):
        delta_MN = delta(path)
        if delta_MN.any():
            most = min(delta_MN.shape)
            factors[path], error = nearest(delta_MN, rank=None if rank is None else min(rank, most), energy=energy)
            losses.append(Loss(path, most, factors[path].rank, error))
        if progress:
            progress(done, len(paths))
    return factors, losses


def _difference(path: str, tuned_MN: Tensor, base_MN: Tensor) -> Tensor:
    if tuned_MN.shape != base_MN.shape:
        raise InputError(f"{path}: {tuple(tuned_MN.shape)} in the tuned model, {tuple(base_MN.shape)} in the base")
    return tuned_MN.float() - base_MN.float()


def _check_room(rank: int | None, shapes: Iterable[tuple[int, ...]]) -> None:
    most = max((min(shape) for shape in shapes), default=0)
    if rank is not None and rank > most:
        raise InputError(f"rank {rank} is more than any of the modules can have, {most}")


def _parameters(folder: Path, skeleton: nn.Module) -> dict[str, Stored]:
    """The folder's tensors, by the model's names for its parameters where it has one; a tied one once."""
    names = {name for name, _ in skeleton.named_parameters()}
    tied = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)} - names
    prefix = str(getattr(skeleton, "base_model_prefix", ""))
    found = {}
    for file, stored in shards(folder).items():
        shapes = read_header(file, max_header_bytes=HEADER_BYTES, max_tensors=TENSORS).shapes
        for name in stored:
            own = next((c for c in (name, f"{prefix}.{name}", name.partition(".")[2]) if c in names), name)
            if own not in tied and not own.endswith(BUFFERS):
                found[own] = Stored(file, name, shapes[name])
    return found


def _check_same(tuned: Path, new: Mapping[str, Stored], base: Path, old: Mapping[str, Stored]) -> None:
    problems = [f"{name}: not in {base}" for name in new if name not in old]
    problems += [f"{name}: not in {tuned}" for name in old if name not in new]
    problems += [
        f"{name}: {new[name].shape} and {stored.shape}"
        for name, stored in old.items()
        if name in new and new[name].shape != stored.shape
    ]
    if problems:
        raise InputError(f"{tuned} was not made from {base}, {len(problems)} tensors don't fit:\n{listed(problems)}")


def _change(name: str, new: Stored, old: Stored) -> Change | None:
    """How far a parameter moved, or None."""
    was, now = (read_tensor(stored.file, stored.name).float() for stored in (old, new))
    moved, size = float((now - was).norm()), float(was.norm())
    return Change(name, moved / size if size else float("inf")) if moved else None


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
