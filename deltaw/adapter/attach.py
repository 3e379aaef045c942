"""attach and detach: an adapter onto a model and off it again.

attach puts an adapted layer (layer.py, dora.py, full.py) in the place of each targeted one, on this instance alone, and
the kernels' stand-ins in the place of norms, attention blocks and MLPs (fused.py); detach puts the very same modules
back and returns what was learnt as an `Adapter`. attach tries what it did (trial.py), and puts all back where a fresh
adapter isn't the base. The base's weights are the same objects throughout, so the model afterwards is the model before,
bit for bit.

What comes off is what any tool can load: where training began at B A ≠ 0 the update is a LoRA of rank 2R (layer.py),
and its spec says so, with alpha such that the scale stays. It is exact, so it isn't cut back to R here; `deltaw resize`
does that and says what it costs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.adapter import stand_ins as fused
from deltaw.adapter.dora import DoRALinear
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.full import FullLinear
from deltaw.adapter.init import fresh_factors, olora_factors, pissa_factors
from deltaw.adapter.layer import AdaptedLinear, LoRALinear
from deltaw.adapter.peft_config import missed_by_peft, rewritten_names
from deltaw.adapter.targets import Targets, explicit_targets, find_targets, said, targets_of
from deltaw.adapter.trial import Observed, differences, holds, observe
from deltaw.base.frozen import FrozenLinear
from deltaw.base.stand_in import StandIn, disabled
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.factors import Update


@dataclass(frozen=True)
class Attached:
    """A model with an adapter in it. `spec.targets` names the adapted modules exactly, whatever group asked for them.

    `unmatched` are weights that stay as they are although they are no embedding, head or norm; `left_out` says why of
    those among them that a group asked for.
    """

    model: nn.Module
    spec: AdapterSpec
    layers: dict[str, AdaptedLinear]
    unmatched: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    stand_ins: dict[str, StandIn] = field(default_factory=dict)

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
        """The plain base, run by its own code, for the length of a `with` block."""
        with disabled([*self.layers.values(), *self.stand_ins.values()]):
            yield

    def adapter(self, base: BaseId) -> Adapter:
        """What has been learnt so far, as a value on the CPU, its spec's init "lora"; the model keeps its adapter."""
        spec = _as_learnt(self.spec)
        factors: dict[str, Update] = {path: layer.factors().cpu() for path, layer in self.layers.items()}
        if self.spec.moves_base:  # √2 · alpha / √(2 rank) may be the next float of alpha / √rank
            factors = {path: update.of(update.tensors(), spec.scale(path)) for path, update in factors.items()}
        transposed = any(isinstance(layer.base.module, Conv1D) for layer in self.layers.values())
        return Adapter(spec, factors, base, transposed, rewritten_names(self.model))


def check_bare(model: nn.Module) -> None:
    """Raise InputError for a model whose layers aren't its own: they are under other names, or adapted by now."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise InputError("this is what torch.compile made of a model", fix="give the model itself: compiled._orig_mod")
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise InputError("this model already carries an adapter", fix="detach it first")
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
    """Put a fresh adapter (from a spec, drawn from `generator`) or a trained one on `model`, in place.

    `fuse`: which of "norm", "attention", "mlp" the kernels may stand in for; less than all is for measuring.
    `start_later`: leave the start open, for `initialise_from_data` (init_data.py) or a checkpoint's numbers.

    Raises InputError when a target matches nothing, a rank is too high, an adapter's shapes are not this model's, or
    the model already carries an adapter; ValueError for a start that needs data and isn't left open.
    """
    check_bare(model)
    spec = what if isinstance(what, AdapterSpec) else what.spec
    if spec.from_data and not start_later:
        raise ValueError(f"init {spec.init} starts from data: attach with start_later, then initialise_from_data")
    observed = observe(model)
    targets, spec, layers = _placed(model, what, spec, observed)
    generator = generator or torch.Generator().manual_seed(0)
    stand_ins: dict[str, StandIn] = {}
    try:
        stand_ins = _stood_in(model, fuse, layers, observed, to_train=isinstance(what, AdapterSpec))
        for path, layer in layers.items():
            if isinstance(what, Adapter):
                layer.set_factors(what.factors[path])
            elif isinstance(layer, LoRALinear | DoRALinear) and not start_later:
                layer.start(*_start(layer, spec, generator))
    except BaseException:
        fused.remove(model, stand_ins)
        _take_off(model, layers)
        raise
    return Attached(model, spec, layers, targets.unmatched, targets.left_out, stand_ins)


def detach(attached: Attached, base: BaseId | None = None) -> Adapter:
    """Take the adapter off its model, putting the original layers back, and return it as a value on the CPU."""
    adapter = attached.adapter(base or BaseId())
    fused.remove(attached.model, attached.stand_ins)
    _take_off(attached.model, attached.layers)
    return adapter


def _placed(
    model: nn.Module, what: AdapterSpec | Adapter, spec: AdapterSpec, observed: Observed | None
) -> tuple[Targets, AdapterSpec, dict[str, AdaptedLinear]]:
    """The layers to adapt, replaced by fresh ones that are what they stand for, and the spec with their names.

    Raises InputError with the model as it was.
    """
    unfit = dict(observed.unfit) if observed else {}
    idle = observed.idle if observed else {}
    while True:
        if isinstance(what, Adapter):
            targets = targets_of(model, what, unfit)
        else:
            targets = find_targets(model, spec, {**idle, **unfit})
        exact = spec.model_copy(update={"targets": explicit_targets(model, targets.paths)})
        layers = {path: _layer(FrozenLinear(model.get_submodule(path)), path, spec) for path in targets.paths}
        try:
            for path, layer in layers.items():
                layer.train(model.training)
                model.set_submodule(path, layer)
            different = differences(model, layers, observed)
        except BaseException:
            _take_off(model, layers)
            raise
        if not different:
            return targets, exact, layers
        _take_off(model, layers)
        unfit |= different


def _stood_in(
    model: nn.Module,
    kinds: Sequence[str],
    layers: Mapping[str, AdaptedLinear],
    observed: Observed | None,
    *,
    to_train: bool,
) -> dict[str, StandIn]:
    """The stand-ins, where the model runs with them: what they keep for the backward, it may write to. InputError, and
    none in place, where it doesn't run without them either."""
    stand_ins = fused.install(model, kinds)
    try:
        if holds(model, layers, observed, to_train=to_train):
            return stand_ins
    except InputError:
        if not stand_ins:
            raise
    except BaseException:
        fused.remove(model, stand_ins)
        raise
    fused.remove(model, stand_ins)
    holds(model, layers, observed, to_train=to_train)
    return {}


def _take_off(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> None:
    for path, layer in layers.items():
        model.set_submodule(path, layer.base.module)


def _layer(base: FrozenLinear, path: str, spec: AdapterSpec) -> AdaptedLinear:
    """A layer of the kind that the spec asks for, all zeros: ΔW = 0."""
    if spec.full:
        return FullLinear(base)
    if spec.magnitude:
        return DoRALinear(base, spec.rank_of(path), spec.scale(path), spec.dropout)
    return LoRALinear(base, spec.rank_of(path), spec.scale(path), spec.dropout, moves=spec.moves_base)


def _start(layer: LoRALinear | DoRALinear, spec: AdapterSpec, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B to begin at, as far as they need no data."""
    rank, w_MN = layer.lora_a.shape[0], layer.base.weight_MN
    if spec.init == "pissa":
        return pissa_factors(w_MN, rank, layer.scale)
    if spec.init == "olora":
        return olora_factors(w_MN, rank)
    return fresh_factors(rank, len(w_MN), w_MN.shape[1], generator)


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
