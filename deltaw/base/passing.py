"""What a forward carries to layers besides x: a `Pass`, which reaches them through the model's `Passing`.

A layer deep inside one of transformers' models is given its input and little else. Whatever more it needs to know of a
pass is in a `Pass`, and reaches it through the model's `Passing`: one small holder per model, which attention,
stand-ins and adapted layers keep from the moment they are put in place. Rejected: keyword arguments handed down through
the model's own code (linear layers never see them, and an unknown name may be refused on the way), a global (two models
run side by side in one process), and a thread-local (the backward, and what is recomputed in it, runs on another
thread).
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltaw.kernels.documents import Documents
from deltaw.kernels.segments import Segments


class Stored(Protocol):
    """Keys and values of earlier tokens, where attention stands in (generate/slots.py)."""

    def attention(
        self,
        layer: nn.Module,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Add the rows' keys and values to those of `layer`, and attend to what each row may see: [T, H, E]."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward carries to the layers.

    documents: how the rows are laid end to end; None where each row of the input is a document of its own
    segments:  which rows take which update; None: all take the first
    kept:      the same of the rows that the head is given, where it isn't given all of them
    cache:     keys and values of earlier tokens, which attention adds to and reads; None: there are none
    below:     what enters the lowest adapted layer [T, D], computed before (prefix.py); None: it is computed now
    probe:     what watches the calls to attention (attention.py)
    ready:     what steps of decoding have ready of their layers (adapter/ready.py)
    """

    documents: Documents | None = None
    segments: Segments | None = None
    kept: Segments | None = None
    cache: Stored | None = None
    below: Tensor | None = None
    probe: Any = None
    ready: Any = None


NOTHING = Pass()


class Passing:
    """Where a model's layers find the pass that is running. `NOTHING` when somebody simply calls the model."""

    def __init__(self) -> None:
        self.current = NOTHING
        self.attention = ""  # the name of the attention that knows this holder (attention.py); "" where none does
        self.folded: Any = None  # the joined matrices that stand-ins are to use (adapter/folding.py)
        self.streams: dict[int, torch.Generator] = {}  # of updates that draw random numbers of their own, by number

    @contextmanager
    def running(self, this: Pass) -> Iterator[None]:
        """Inside, `this` is the pass that layers see."""
        before, self.current = self.current, this
        try:
            yield
        finally:
            self.current = before

    def states(self) -> dict[int, Tensor]:
        """Where the streams stand."""
        return {number: stream.get_state() for number, stream in self.streams.items()}

    def put_back(self, states: dict[int, Tensor]) -> None:
        """Where they stood: what is computed again draws again what it drew."""
        for number, state in states.items():
            self.streams[number].set_state(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Passing":
        """A copied model runs passes of its own; nothing is running in it."""
        return Passing()


_passing: weakref.WeakKeyDictionary[nn.Module, Passing] = weakref.WeakKeyDictionary()


def passing_of(model: nn.Module) -> Passing:
    """The holder of this model, the same one whoever asks. A copied model's is the one that its layers were copied
    with."""
    if model not in _passing:
        holders = (getattr(module, "passing", None) for module in model.modules())
        _passing[model] = next((holder for holder in holders if isinstance(holder, Passing)), None) or Passing()
    return _passing[model]
