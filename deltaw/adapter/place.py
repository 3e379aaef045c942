"""Putting updates into a model and taking them out: layers and stand-ins in the places of a model's own modules.

Each targeted layer gets an adapted one (layer.py) in its place, on this instance alone, with an update in it (layer.py,
dora.py, full.py), and norms, attention blocks and MLPs get the kernels' stand-ins (stand_ins.py). What was done is
tried (trial.py), and all is put back where a fresh update isn't the base. The base's weights are the same objects
throughout.

Updates that come beside others add themselves to the layers that are there and their own layers to those; they are
tried on the bare model like the first, the others put aside meanwhile. Trained ones that add nothing but themselves, to
layers and stand-ins that were tried with such updates before, aren't tried again: the passes look at the places and not
at the numbers, and take seconds, which whoever asks a server for another adapter would wait.

This file knows updates by path, not adapters: `attach` (attach.py) and `merge_into` (into.py) are built on it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.adapter import stand_ins as fused
from deltaw.adapter.dora import DoRAUpdate
from deltaw.adapter.ends import Ends, face, find_ends, make_layer, maker, notes_of, places_of, tokens_of, ways_of
from deltaw.adapter.experts import AdaptedExperts, ExpertsUpdate, MovingExpertsUpdate
from deltaw.adapter.full import FullUpdate
from deltaw.adapter.init import fresh_factors, olora_factors, pissa_factors
from deltaw.adapter.layer import AdaptedLinear, LoRAUpdate, LowRankUpdate
from deltaw.adapter.layer_update import AdaptedLayer, Carried, LayerUpdate
from deltaw.adapter.moving import MovingUpdate
from deltaw.adapter.targets import Targets, explicit_targets, find_targets, targets_of
from deltaw.adapter.trial import Observed, differences, holds, observe
from deltaw.adapter.vocabulary import AdaptedVocabulary
from deltaw.adapter.whole import EndLoRA
from deltaw.base.experts import FrozenExperts, FrozenStack, expert_stacks
from deltaw.base.frozen import FrozenLinear
from deltaw.base.passing import passing_of
from deltaw.base.stand_in import StandIn
from deltaw.config import AdapterSpec
from deltaw.config.adapter import parameter_of
from deltaw.data.added import Token
from deltaw.errors import InputError, listed
from deltaw.factors import LowRank
from deltaw.updates import Update


class Placed(NamedTuple):
    """What was put on a model: the spec, whose targets name the adapted modules exactly, the updates by path, and the
    number under which the model carries them."""

    spec: AdapterSpec
    layers: dict[str, LayerUpdate]
    carried: Carried
    number: int
    targets: Targets
    notes: tuple[str, ...] = ()  # on the ends


def put_on(
    model: nn.Module,
    spec: AdapterSpec,
    trained: Mapping[str, Update] | None,
    *,
    fuse: Sequence[str],
    start: torch.Generator | None = None,
    known: bool = False,
    tokens: Sequence[Token] = (),
) -> Placed:
    """Put trained updates on `model`, by path, or fresh ones that begin where the spec says, drawn from `start` (at
    zeros without one). `known`: fresh ones of this kind train in exactly these places, so nothing is tried. `tokens`:
    those that the spec names, as the tokenizer has them. Raises InputError, the model as it was."""
    check_known(model)
    ways = find_ends(model, spec) if trained is None else ways_of(model, trained)
    tokens = _checked(spec, tokens) if trained is None else tokens_of(spec, trained, tokens)
    with _beside_others(model) as (carried, others, stand_ins):
        tried = known or (trained is not None and _tried_before(others, spec, trained))
        observed = None if tried else observe(model)
        place = _Place(model, carried, others, observed)
        try:
            body = None if trained is None else {path: one for path, one in trained.items() if path not in ways}
            targets, exact, updates = _placed(place, spec, body, tried=tried)
            place.put(others)
            for path, way in ways.items():
                updates[path] = place.add_end(path, way, maker(path, way, spec, tokens))
            _check_alone(others, place.layers)
            if tried:
                fused.put_back(model, stand_ins)
            else:
                _stand_in(model, fuse, updates, observed, to_train=trained is None)
            for path, update in updates.items():
                if trained is not None:
                    update.take_values(path, trained)
                elif isinstance(update, LowRankUpdate | DoRAUpdate) and start is not None:
                    update.start(*_start(update, spec, start))
                elif isinstance(update, ExpertsUpdate) and start is not None:
                    update.start(*_experts_start(update, spec, start))
        except BaseException:
            place.clear()
            raise
        carried.add(place.number)
    return Placed(exact, updates, carried, place.number, targets, tuple(notes_of(model, ways)))


def take_off(model: nn.Module, layers: Mapping[str, LayerUpdate], carried: Carried, number: int) -> None:
    """These updates, of that number, out of the model, and with the last ones all layers and stand-ins. One update may
    be in several layers, and one layer may have several of a number."""
    own = set(layers.values())
    carried.remove(number)
    if not carried.numbers:
        fused.remove(model, fused.installed(model))
    for path, layer in list(model.named_modules()):
        if not (isinstance(layer, AdaptedLayer) and layer.has(number)):
            continue
        if own.intersection(layer.updates[str(number)].modules()):
            layer.take_off(number)
            if not layer.updates:
                model.set_submodule(path, layer.base.module)


def check_bare(model: nn.Module) -> None:
    """Raise InputError for a model whose layers aren't its own: they are under other names, or adapted by now."""
    check_known(model)
    if any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise InputError("this model already carries an adapter", fix="detach it first")


def check_known(model: nn.Module) -> None:
    """The same, but for adapters of ours."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise InputError("this is what torch.compile made of a model", fix="give the model itself: compiled._orig_mod")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise InputError(
            "this model already carries one of PEFT's adapters",
            fix="take it out first: model = model.unload(), or load the base again",
        )


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Those in a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}


@contextmanager
def _beside_others(model: nn.Module) -> Iterator[tuple[Carried, dict[str, AdaptedLayer], dict[str, StandIn]]]:
    """The bare model for the length of a block, with what tells of its updates, and the layers and the stand-ins that
    were in it. After an error they are put in their places again."""
    others = adapted_layers(model)
    carried = next((layer.carried for layer in others.values()), None) or Carried(passing_of(model))
    stand_ins, first = fused.installed(model), carried.first
    fused.remove(model, stand_ins)
    for path, layer in others.items():
        model.set_submodule(path, layer.base.module)
    try:
        yield carried, others, stand_ins
    except BaseException:
        for path, layer in others.items():
            model.set_submodule(path, layer)
        fused.put_back(model, stand_ins)
        carried.first = first
        raise


class _Place:
    """Where an adapter goes: on the bare model, as the only one that rows take, until `carried` knows of it."""

    def __init__(
        self, model: nn.Module, carried: Carried, others: Mapping[str, AdaptedLayer], observed: Observed | None
    ) -> None:
        self.model, self.carried, self.observed, self.others = model, carried, observed, others
        self.number = carried.first = carried.free()
        self.stacks = expert_stacks(model)
        self.layers: dict[str, AdaptedLayer] = {}

    def add(self, path: str, make: Callable[[Any], LayerUpdate]) -> LayerUpdate:
        """An update of the weight there, in a layer that takes the place of the one that has it."""
        home = path.rpartition(".")[0] if path in self.stacks else path
        layer = self.layers.get(home) or self.others.get(home)
        if layer is None:
            whole = self.observed is None or home in self.observed.whole
            module = self.model.get_submodule(home)
            if path in self.stacks:
                layer = AdaptedExperts(FrozenExperts(module), self.carried, sees_all=whole)
            else:
                layer = AdaptedLinear(FrozenLinear(module), self.carried, sees_all=whole)
            layer.train(self.model.training)
        update = make(layer.face(path)).train(self.model.training)
        self.layers[home] = layer
        layer.put_on(self.number, update)
        return update

    def add_end(self, path: str, way: str, make: Callable[..., LayerUpdate]) -> LayerUpdate:
        """An update of the embedding or the head, in its place and in that of whatever is one matrix with it."""
        places = places_of(self.model, path, way)
        made: LayerUpdate | None = None
        for place in places:
            layer = self.others.get(place) or make_layer(face(self.model, place, Ends.of(self.model)), self.carried)
            layer.train(self.model.training)
            made = made or make(layer.base).train(self.model.training)
            layer.put_on(self.number, made)
            self.layers[place] = layer
        self.put({place: self.layers[place] for place in places})
        assert made is not None
        return made

    def put(self, layers: Mapping[str, AdaptedLayer]) -> None:
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


def put_again(
    model: nn.Module, layers: Mapping[str, LayerUpdate], carried: Carried, factor: float
) -> tuple[dict[str, LayerUpdate], int]:
    """Updates that the model carries once more, times `factor`: those, which share the tensors, and their number."""
    again, number = {path: update.times(factor) for path, update in layers.items()}, carried.free()
    for path, update in again.items():
        layer = model.get_submodule(update.home(path))
        assert isinstance(layer, AdaptedLayer)
        layer.put_on(number, update)
    carried.add(number)
    return again, number


def tried_before(model: nn.Module, spec: AdapterSpec, trained: Mapping[str, Update]) -> bool:
    """Whether these updates can be put on the model without trying it again: its layers and stand-ins stay."""
    others = adapted_layers(model)
    return _tried_before(others, spec, trained)


def _tried_before(others: Mapping[str, AdaptedLayer], spec: AdapterSpec, trained: Mapping[str, Update]) -> bool:
    """Whether these updates go where others are, nowhere else, and suit all stand-ins that are in place."""
    known = {path for home, layer in others.items() for path in layer.weights(home)}
    return spec.kind == LowRank.kind and not spec.dropout and known >= {parameter_of(path) for path in trained}


def _placed(
    place: _Place, spec: AdapterSpec, trained: Mapping[str, Update] | None, *, tried: bool
) -> tuple[Targets, AdapterSpec, dict[str, LayerUpdate]]:
    """What is adapted, the spec with the names of it, and the fresh updates: in their places, and each layer is what it
    stands for (`tried`: as is known)."""
    model, observed = place.model, place.observed
    unfit, idle = (_of_weights(place.stacks, of) for of in ((observed.unfit, observed.idle) if observed else ({}, {})))
    while True:
        if trained is None:
            targets = find_targets(model, spec, {**idle, **unfit})
        else:
            targets = targets_of(model, spec, trained, unfit)
        exact = targets.spec.model_copy(update={"targets": explicit_targets(model, targets.paths)})
        updates = {path: place.add(path, partial(_update, path, exact)) for path in targets.paths}
        if place.others:
            _check_all_seen({**place.others, **place.layers})
        place.put(place.layers)
        different = {} if tried else differences(model, place.layers, observed)
        if not different:
            return targets, exact, updates
        place.clear()
        unfit |= {path: why for path in targets.paths if (why := different.get(updates[path].home(path)))}


def _check_alone(others: Mapping[str, AdaptedLayer], layers: Mapping[str, AdaptedLayer]) -> None:
    """Raise InputError where an adapter that brings tokens is put beside others: each would have a vocabulary of its
    own."""
    ends = [layer for layer in (*layers.values(), *others.values()) if isinstance(layer, AdaptedVocabulary)]
    if others and any(layer.height > layer.base.out_features for layer in ends):
        raise InputError(
            "an adapter that adds tokens to the base's vocabulary can't stand beside others on one base",
            fix="use it alone, or merge it into the base first: deltaw merge",
        )


def _checked(spec: AdapterSpec, tokens: Sequence[Token]) -> Sequence[Token]:
    """The tokens of a fresh adapter. Raises ValueError where they aren't those that the spec names."""
    if tuple(token.text for token in tokens) != spec.tokens:
        raise ValueError("attach needs the tokens that the spec names as its tokenizer has them: add_tokens(…)")
    return tokens


def _check_all_seen(layers: Mapping[str, AdaptedLayer]) -> None:
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


def _of_weights(stacks: Mapping[str, FrozenStack], reasons: Mapping[str, str]) -> dict[str, str]:
    """Reasons by what can be adapted, of those by module: a module of experts has several parameters."""
    return {**reasons, **{path: reasons[home] for path in stacks if (home := path.rpartition(".")[0]) in reasons}}


def _update(path: str, spec: AdapterSpec, base: FrozenLinear | FrozenStack) -> LayerUpdate:
    """An update of the kind that the spec asks for, all zeros: ΔW = 0."""
    if isinstance(base, FrozenStack):
        experts = MovingExpertsUpdate if spec.moves_base else ExpertsUpdate
        return experts(base, spec.rank_of(path), spec.scale(path), spec.dropout)
    if spec.full:
        return FullUpdate(base)
    if spec.magnitude:
        return DoRAUpdate(base, spec.rank_of(path), spec.scale(path), spec.dropout)
    kind = MovingUpdate if spec.moves_base else LoRAUpdate
    return kind(base, spec.rank_of(path), spec.scale(path), spec.dropout)


def _start(update: LowRankUpdate | DoRAUpdate, spec: AdapterSpec, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B to begin at, as far as they need no data."""
    rank, weight = update.lora_a.shape[0], update.base.weight
    if isinstance(update, EndLoRA):
        return fresh_factors(rank, *weight.shape, generator)
    if spec.init == "pissa":
        return pissa_factors(weight.dense(), rank, update.scale)
    if spec.init == "olora":
        return olora_factors(weight.dense(), rank)
    return fresh_factors(rank, *weight.shape, generator)


def _experts_start(update: ExpertsUpdate, spec: AdapterSpec, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same for each expert, in their order."""
    rank, stack = update.lora_a.shape[1], update.stack_of_base
    e, m, n = stack.shape
    if spec.init == "pissa":
        pairs = [pissa_factors(w_MN, rank, update.scale) for w_MN in stack.w_EMN]
    elif spec.init == "olora":
        pairs = [olora_factors(w_MN, rank) for w_MN in stack.w_EMN]
    else:
        pairs = [fresh_factors(rank, m, n, generator) for _ in range(e)]
    a_ERN, b_EMR = (torch.stack(factors) for factors in zip(*pairs, strict=True))
    return a_ERN, b_EMR
