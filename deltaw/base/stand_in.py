"""StandIn: a module in the place of another, with the very same contents and a `forward` of its own.

Children, parameters and buffers are the original's own dictionaries, so paths, state dict and whatever is attached
below are as before; taking the stand-in out means putting the original back.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """The contents of `original` with another forward. `original` is kept aside, not as a child."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = original._modules, original._parameters, original._buffers
        self._kept = (original,)  # in a tuple, or it would become a child
        self.training = original.training
        self.enabled = True

    @property
    def original(self) -> nn.Module:
        """The module this one stands for."""
        return self._kept[0]

    def train(self, mode: bool = True) -> "StandIn":
        """Both are in the same mode, since the original may be asked to run."""
        super().train(mode)
        self.original.training = mode
        return self

    def __getattr__(self, name: str) -> Any:
        """What the model's own code reads off the module (`attention_type`, `layer_idx`) is the original's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_kept":
                raise
            return getattr(self._kept[0], name)


@contextlib.contextmanager
def disabled(modules: Sequence[Any]) -> Iterator[None]:
    """Modules with a switch (`enabled`) out of the way for the length of a block."""
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled
