"""Decoder layers whose additions to the residual stream ride on their norms, for the length of a pass.

    x = norm₁(h)        h ← h + attention(x)        x = norm₂(h)        h ← h + mlp(x)

Of a layer's two additions the first is the second norm's to make, in one kernel (kernels/norm.py), and in the backward
each norm adds what reached h past it to its own gradient before that is rounded, which autograd did in passes of their
own: three launches of a GPU less for each layer, and as many reads and writes of a matrix [T, D].

The whole layer is the unit here, which stand_ins.py rejects: a model's code goes by the class of its layers (what it
records of them, its own checkpointing), so a layer is another only inside `on()`. A pass that is recorded takes that
once. Nothing is known by a name of a model: a layer has exactly these four parts, its norms are `FusedNorm`s, and it
gives the same output on what it was given and on a 256th of that. The second is there because a norm takes any size for
the same: next to a small residual a factor on one of the branches can't hide in the roundings of a large one.

Rejected: the addition of the MLP's output in the norm of the next layer, which would be another layer's business.

Letters: T tokens, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapter.stand_ins import FusedNorm, same_output
from deltaw.base.passing import Passing, passing_of
from deltaw.base.probe import watched_pass
from deltaw.base.stand_in import StandIn

NORMS, PARTS = ("input_layernorm", "post_attention_layernorm"), ("self_attn", "mlp")
SMALL = 2**-8  # of a residual, exact in every dtype


class FusedLayer(StandIn):
    """A layer of that formula, and of nothing else."""

    def __init__(self, original: nn.Module, passing: Passing) -> None:
        super().__init__(original)
        self.passing = passing

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original's, which has all passes but those over packed documents."""
        this, own = self.passing.current, self._modules
        norms = [norm for name in NORMS if isinstance(norm := own[name], FusedNorm) and norm.enabled]
        if args or this.documents is None or this.cache is not None or len(norms) < len(NORMS):
            return self.original(hidden_states, *args, **kwargs)
        attention, mlp = (self.get_submodule(name) for name in PARTS)
        h_TD, x_TD = norms[0].behind(hidden_states)
        h_TD, x_TD = norms[1].behind(h_TD, attention(hidden_states=x_TD, **kwargs)[0])
        return h_TD + mlp(x_TD)


class FusedLayers:
    """Those of a model, whose own layers they are except inside `on()`."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._layers = model, _proven(model)

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, they stand in; not for a layer for which something else does meanwhile, or that somebody watches."""
        mine = [(path, layer) for path, layer in self._layers.items() if self._is_free(path, layer)]
        for path, layer in mine:
            self._model.set_submodule(path, layer)
        try:
            yield
        finally:
            for path, layer in mine:
                self._model.set_submodule(path, layer.original)

    def _is_free(self, path: str, layer: FusedLayer) -> bool:
        return self._model.get_submodule(path) is layer.original and not _watched(layer.original)


@torch.no_grad()
def _proven(model: nn.Module) -> dict[str, FusedLayer]:
    """The layers that give their originals' output, by path."""
    candidates = {path: module for path, module in model.named_modules() if _is_layer(module)}
    if not candidates:
        return {}
    seen, _, this = watched_pass(model, candidates)
    layers = {path: FusedLayer(candidates[path], passing_of(model)) for path in seen}
    with passing_of(model).running(this):
        same = {path for path, layer in layers.items() if this.documents is not None and _same(layer, *seen[path])}
    return {path: layer for path, layer in layers.items() if path in same}


def _same(layer: FusedLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Whether it gives the original's output, one tensor, on what that was given (`args`) and on a small part of it."""
    if not (args and isinstance(output, Tensor)):
        return False
    small = (args[0] * SMALL, *args[1:])
    return same_output(layer, args, kwargs, output) and same_output(
        layer, small, kwargs, layer.original(*small, **kwargs)
    )


def _is_layer(module: nn.Module) -> bool:
    own = module._modules
    parts = not isinstance(module, StandIn) and own.keys() == {*NORMS, *PARTS} and not module._parameters
    return parts and all(isinstance(own[name], FusedNorm) for name in NORMS) and not _watched(module)


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
