"""attach and detach: an adapter onto a model and off it again.

attach puts an adapted layer (layer.py) in the place of each targeted one, on this instance alone, with an update in it
(layer.py, dora.py, full.py), and the kernels' stand-ins in the place of norms, attention blocks and MLPs
(stand_ins.py); detach puts the very same modules back and returns what was learnt as an `Adapter`. attach tries what it
did (trial.py), and puts all back where a fresh adapter isn't the base. The base's weights are the same objects
throughout, so the model afterwards is the model before, bit for bit.

A model may carry several adapters: those of a sweep's learners, or of a server. Each further one adds its updates to
the layers that are there and its own layers to those; it is tried on the bare model like the first, the others put
aside meanwhile. Batches say by its `number` which documents take it (`Batch.updates`); those that say nothing take the
lowest number. Detaching takes its own updates off, and the layers and stand-ins with the last one.

What comes off is what any tool can load: where training began at B A ≠ 0 the update is a LoRA of rank 2R (layer.py),
and its spec says so, with alpha such that the scale stays. It is exact, so it isn't cut back to R here; `deltaw resize`
does that and says what it costs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from deltaw.adapter import stand_ins as fused
from deltaw.adapter.dora import DoRAUpdate
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.full import FullUpdate
from deltaw.adapter.init import fresh_factors, olora_factors, pissa_factors
from deltaw.adapter.layer import AdaptedLinear, Carried, LayerUpdate, LoRAUpdate
from deltaw.adapter.peft_config import missed_by_peft, rewritten_names
from deltaw.adapter.targets import Targets, explicit_targets, find_targets, said, targets_of
from deltaw.adapter.trial import Observed, differences, holds, observe
from deltaw.base.batch import Batch, passing_of
from deltaw.base.frozen import FrozenLinear
from deltaw.base.stand_in import StandIn, disabled
from deltaw.config import AdapterSpec
from deltaw.errors import InputError, listed
from deltaw.factors import Update


@dataclass(frozen=True)
class Attached:
    """An adapter on a model, and its `number` there. `spec.targets` names the adapted modules exactly, whatever group
    asked for them; `layers` are its updates of them.

    `unmatched` are weights that stay as they are although they are no embedding, head or norm; `left_out` says why of
    those among them that a group asked for.
    """

    model: nn.Module
    spec: AdapterSpec
    layers: dict[str, LayerUpdate]
    carried: Carried
    number: int = 0
    unmatched: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def stand_ins(self) -> dict[str, StandIn]:
        """The kernels' stand-ins in the model, by path. All adapters of a model share them."""
        return fused.installed(self.model)

    def taken_by(self, batch: Batch) -> Batch:
        """The batch, all of whose documents take this adapter."""
        if self.number == self.carried.first:
            return replace(batch, updates=())
        return replace(batch, updates=(self.number,) * (len(batch.starts) - 1))

    def describe(self) -> str:
        """One line for logs: which of the model's own modules the kernels stand in for."""
        return fused.describe(self.stand_ins)

    def notes(self) -> list[str]:
        """For logs: what isn't adapted, a line for each reason, then the first of the weights without one; and what of
        the adapter PEFT won't find."""
        rest = [path for path in self.unmatched if path not in self.left_out]
        first = [path + (" …" if len(rest) > 3 else "") for path in rest[:3]]
        lines = [f"not adapted: {line}" for line in said(self.left_out) + first]
        if missed := missed_by_peft(self.model, self.paths):
            lines.append(
                f"warning: when PEFT loads an adapter of this model, also one that it saved, it renames {len(missed)} "
                f"of the modules and leaves them out: {missed[0]}" + (" …" if len(missed) > 1 else "")
            )
        return lines

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that trains (A and B of each layer, say), float32."""
        return [parameter for layer in self.layers.values() for parameter in layer.trained().values()]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self.layers)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain base, run by its own code, where this adapter's rows are, for the length of a `with` block."""
        with disabled([*self.layers.values(), *self.stand_ins.values()]):
            yield

    def adapter(self, base: BaseId) -> Adapter:
        """What has been learnt so far, as a value on the CPU, its spec's init "lora"; the model keeps its adapter."""
        spec = _as_learnt(self.spec)
        factors: dict[str, Update] = {path: layer.factors().cpu() for path, layer in self.layers.items()}
        if self.spec.moves_base:  # √2 · alpha / √(2 rank) may be the next float of alpha / √rank
            factors = {path: update.of(update.tensors(), spec.scale(path)) for path, update in factors.items()}
        transposed = any(layer.base.transposed for layer in self.layers.values())
        return Adapter(spec, factors, base, transposed, rewritten_names(self.model))


def check_bare(model: nn.Module) -> None:
    """Raise InputError for a model whose layers aren't its own: they are under other names, or adapted by now."""
    check_known(model)
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise InputError("this model already carries an adapter", fix="detach it first")


def check_known(model: nn.Module) -> None:
    """The same, but for adapters of ours."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise InputError("this is what torch.compile made of a model", fix="give the model itself: compiled._orig_mod")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise InputError(
            "this model already carries an adapter of PEFT's",
            fix="take it out first: model = model.unload(), or load the base again",
        )


def attach(
    model: nn.Module,
    what: AdapterSpec | Adapter,
    *,
    generator: torch.Generator | None = None,
    fuse: Sequence[str] = fused.KINDS,
    start_later: bool = False,
) -> Attached:
    """Put a fresh adapter (from a spec, drawn from `generator`) or a trained one on `model`, in place, beside those
    that it carries.

    `fuse`: which of "norm", "attention", "mlp" the kernels may stand in for; less than all is for measuring.
    `start_later`: leave the start open, for `initialise_from_data` (init_data.py) or a checkpoint's numbers.

    Raises InputError when a target matches nothing, a rank is too high, an adapter's shapes are not this model's, or
    its layers can't take a second adapter; ValueError for a start that needs data and isn't left open.
    """
    check_known(model)
    spec = what if isinstance(what, AdapterSpec) else what.spec
    if spec.from_data and not start_later:
        raise ValueError(f"init {spec.init} starts from data: attach with start_later, then initialise_from_data")
    generator = generator or torch.Generator().manual_seed(0)
    with _beside_others(model) as (carried, others):
        observed = observe(model)
        place = _Place(model, carried, others, observed)
        try:
            targets, exact, updates = _placed(place, what, spec)
            place.put(others)
            _stand_in(model, fuse, updates, observed, to_train=isinstance(what, AdapterSpec))
            for path, update in updates.items():
                if isinstance(what, Adapter):
                    update.set_factors(what.factors[path])
                elif isinstance(update, LoRAUpdate | DoRAUpdate) and not start_later:
                    update.start(*_start(update, spec, generator))
        except BaseException:
            place.clear()
            raise
        carried.add(place.number)
    return Attached(model, exact, updates, carried, place.number, targets.unmatched, targets.left_out)


def detach(attached: Attached, base: BaseId | None = None) -> Adapter:
    """Take the adapter off its model and return it as a value on the CPU. With the last one the original layers are put
    back."""
    adapter, model = attached.adapter(base or BaseId()), attached.model
    attached.carried.remove(attached.number)
    if not attached.carried.numbers:
        fused.remove(model, attached.stand_ins)
    for path, update in attached.layers.items():
        layer = model.get_submodule(path)
        if isinstance(layer, AdaptedLinear) and layer.update(attached.number) is update:
            layer.take_off(attached.number)
            if not layer.updates:
                model.set_submodule(path, layer.base.module)
    return adapter


@contextmanager
def _beside_others(model: nn.Module) -> Iterator[tuple[Carried, dict[str, AdaptedLinear]]]:
    """The bare model for the length of a block, with what tells of its updates and the layers that were in it. After an
    error they are put in their places again."""
    others = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    carried = next((layer.carried for layer in others.values()), None) or Carried(passing_of(model))
    stand_ins, first = fused.installed(model), carried.first
    fused.remove(model, stand_ins)
    for path, layer in others.items():
        model.set_submodule(path, layer.base.module)
    try:
        yield carried, others
    except BaseException:
        for path, layer in others.items():
            model.set_submodule(path, layer)
        fused.put_back(model, stand_ins)
        carried.first = first
        raise


class _Place:
    """Where an adapter goes: on the bare model, as the only one that rows take, until `carried` knows of it."""

    def __init__(
        self, model: nn.Module, carried: Carried, others: Mapping[str, AdaptedLinear], observed: Observed | None
    ) -> None:
        self.model, self.carried, self.observed, self.others = model, carried, observed, others
        self.number = carried.first = carried.free()
        self.layers: dict[str, AdaptedLinear] = {}

    def add(self, path: str, make: Callable[[FrozenLinear], LayerUpdate]) -> LayerUpdate:
        """An update of the layer there, in a layer that takes the place of it."""
        layer = self.others.get(path)
        if layer is None:
            whole = self.observed is None or path in self.observed.whole
            layer = AdaptedLinear(FrozenLinear(self.model.get_submodule(path)), self.carried, sees_all=whole)
            layer.train(self.model.training)
        update = make(layer.base).train(self.model.training)
        self.layers[path] = layer
        layer.put_on(self.number, update)
        return update

    def put(self, layers: Mapping[str, AdaptedLinear]) -> None:
        """These layers in their places."""
        for path, layer in layers.items():
            self.model.set_submodule(path, layer)

    def clear(self) -> None:
        """The bare model again: stand-ins and layers out, the update off them."""
        fused.remove(self.model, fused.installed(self.model))
        for path, layer in {**self.others, **self.layers}.items():
            self.model.set_submodule(path, layer.base.module)
        for layer in self.layers.values():
            layer.take_off(self.number)
        self.layers = {}


def _placed(
    place: _Place, what: AdapterSpec | Adapter, spec: AdapterSpec
) -> tuple[Targets, AdapterSpec, dict[str, LayerUpdate]]:
    """What is adapted, the spec with the names of it, and the fresh updates: in their places, and each layer is what it
    stands for."""
    model, observed = place.model, place.observed
    unfit = dict(observed.unfit) if observed else {}
    idle = observed.idle if observed else {}
    while True:
        if isinstance(what, Adapter):
            targets = targets_of(model, what, unfit)
        else:
            targets = find_targets(model, spec, {**idle, **unfit})
        exact = spec.model_copy(update={"targets": explicit_targets(model, targets.paths)})
        updates = {path: place.add(path, partial(_update, path, spec)) for path in targets.paths}
        if place.others:
            _check_all_seen({**place.others, **place.layers})
        place.put(place.layers)
        different = differences(model, place.layers, observed)
        if not different:
            return targets, exact, updates
        place.clear()
        unfit |= different


def _check_all_seen(layers: Mapping[str, AdaptedLinear]) -> None:
    """Raise InputError where some of a pass's rows are handed to a layer without saying which."""
    part = [path for path, layer in layers.items() if not layer.sees_all]
    if part:
        raise InputError(
            f"this model carries an adapter, and {len(part)} adapted layers are given only some of a pass's rows (they "
            f"are experts, say), so their rows can't take different updates:\n{listed(part, 3)}",
            fix="detach the other adapter first, or leave these layers out of adapter.targets",
        )


def _stand_in(
    model: nn.Module,
    kinds: Sequence[str],
    updates: Mapping[str, LayerUpdate],
    observed: Observed | None,
    *,
    to_train: bool,
) -> None:
    """Put stand-ins in place, where the model runs with them: what they keep for the backward, it may write to.
    InputError where it doesn't run without them either."""
    stand_ins = fused.install(model, kinds)
    try:
        if holds(model, updates, observed, to_train=to_train):
            return
    except InputError:
        if not stand_ins:
            raise
    fused.remove(model, stand_ins)
    holds(model, updates, observed, to_train=to_train)


def _update(path: str, spec: AdapterSpec, base: FrozenLinear) -> LayerUpdate:
    """An update of the kind that the spec asks for, all zeros: ΔW = 0."""
    if spec.full:
        return FullUpdate(base)
    if spec.magnitude:
        return DoRAUpdate(base, spec.rank_of(path), spec.scale(path), spec.dropout)
    return LoRAUpdate(base, spec.rank_of(path), spec.scale(path), spec.dropout, moves=spec.moves_base)


def _start(update: LoRAUpdate | DoRAUpdate, spec: AdapterSpec, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B to begin at, as far as they need no data."""
    rank, weight = update.lora_a.shape[0], update.base.weight
    if spec.init == "pissa":
        return pissa_factors(weight.dense(), rank, update.scale)
    if spec.init == "olora":
        return olora_factors(weight.dense(), rank)
    return fresh_factors(rank, *weight.shape, generator)


def _as_learnt(spec: AdapterSpec) -> AdapterSpec:
    """The spec of what training under `spec` leaves: init "lora", at twice the rank where B A ≠ 0 at first."""
    wider, stronger = (2, math.sqrt(2) if spec.scaling == "rslora" else 2) if spec.moves_base else (1, 1)
    return spec.model_copy(
        update={
            "init": "lora",
            "rank": wider * spec.rank,
            "alpha": stronger * spec.alpha,
            "rank_overrides": {name: wider * rank for name, rank in spec.rank_overrides.items()},
            "alpha_overrides": {name: stronger * alpha for name, alpha in spec.alpha_overrides.items()},
        }
    )
