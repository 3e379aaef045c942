"""Merging an adapter into a loaded model, and taking it out again: `adapter.merge_into(model)`.

Each adapted layer is replaced by a new one of the same kind, whose weight is W + ΔW rounded once (`fuse`, layer.py).
The model then runs by its own code, with nothing of deltaw in it, and `save_pretrained` writes a plain model. `undo`
puts the very same layers back, so that the base is what it was, bit for bit: subtracting ΔW again would leave its
rounding. The price is a second copy of the adapted weights while both are there.

    with adapter.merge_into(model):
        ...

What can't be merged is what `attach` refuses, and an adapter of another base. For a model on disk there is `deltaw
merge`, which needs no memory for it and takes updates of the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import nn

from deltaw.adapter.layer_update import AdaptedLayer
from deltaw.adapter.place import adapted_layers, check_bare, put_on, take_off
from deltaw.base.fingerprint import describe, same_base
from deltaw.base.load import fingerprint as fingerprint_of
from deltaw.config import AdapterSpec
from deltaw.errors import InputError, listed
from deltaw.updates import Update


@dataclass(frozen=True, eq=False)
class MergedInto:
    """A model with an adapter in its weights. `originals`: the layers that were replaced, by path."""

    model: nn.Module
    originals: Mapping[str, nn.Module]
    layers: Mapping[str, nn.Module]
    _undone: list[bool] = field(default_factory=list, repr=False)

    def undo(self) -> nn.Module:
        """Make the model what it was. Raises InputError where a merged layer is no longer in its place."""
        if self._undone:
            return self.model
        moved = [path for path, layer in self.layers.items() if self.model.get_submodule(path) is not layer]
        if moved:
            raise InputError(
                f"{len(moved)} layers were replaced after the merge:\n{listed(moved)}",
                fix="undo what was done last first: detach, or that merge's own undo()",
            )
        for path, module in self.originals.items():
            self.model.set_submodule(path, module)
        self._undone.append(True)
        return self.model

    def __repr__(self) -> str:
        state = "undone" if self._undone else "undo() takes it out"
        return f"MergedInto({len(self.layers)} layers of a {type(self.model).__name__}; {state})"

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.undo()
        except InputError as failed:
            if error is None:
                raise
            error.add_note(f"the merged adapter is still in the model: {failed}")  # what went wrong first is raised


def merge_into(
    model: nn.Module, spec: AdapterSpec, updates: Mapping[str, Update], *, base: str = "", fingerprint: str = ""
) -> MergedInto:
    """Merge in place; `base`, `fingerprint`: the name and the mark of what the updates were trained on, "" for any.

    Raises InputError, the model as it was: what `attach` refuses, another base, numbers that are too large for the
    weights' type.
    """
    check_bare(model)
    own = fingerprint_of(model)
    if fingerprint and not same_base(fingerprint, own):
        raise InputError(
            f"the adapter was trained on {base or 'another base'} ({describe(fingerprint)}), this model is another one "
            f"({describe(own)})",
            fix="load its own base; an adapter with base=BaseId() goes on any model of its shapes",
        )
    placed = put_on(model, spec, updates, fuse=())
    layers, homes = adapted_layers(model), {update.home(path) for path, update in placed.layers.items()}
    adapted = {home: layer for home, layer in layers.items() if home in homes}
    try:
        merged = _fused(adapted, placed.number)
    finally:
        originals = {path: layer.base.module for path, layer in adapted.items()}
        take_off(model, placed.layers, placed.carried, placed.number)
    for path, module in merged.items():
        model.set_submodule(path, module)
    return MergedInto(model, originals, merged)


def _fused(layers: Mapping[str, AdaptedLayer], number: int) -> dict[str, nn.Module]:
    merged = {path: layer.fused(number) for path, layer in layers.items()}
    broken = [path for path, layer in merged.items() if not all(torch.isfinite(p).all() for p in layer.parameters())]
    if broken:
        raise InputError(
            f"merged, {len(broken)} weights hold numbers too large for their type, or NaN:\n{listed(broken)}",
            fix="load the model in bfloat16 or float32",
        )
    return merged
