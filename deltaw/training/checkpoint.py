"""Checkpoints: everything that changes, in safetensors and JSON, never a pickle.

    checkpoints/step-000100/state.json             step, data position, sums, the run's config, fingerprints of base,
                                                   data and template
                            factors.safetensors    <path>.a and <path>.b (DoRA: <path>.magnitude, too; full fine-tuning:
                                                   <path>.delta), float32; <path>.initial_a and <path>.initial_b where
                                                   an initialiser began at others than B = 0 (adapter/layer.py)
                            moments.safetensors    AdamW's first and second moment of each that trains
                            manifest.sha256        SHA-256 of the three, as `sha256sum -c` reads it

Writing. A folder under a temporary name, each file fsynced, the manifest last; then the folder is renamed and the one
above it fsynced. So what is named step-… is complete, after a kill as after a power cut, and when `save_checkpoint` has
returned it stays. Removing goes the other way: first the name, then the files.

Reading. The manifest is worked out again from the files and must be the same to the byte: whichever bit of whichever
file flipped, it shows, and no part of a damaged file is ever parsed. A broken one is reported and the one before it is
taken.

Rotation is by step, not by the clock. What stays: the newest `keep`, and the best one of each of them.

What is not here needs no saving: the learning rate and dropout's randomness are pure functions of the step, and the
order of the data is one of (seed, epoch). There is no other randomness in a run.
"""

import contextlib
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.data.loader import LoaderState
from deltaw.errors import DeltawError, InputError, RunError, listed
from deltaw.files.atomic import fsync, remove, replacing_folder, sweep, temporary_name, write_text_atomic
from deltaw.files.output import gib
from deltaw.files.safetensors import load_safetensors, save_safetensors
from deltaw.files.strict_json import read_json
from deltaw.show.progress import Display
from deltaw.version import VERSION

SINCE = {"no_better": 0}  # fields of a state that checkpoints of before don't have
FACTORS, MOMENTS, STATE, MANIFEST = "factors.safetensors", "moments.safetensors", "state.json", "manifest.sha256"


@dataclass
class TrainState:
    """What a run has become after `step` updates, without factors and moments. All of it is JSON."""

    step: int = 0
    epoch: int = 0  # the position in the data: the next step is number `step_in_epoch` of `epoch`
    step_in_epoch: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    evaluated: int = 0  # the step of the last evaluation
    best_step: int = 0
    best_loss: float | None = None  # or minus the reward
    no_better: int = 0  # evaluations in a row since the best one
    skipped: int = 0  # steps that weren't applied
    not_finite: int = 0  # of those, because a loss or a gradient wasn't a number
    in_a_row: int = 0  # skipped steps since the last update
    recent: list[float] = field(default_factory=list)  # losses of the last updates, to find spikes
    metrics_lines: int = 0  # of metrics.jsonl
    fingerprints: dict[str, str] = field(default_factory=dict)  # of base, data and template
    config: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)  # what the last bits depend on
    code: dict[str, str] = field(default_factory=dict)  # sha256 of the file of each reward that is the user's own

    @property
    def position(self) -> LoaderState:
        """Where the next step's data begins."""
        return LoaderState(self.epoch, self.step_in_epoch)

    @property
    def tokens_per_second(self) -> float:
        """0 where no time has passed that the clock could tell."""
        return self.tokens / self.seconds if self.seconds else 0.0


def conditions(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What the last bits of a sum depend on besides its terms."""
    here = {"device": str(device), "threads": torch.get_num_threads(), "processes": processes}
    return here | {"torch": torch.__version__, "deltaw": VERSION}


class Saved(NamedTuple):
    """What a checkpoint holds: the state, and tensors by name."""

    state: TrainState
    factors: dict[str, Tensor]
    moments: dict[str, Tensor]


def save_checkpoint(folder: Path, saved: Saved, keep: int) -> Path:
    """Write step-NNNNNN, then rotate. Once this has returned, the checkpoint survives a power cut.

    Raises RunError when the disk refuses, and then everything is as it was before.
    """
    state, factors, moments = saved
    final = checkpoint_at(folder, state.step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        _check_room(folder, [*factors.values(), *moments.values()])
        # A broken checkpoint has this name; the run resumed from the one before it.
        with replacing_folder(final, fix="") as temporary:
            save_safetensors(factors, temporary / FACTORS)
            save_safetensors(moments, temporary / MOMENTS)
            write_text_atomic(temporary / STATE, json.dumps(asdict(state), indent=2))
            write_text_atomic(temporary / MANIFEST, _manifest(temporary))
        fsync(folder.parent)
    except (OSError, RunError) as error:
        reason = error.what if isinstance(error, RunError) else f"{final}: {error}"
        raise RunError(reason, fix="nothing was lost; free some space, then resume the run") from None
    _rotate(folder, keep)
    return final


def checkpoint_at(folder: Path, step: int) -> Path:
    """The name of the checkpoint after `step` updates."""
    return folder / f"step-{step:06}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first, by step and not by the clock."""
    folders = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def latest_checkpoint(folder: Path, display: Display) -> Saved | None:
    """The newest intact checkpoint, or None when there is none at all.

    Raises InputError when there are some and all are broken: never a silent fresh start.
    """
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(path)
        except DeltawError as error:
            problems.append(error.what)
            display.say(f"checkpoint skipped: {error.what}")
    if problems:
        raise InputError(
            f"{folder}: all {len(problems)} checkpoints are broken:\n{listed(problems)}",
            fix="put an intact one back, or start over with --replace",
        )
    return None


def read_checkpoint(path: Path) -> Saved:
    """A checkpoint, proven intact. Raises an InputError that names what is missing or damaged."""
    _check_manifest(path)
    raw = {**SINCE, **read_json(path / STATE)}
    if raw.keys() != asdict(TrainState()).keys():
        raise InputError(f"{path / STATE} is of another version of deltaw: {sorted(raw)}"[:300])
    return Saved(TrainState(**raw), load_safetensors(path / FACTORS), load_safetensors(path / MOMENTS))


def is_whole(path: Path) -> bool:
    """Whether this checkpoint exists, with every file as it was written."""
    with contextlib.suppress(DeltawError):
        _check_manifest(path)
        return True
    return False


def _manifest(folder: Path) -> str:
    """What manifest.sha256 must say about the files that are here now. Raises OSError where one can't be read."""
    lines = []
    for name in (STATE, FACTORS, MOMENTS):
        with (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def _check_manifest(path: Path) -> None:
    gone = [name for name in (STATE, FACTORS, MOMENTS, MANIFEST) if not (path / name).is_file()]
    if gone:
        raise InputError(f"{path}: {', '.join(gone)} missing")
    try:
        written, computed = (path / MANIFEST).read_bytes(), _manifest(path).encode()
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error}") from None
    if written != computed:
        bad = [line[66:].decode() for line in computed.splitlines() if line not in written.splitlines()]
        problem = (
            f"{', '.join(bad)} whose SHA-256 isn't the one in {MANIFEST}"
            if bad
            else f"{MANIFEST} lists more than the files"
        )
        raise InputError(f"{path} is damaged: {problem}")


def _check_room(folder: Path, tensors: list[Tensor]) -> None:
    """Raise RunError, before a byte is written, where the disk is too full anyway."""
    needed, free = sum(tensor.nbytes for tensor in tensors), shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(f"{folder}: the disk is full: a checkpoint needs {gib(needed)}, but only {gib(free)} are free")


def _rotate(folder: Path, keep: int) -> None:
    """Remove every checkpoint that is neither one of the newest `keep` nor the best of one of them."""
    checkpoints = list_checkpoints(folder)
    needed = checkpoints[-keep:]
    try:
        needed += [checkpoint_at(folder, read_json(path / STATE)["best_step"]) for path in needed]
    except (InputError, KeyError):
        return  # one of them is damaged, so none is superfluous
    for old in checkpoints:
        if old not in needed:
            with contextlib.suppress(OSError):
                remove(old.rename(temporary_name(old)))
