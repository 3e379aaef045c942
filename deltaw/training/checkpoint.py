"""Checkpoints: everything that changes, in safetensors and JSON, never a pickle.

    checkpoints/step-000100/state.json             step, data position, sums, fingerprints, SHA-256 of the others
                            factors.safetensors    <path>.a and <path>.b (DoRA: <path>.magnitude, too; full fine-tuning:
                                                   <path>.delta), float32; <path>.initial_a and <path>.initial_b where
                                                   an initialiser began at others than B = 0 (adapter/layer.py)
                            moments.safetensors    AdamW's first and second moment of each that trains

A checkpoint is written under a temporary name, each file fsynced, and the folder renamed last, so a folder named
step-… is complete. Reading checks the hashes all the same; a broken one is reported and the one before it is taken.

What is not here needs no saving: the learning rate and dropout's randomness are pure functions of the step, and the
order of the data is one of (seed, epoch).
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.adapter.inject import Attached
from deltaw.base.weights import fsync, load_safetensors, read_json, save_safetensors, write_text_atomic
from deltaw.errors import DeltawError, InputError, RunError
from deltaw.progress import Display

FACTORS, MOMENTS, STATE = "factors.safetensors", "moments.safetensors", "state.json"


@dataclass
class TrainState:
    """What a run has become after `step` updates, factors and moments aside. All of it is JSON."""

    step: int = 0
    epoch: int = 0  # where the data stands: the next step is number `step_in_epoch` of `epoch`
    step_in_epoch: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)  # of base, data and template


class Saved(NamedTuple):
    """A checkpoint as read: the state, and tensors by name."""

    state: TrainState
    factors: dict[str, Tensor]
    moments: dict[str, Tensor]


def save_checkpoint(
    folder: Path, state: TrainState, attached: Attached, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write step-NNNNNN and remove all but the newest `keep`. Raises RunError when the disk refuses."""
    final = folder / f"step-{state.step:06}"
    temporary = folder / f".{final.name}.tmp"
    for stale in folder.glob(".step-*.tmp"):
        shutil.rmtree(stale)
    try:
        temporary.mkdir(parents=True)
        save_safetensors(_factors(attached), temporary / FACTORS)
        save_safetensors(_moments(attached, optimizer), temporary / MOMENTS)
        hashes = {name: _sha256(temporary / name) for name in (FACTORS, MOMENTS)}
        write_text_atomic(temporary / STATE, json.dumps({"state": asdict(state), "sha256": hashes}, indent=2))
        if final.exists():  # a rerun of the same step after resuming from before it
            shutil.rmtree(final)
        temporary.rename(final)
        fsync(folder)
    except OSError as error:
        raise RunError(f"{final}: could not be saved: {error}", fix="free space, then resume the run") from None
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)  # room is wanted, training is not to stop for it
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first, by step and not by the clock."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def latest_checkpoint(folder: Path, display: Display) -> Saved | None:
    """The newest checkpoint that is whole, or None when there is none at all.

    Raises InputError when there are some and all are broken: never a silent fresh start.
    """
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return _read(path)
        except DeltawError as error:
            problems.append(error.what)
            display.say(f"checkpoint skipped: {error.what}")
    if problems:
        raise InputError(f"{folder}: all {len(problems)} checkpoints are broken", fix="start over with --replace")
    return None


def put_back(attached: Attached, optimizer: torch.optim.Optimizer, saved: Saved) -> None:
    """Put a checkpoint's numbers back. Raises InputError when they are not this adapter's."""
    wanted = _factors(attached)
    if {n: t.shape for n, t in saved.factors.items()} != {n: t.shape for n, t in wanted.items()}:
        raise InputError("the checkpoint's factors are not this adapter's: its rank or targets were changed")
    with torch.no_grad():
        for name, constant in _constants(attached).items():
            constant.copy_(saved.factors[name])
        for name, parameter in _parameters(attached).items():
            parameter.copy_(saved.factors[name])
            optimizer.state[parameter] = {
                # fused AdamW keeps its count on the parameter's device
                "step": torch.tensor(float(saved.state.step), device=parameter.device),
                "exp_avg": saved.moments[name + ".first"].to(parameter.device),
                "exp_avg_sq": saved.moments[name + ".second"].to(parameter.device),
            }


def _parameters(attached: Attached) -> dict[str, torch.nn.Parameter]:
    layers = attached.layers.items()
    return {f"{path}.{name}": value for path, layer in layers for name, value in layer.trained().items()}


def _constants(attached: Attached) -> dict[str, Tensor]:
    layers = attached.layers.items()
    return {f"{path}.{name}": value for path, layer in layers for name, value in layer.constants().items()}


def _factors(attached: Attached) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in _parameters(attached).items()} | _constants(attached)


def _moments(attached: Attached, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = {}
    for name, parameter in _parameters(attached).items():
        state = optimizer.state[parameter]
        moments[name + ".first"], moments[name + ".second"] = state["exp_avg"], state["exp_avg_sq"]
    return moments


def _read(path: Path) -> Saved:
    raw = read_json(path / STATE)
    hashes, fields = raw.get("sha256"), raw.get("state")
    if not isinstance(hashes, dict) or not isinstance(fields, dict) or fields.keys() != asdict(TrainState()).keys():
        raise InputError(f"{path / STATE}: not a checkpoint's state")
    for name in (FACTORS, MOMENTS):
        if not (path / name).is_file():
            raise InputError(f"{path / name} is missing")
        if _sha256(path / name) != hashes.get(name):
            raise InputError(f"{path / name} is damaged: its SHA-256 is not the one written beside it")
    return Saved(TrainState(**fields), load_safetensors(path / FACTORS), load_safetensors(path / MOMENTS))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
