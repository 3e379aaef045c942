"""Recomputing: what a layer keeps for its backward is dropped, and made again when the backward comes to it.

    none      each layer keeps what its backward needs: of a Llama's about 12 times its input
    blocks    each layer keeps its input alone [T, D], and runs again in the backward
    offload   the same, and the inputs wait in the machine's memory (pinned) until the GPU comes back to them

Which layers: the model's own list of them, found as the prefix's are (prefix.py), from the lowest one with an adapter
up. Those below it keep nothing anyway.

It is exact. A layer's second run has the same input, the same factors, and whatever else it was called with; where
dropout draws, the generator is what it was. The pass is over by then, so the second run is given the `Pass` that the
first one ran in: it is part of the call that is kept, and the model's `Passing` shows it for that long. (A GPU's
backward runs on a thread of its own, but while it does, whoever called it waits.) Nothing is taken on trust
all the same: who chooses to recompute compares loss and gradient with those of the plain pass (`same_gradient`).

`torch.utils.checkpoint` does the bookkeeping, in the variant that isn't reentrant: the reentrant one gives no gradient
to factors where the input has none, as in the lowest adapted layer. Rejected:

    transformers' own switch   works only in training mode, which turns the base's dropouts on, and knows of no Pass
    selective recomputation    decides by operation, and the kernels of this library are one operation each; what would
                               be worth keeping (gate, up) is also half of what is kept
    moving all that is kept    instead of running again: twelve times the bytes, and a GPU makes them again sooner than
                               a bus brings them back

Letters: T tokens, D hidden size.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from deltaw.base.passing import Passing, passing_of
from deltaw.base.stand_in import StandIn
from deltaw.errors import InputError
from deltaw.show.text import counted

WORDS = {
    "none": "activations are kept",
    "blocks": "activations are recomputed by block",
    "offload": "activations are recomputed by block, from inputs in the machine's memory",
}


class Recompute:
    """Stands in for the layers `blocks` of a model until `remove`. `draws`: they draw random numbers; `offload`: their
    inputs go to the machine's memory, which is pinned where the model is on a GPU."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], *, draws: bool, offload: bool = False) -> None:
        self.blocks, self.draws, self.offload = tuple(blocks), draws, offload
        self._model, passing = model, passing_of(model)
        pinned = next(model.parameters()).device.type == "cuda"

        def keeping() -> AbstractContextManager[Any]:
            return save_on_cpu(pin_memory=pinned) if offload else nullcontext()

        for path in self.blocks:
            model.set_submodule(path, _Recomputed(model.get_submodule(path), passing, keeping, draws=draws))

    @property
    def way(self) -> str:
        """As the run file calls it."""
        return "offload" if self.offload else "blocks"

    def describe(self) -> str:
        """For logs."""
        where = ", their inputs in the machine's memory" if self.offload else ""
        return f"{counted(len(self.blocks), 'layer')} recomputed{where}"

    def remove(self) -> None:
        """Put the layers back."""
        for path in self.blocks:
            layer = self._model.get_submodule(path)
            assert isinstance(layer, _Recomputed)
            self._model.set_submodule(path, layer.original)


class _Recomputed(StandIn):
    """A layer that keeps its input alone. Without gradients it is the layer."""

    def __init__(
        self, original: nn.Module, passing: Passing, keeping: Callable[[], AbstractContextManager[Any]], *, draws: bool
    ) -> None:
        super().__init__(original)
        self.passing, self.keeping, self.draws = passing, keeping, draws

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own."""
        if not (self.enabled and torch.is_grad_enabled()):
            return self.original(*args, **kwargs)
        this, drawn = self.passing.current, self.passing.states()

        def run(*inputs: Any) -> Any:
            self.passing.put_back(drawn)
            with self.passing.running(this):
                return self.original(*inputs, *args[1:], **kwargs)

        with self.keeping():  # of what comes with every layer's call (angles, a mask) one is enough for all: not kept
            return checkpoint(run, *args[:1], use_reentrant=False, preserve_rng_state=self.draws)


def blocks_of(model: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """The layers that would be run again where the modules at `paths` are adapted: of each list of layers those from
    the lowest adapted one up."""
    lowest: dict[str, int] = {}
    for path in paths:
        if match := re.match(r"(.*?)\.(\d+)\.", path):
            name, number = match.group(1), int(match.group(2))
            lowest[name] = min(number, lowest.get(name, number))
    lists = {name: model.get_submodule(name) for name in lowest}
    return tuple(
        f"{name}.{number}"
        for name, layers in lists.items()
        if isinstance(layers, nn.ModuleList)
        for number in range(lowest[name], len(layers))
    )


def check_device(way: str, device: torch.device) -> None:
    """Raise InputError where `train.checkpointing` asks for what can't be done on this device."""
    if way == "offload" and device.type != "cuda":
        raise InputError(
            f"train.checkpointing: offload moves activations from a GPU to the machine's memory, and this is a run on "
            f"{device.type}, where they already are",
            fix="set train.checkpointing: blocks, or leave it out: it is chosen where memory is short",
        )


def check_blocks(way: str, blocks: Sequence[str]) -> None:
    """Raise InputError where it asks for what can't be done with this adapter."""
    if way in ("blocks", "offload") and not blocks:
        raise InputError(
            f"train.checkpointing: {way} runs layers again, and the adapted modules lie in no list of layers",
            fix="leave train.checkpointing out, and lower train.tokens_per_batch where memory is short",
        )
