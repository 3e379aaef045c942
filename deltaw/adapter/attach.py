"""attach and detach: putting an adapter on a model and taking it off again.

attach puts updates into the model (place.py) and says what is there (`Attached`); detach puts the very same modules
back and returns what was learnt as an `Adapter`. The base's weights are the same objects throughout, so the model
afterwards is the model before, bit for bit.

A model may carry several adapters: those of a sweep's learners, or of a server. Batches say by its `number` which
documents take it (`Batch.updates`); those that say nothing take the lowest number. Detaching takes its own updates off,
and the layers and stand-ins with the last one.

What comes off can be loaded by any tool: where training began at B A ≠ 0 the update is a LoRA of rank 2R (layer.py),
and its spec says so, with alpha such that the scale stays. It is exact, so it isn't cut back to R here; `deltaw resize`
does that and says what it costs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from deltaw.adapter import stand_ins as fused
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.layer_update import AdaptedLayer, Carried, LayerUpdate
from deltaw.adapter.peft_config import missed_by_peft, rewritten_names
from deltaw.adapter.place import put_again, put_on, take_off, tried_before
from deltaw.adapter.targets import lines_of
from deltaw.base.batch import Batch
from deltaw.base.frozen import FrozenEmbedding
from deltaw.base.stand_in import StandIn, disabled
from deltaw.config import AdapterSpec
from deltaw.data.added import Token
from deltaw.show.text import counted


@dataclass(frozen=True, repr=False)
class Attached:
    """An adapter on a model, and its `number` there. `spec.targets` names the adapted modules exactly, whatever group
    asked for them; `layers` are its updates of them.

    `unmatched` are weights that stay as they are although they aren't an embedding, a head or a norm; `left_out` says
    why of those among them that a group asked for. `asked`: the spec of a fresh one as it was given.
    """

    model: nn.Module
    spec: AdapterSpec
    layers: dict[str, LayerUpdate]
    carried: Carried
    number: int = 0
    unmatched: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    asked: AdapterSpec | None = None
    ends: tuple[str, ...] = ()  # what trains of the embedding and the head, in words

    def __repr__(self) -> str:
        return f"Attached({self.spec!r}, {counted(len(self.layers), 'module')} of a {type(self.model).__name__})"

    @property
    def stand_ins(self) -> dict[str, StandIn]:
        """The kernels' stand-ins in the model, by path. All adapters of a model share them."""
        return fused.installed(self.model)

    def taken_by(self, batch: Batch) -> Batch:
        """The batch, all of whose documents take this adapter."""
        if self.number == self.carried.first:
            return replace(batch, updates=())
        return replace(batch, updates=(self.number,) * batch.examples)

    def describe(self) -> str:
        """One line for logs: which of the model's own modules the kernels stand in for."""
        return fused.describe(self.stand_ins)

    def notes(self) -> list[str]:
        """For logs: what isn't adapted, a line for each reason, then the first of the weights without one; and what of
        the adapter PEFT won't find."""
        rest = [path for path in self.unmatched if path not in self.left_out]
        first = [path + (" …" if len(rest) > 3 else "") for path in rest[:3]]
        lines = [f"trained beside linear layers: {line}" for line in self.ends]
        lines += [f"not adapted: {line}" for line in lines_of(self.left_out) + first]
        if missed := missed_by_peft(self.model, self.paths):
            lines.append(
                "warning: when PEFT loads an adapter of this model, even one that it saved itself, it renames "
                f"{len(missed)} of the modules and leaves them out: {missed[0]}" + (" …" if len(missed) > 1 else "")
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

    def trains_as(self, spec: AdapterSpec) -> bool:
        """Whether a fresh adapter of that spec would stand in the same places and be computed in the same way."""
        if self.asked is None:
            return False
        mine, its = (
            (one.kind, one.moves_base, bool(one.dropout), one.targets, one.rank, one.rank_overrides, one.expert_rank)
            for one in (self.asked, spec)
        )
        return mine == its and (self.asked.tokens, self.asked.also) == (spec.tokens, spec.also)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Inside, whoever simply runs the model has this adapter on it, whatever others it carries."""
        with self.carried.leading(self.number):
            yield

    def adapter(self, base: BaseId) -> Adapter:
        """What has been learnt so far, as a value on the CPU, its spec's init "lora"; the model keeps its adapter."""
        spec = _as_learnt(self.spec)
        values = (layer.values(path) for path, layer in self.layers.items())
        factors = {path: update.cpu() for some in values for path, update in some.items()}
        if self.spec.moves_base:  # √2 · alpha / √(2 rank) may be the next float of alpha / √rank
            scales = {path: spec.scale(path) if update.kind == spec.kind else 1.0 for path, update in factors.items()}
            factors = {path: update.of(update.tensors(), scales[path]) for path, update in factors.items()}
        transposed = any(layer.base.transposed for layer in self.layers.values())
        words = frozenset(path for path, layer in self.layers.items() if isinstance(layer.base, FrozenEmbedding))
        return Adapter(spec, factors, base, transposed, rewritten_names(self.model), embeddings=words)


def attach(
    model: nn.Module,
    what: AdapterSpec | Adapter,
    *,
    generator: torch.Generator | None = None,
    fuse: Sequence[str] = fused.KINDS,
    start_later: bool = False,
    like: Sequence[Attached] = (),
    tokens: Sequence[Token] = (),
) -> Attached:
    """Put a fresh adapter (from a spec, drawn from `generator`) or a trained one on `model`, in place, beside those
    that it carries.

    `fuse`: which of "norm", "attention", "mlp" the kernels may stand in for; less than all is for measuring.
    `start_later`: leave the start open, for `initialise_from_data` (init_data.py) or a checkpoint's numbers. `like`:
    fresh ones that train on this model; where this one is to go to the same places in the same way as one of them, the
    model isn't tried again. `tokens`: those of `spec.tokens`, as the tokenizer has them (data/added.py).

    Raises InputError when a target matches nothing, a rank is too high, an adapter's shapes are not this model's, or
    its layers can't take a second adapter; ValueError for a start that needs data and isn't left open.
    """
    spec, trained = (what.spec, what.factors) if isinstance(what, Adapter) else (what, None)
    if start_later:
        generator = None
    elif spec.from_data:
        raise ValueError(f"init {spec.init} starts from data: attach with start_later, then initialise_from_data")
    elif spec.start is not None:
        raise ValueError(f"from: {spec.start} is for a run to open: attach the adapter that is there, Adapter.load(…)")
    else:
        generator = generator or torch.Generator().manual_seed(0)
    same = next((other for other in like if trained is None and other.trains_as(spec)), None)
    if same is not None:
        spec = spec.model_copy(update={"targets": same.spec.targets})
        placed = put_on(model, spec, None, fuse=fuse, start=generator, known=True, tokens=tokens)
        return replace(same, spec=placed.spec, layers=placed.layers, number=placed.number)
    placed = put_on(model, spec, trained, fuse=fuse, start=generator, tokens=tokens)
    targets = placed.targets
    return Attached(
        model,
        placed.spec,
        placed.layers,
        placed.carried,
        placed.number,
        targets.unmatched,
        targets.left_out,
        spec if trained is None else None,
        placed.notes,
    )


def detach(attached: Attached, base: BaseId | None = None) -> Adapter:
    """Take the adapter off its model and return it as a value on the CPU. With the last one the original layers are put
    back."""
    adapter = attached.adapter(base or BaseId())
    discard(attached)
    return adapter


def discard(attached: Attached) -> None:
    """Take the adapter off its model; nobody wants what it has learnt."""
    take_off(attached.model, attached.layers, attached.carried, attached.number)


def at_scale(attached: Attached, factor: float) -> Attached:
    """The adapter once more on its model, times `factor`, under a number of its own: the tensors are the same, so it
    costs next to nothing. Raises InputError for one that isn't LoRA."""
    layers, number = put_again(attached.model, attached.layers, attached.carried, factor)
    return replace(attached, layers=layers, number=number)


def joins(model: nn.Module, adapter: Adapter) -> bool:
    """Whether `attach` puts it beside those that the model carries in a moment: the model isn't tried again, and its
    layers and stand-ins stay the objects that they are, so that rows which are being decoded can go on."""
    return tried_before(model, adapter.spec, adapter.factors)


def sees_all_rows(model: nn.Module, path: str) -> bool:
    """Whether the adapted layer there is handed all rows of a pass, so that they can take different updates."""
    layers = (module for name, module in model.named_modules() if name in (path, path.rpartition(".")[0]))
    return any(isinstance(layer, AdaptedLayer) and layer.sees_all for layer in layers)


def _as_learnt(spec: AdapterSpec) -> AdapterSpec:
    """The spec of what training under `spec` leaves: init "lora", at twice the rank where B A ≠ 0 at first."""
    wider, stronger = (2, math.sqrt(2) if spec.scaling == "rslora" else 2) if spec.moves_base else (1, 1)
    return spec.model_copy(
        update={
            "start": None,
            "init": "lora",
            "rank": wider * spec.rank,
            "alpha": stronger * spec.alpha,
            "rank_overrides": {name: wider * rank for name, rank in spec.rank_overrides.items()},
            "alpha_overrides": {name: stronger * alpha for name, alpha in spec.alpha_overrides.items()},
        }
    )
