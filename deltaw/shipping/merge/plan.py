"""The plan of a merged model: what becomes of every tensor of the base's files, and its numbers.

    changed    W + ΔW, the module's update on the weight that the file holds
    copied     as it is: no update goes there, or the model has no place for it
    untied     written on its own: the file left it out since the config ties it to another (the head to the embedding,
               as a rule), and an update goes to one of the two alone

Everything that follows from the base's headers and the adapter's shapes is settled before a weight is read: each update
lands in exactly one tensor, and one that lands nowhere is an error. The rules:

    names      a tensor is the parameter that transformers would load it into (base/names.py)
    layout     values are those of the file's own layout: GPT-2's Conv1D stores [N, M], so W and ΔW are turned
    tokens     rows of tied parameters stay tied: the tensor that the file holds takes them; tokens that were added make
               it longer (`more`), and the config says how many words there are
    tied       where any other update lands on a tied parameter nothing is tied any more: `unties`. The config has to
               say so (`tie_word_embeddings`), and whatever was left out of the files is written
    twice      a tied parameter that the file holds although it could leave it out is a tensor like any other
    experts    an expert's matrix in a file takes its rows of that expert's update; a tensor of all experts takes all
               of theirs (stack.py)
    made       a parameter that transformers otherwise puts together from several tensors, or cuts out of one, takes no
               update: what is stored isn't what was adapted

Sums are formed in float32 (float64 for a float64 base), so that whoever writes them rounds once.

Letters: M outputs, N inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.adapter.checkpoints import Checkpoint, Stored
from deltaw.adapter.ends import Ends, face, ways_of
from deltaw.adapter.file import Adapter
from deltaw.adapter.targets import targets_of
from deltaw.base.experts import expert_stacks
from deltaw.base.names import places
from deltaw.config.adapter import expert_of, parameter_of
from deltaw.errors import InputError, listed
from deltaw.factors import LowRank
from deltaw.files.safetensors import read_tensor
from deltaw.files.shards import shards
from deltaw.kernels.weight import DenseWeight
from deltaw.replaced import Rows
from deltaw.shipping.merge.stack import Stacked, by_parameter
from deltaw.shipping.trained import Trained
from deltaw.updates import Update

Fate = Literal["changed", "copied", "untied"]
FLOATS = ("F64", "F32", "F16", "BF16")  # types whose numbers can take an update


@dataclass(frozen=True)
class Planned:
    """A tensor of the merged model. `file`: the base's file, whose namesake holds it afterwards; `source`: the name of
    its numbers there, another one where it is untied. `dtype`: the base's, as its header says it ("BF16"). `parameter`:
    the model's own name, None for what the model has no place for; `part`: this is one of several tensors that
    transformers makes it from, or holds several of them."""

    name: str
    file: Path
    source: str
    shape: tuple[int, ...]
    dtype: str
    parameter: str | None
    fate: Fate
    module: str | None = None  # whose update it takes
    rows: tuple[int, int] | None = None  # which rows of it, where not all
    transposed: bool = False  # stored as [N, M]
    more: int = 0  # rows behind those that are stored, of tokens that were added
    part: bool = False


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Every tensor of the merged model, in the order of the base's files. `unties`: what was tied isn't afterwards."""

    tensors: tuple[Planned, ...]
    adapter: Adapter
    skeleton: nn.Module
    unties: bool = False

    @property
    def words(self) -> int | None:
        """How many the merged model knows, where that is more than the base does."""
        return next((planned.shape[0] for planned in self.tensors if planned.more), None)

    @cached_property
    def by_file(self) -> Mapping[Path, tuple[Planned, ...]]:
        files = dict.fromkeys(planned.file for planned in self.tensors)
        return {file: tuple(p for p in self.tensors if p.file == file) for file in files}

    @cached_property
    def by_parameter(self) -> Mapping[str, Planned]:
        """What is a whole parameter (or buffer), by the model's own names."""
        return {planned.parameter: planned for planned in self.tensors if planned.parameter and not planned.part}

    @cached_property
    def weights(self) -> frozenset[str]:
        """The model's parameters by its own names: what has a type of the user's choice and may not be NaN."""
        return frozenset(name for name, _ in self.skeleton.named_parameters(remove_duplicate=False))

    @property
    def transposed(self) -> bool:
        """Whether the linear layers of this base store [N, M]."""
        return any(planned.transposed for planned in self.tensors)

    def update(self, planned: Planned) -> Update | Stacked | None:
        """What is added to it."""
        if planned.module is None:
            return None
        update = self.adapter.factors.get(planned.module)
        if update is None:
            return Stacked(tuple(self.experts[planned.module]), expert_stacks(self.skeleton)[planned.module].turned)
        return update if planned.rows is None else update.rows(*planned.rows)

    @cached_property
    def experts(self) -> Mapping[str, Sequence[LowRank]]:
        """The updates of experts by the parameter of all."""
        return by_parameter(self.adapter.factors)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Whose updates land somewhere, by the names that the tensors have for them."""
        return tuple(dict.fromkeys(planned.module for planned in self.tensors if planned.module is not None))

    def value(self, planned: Planned) -> Tensor:
        """The tensor of the merged model, in the file's layout: the sum in float32, or the stored numbers as they are.

        Raises InputError for NaN or infinity in a weight that takes an update.
        """
        stored, update = read_tensor(planned.file, planned.source), self.update(planned)
        if update is None:
            return stored
        wide = stored.to(torch.promote_types(stored.dtype, torch.float32))
        if not torch.isfinite(wide).all():
            raise not_finite(planned)
        w_MN = (
            wide.T if planned.transposed else nn.functional.pad(wide, (0, 0, 0, planned.more)) if planned.more else wide
        )
        total_MN = w_MN + update.relative_to(DenseWeight(w_MN)).dense().view(w_MN.shape)
        return total_MN.T.contiguous() if planned.transposed else total_MN


def plan_merge(trained: Trained) -> MergePlan:
    """What becomes of each tensor of the base. Reads headers only.

    Raises InputError for an adapter that doesn't fit the model, and for updates that land in no tensor of its files.
    """
    base, adapter = trained.base, trained.adapter
    skeleton = trained.base_files.skeleton
    _check_targets(skeleton, adapter, trained.name)
    checkpoint = trained.base_files.checkpoint
    ties = _ties(skeleton)
    updated, groups = _updated(adapter, checkpoint), _token_rows(adapter, ties)
    updated |= {other: updated[name] for name, group in groups.items() for other in group}
    parts = {name: whole for whole, names in checkpoint.converted.items() for name in names}
    shared = {other for group in groups.values() for other in group}
    tied = {name for name in updated if name in ties and name not in shared}
    landing = [name for name in updated if name not in shared or checkpoint.find(name)]
    problems = [why for name in landing if (why := _nowhere(name, skeleton, checkpoint))]
    problems += [f"{name}: not in the files" for name, group in groups.items() if not set(group).intersection(landing)]
    if problems:
        raise InputError(
            f"{trained.name}: {len(problems)} of {len(updated)} updates have no tensor of {base.name} to land in:\n"
            f"{listed(problems, 2)}",
            fix="merge on a loaded model instead: adapter.merge_into(model), then model.save_pretrained",
        )

    def planned(own: str, name: str, stored: Stored, fate: Fate) -> Planned:
        path, rows = updated.get(own, (None, None))
        turned = own.endswith(".weight") and path is not None and _is_turned(skeleton, path)
        whole = parts.get(own)
        known = whole or (own if own in checkpoint.places else None)
        update = adapter.factors.get(path or "")
        more = update.height(stored.shape[0]) - stored.shape[0] if isinstance(update, Rows) else 0
        shape = (stored.shape[0] + more, *stored.shape[1:]) if more else stored.shape
        place = (stored.file, stored.name, shape, stored.dtype)
        return Planned(name, *place, known, fate, path, rows, turned, more, whole is not None)

    tensors = [
        planned(own, stored.name, stored, "changed" if own in updated else "copied")
        for own, stored in checkpoint.stored.items()
    ]
    if tied:  # then nothing may be left out any more, whoever it was tied to
        left_out = [name for name in ties if name not in checkpoint.stored]
        tensors += [planned(name, name, _partner(ties[name], checkpoint), "untied") for name in left_out]
        _check_names(skeleton, left_out)
    files = shards(base.directory)
    if len(checkpoint.stored) < sum(map(len, files.values())):
        raise InputError(f"{base.name}: its files hold a parameter under several names", fix="download the base again")
    order = {file: number for number, file in enumerate(files)}
    return MergePlan(tuple(sorted(tensors, key=lambda p: order[p.file])), adapter, skeleton, bool(tied))


def not_finite(planned: Planned) -> InputError:
    """The error for a base whose numbers are broken."""
    return InputError(f"{planned.file}: {planned.source} holds NaN or infinity", fix="download the base again")


def _check_targets(skeleton: nn.Module, adapter: Adapter, name: str) -> None:
    """Raise InputError unless each update has its layer, of its shape: as `attach` does, but full fine-tuning and DoRA
    may have changed the head."""
    ends = Ends.of(skeleton)
    if body := ends.body(adapter.factors):
        targets_of(skeleton, adapter.spec, body)
    update = adapter.factors.get(ends.head or "")
    if update is None or update.kind not in ("full", "dora"):
        ways_of(skeleton, adapter.factors)
        return
    layer = face(skeleton, ends.head or "", ends)
    if update.shape != (layer.out_features, layer.in_features):
        raise InputError(
            f"{name}: {ends.head}: update is {update.shape}, the layer {(layer.out_features, layer.in_features)}"
        )


def _updated(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """Whose update lands in a tensor, and which rows of it, by the model's name; an expert's by the file's."""
    updated: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for path, update in adapter.factors.items():
        number, whole = expert_of(path), parameter_of(path)
        if number is None:
            updated[f"{path}.weight"] = (path, None)
            continue
        stored = [name for name in checkpoint.converted.get(whole, ()) if name in checkpoint.slots]
        if not stored:
            updated[whole] = (whole, None)
        for name in stored:
            expert, part, parts = checkpoint.slots[name]
            if expert == number:
                rows = update.shape[0] // parts
                updated[name] = (path, None if parts == 1 else (part * rows, (part + 1) * rows))
    return updated


def _token_rows(adapter: Adapter, ties: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The parameters that trained tokens are rows of, each with those that are one with it."""
    names = [f"{path}.weight" for path, update in adapter.factors.items() if isinstance(update, Rows)]
    return {name: ties.get(name, [name]) for name in names}


def _is_turned(skeleton: nn.Module, path: str) -> bool:
    """Whether a module stores [N, M]; experts' matrices know themselves how they lie."""
    return expert_of(path) is None and isinstance(skeleton.get_submodule(path), Conv1D)


def _nowhere(own: str, skeleton: nn.Module, checkpoint: Checkpoint) -> str | None:
    """Why an update of a parameter has no tensor to land in, or None."""
    stored = checkpoint.find(own)
    if stored is None and own in checkpoint.converted:
        return f"{own}: transformers makes it from {listed(checkpoint.converted[own], 1).strip()}"
    if stored is None:
        return f"{own}: not in the files"
    if stored.dtype not in FLOATS:
        return f"{own}: stored as {stored.dtype}, which takes no update"
    if own in checkpoint.slots:
        return None
    shape = tuple(skeleton.get_parameter(own).shape)
    return None if stored.shape == shape else f"{own}: {stored.shape} in the files, {shape} in the model"


def _ties(skeleton: nn.Module) -> dict[str, list[str]]:
    """The parameters that are one with others, each with all of those."""
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _partner(group: list[str], checkpoint: Checkpoint) -> Stored:
    """Where the numbers of tied parameters are."""
    stored = next((checkpoint.stored[name] for name in group if name in checkpoint.stored), None)
    if stored is None:
        raise InputError(f"{checkpoint.folder}: holds none of {', '.join(group):.200}", fix="download the base again")
    return stored


def _check_names(skeleton: nn.Module, names: list[str]) -> None:
    """Raise InputError unless transformers would take a tensor of a parameter's own name for that parameter."""
    wrong = [name for name, place in places(skeleton, names).items() if place.name != name or place.converted]
    if wrong:
        raise InputError(
            f"{wrong[0]} is tied to another weight in this base, and transformers renames it when it loads a file",
            fix="merge on a loaded model instead: adapter.merge_into(model), then model.save_pretrained",
        )


def counts(plan: MergePlan) -> Iterator[tuple[Fate, int]]:
    """How many tensors have each fate."""
    fates: tuple[Fate, ...] = ("changed", "copied", "untied")
    for fate in fates:
        yield fate, sum(planned.fate == fate for planned in plan.tensors)
