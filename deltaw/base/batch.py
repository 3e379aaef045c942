"""What a model is given: `Batch`, documents laid end to end, and `Pass`, what a forward carries to layers besides x.

Three documents of 3, 2 and 4 tokens:

    tokens_T      a0 a1 a2 b0 b1 c0 c1 c2 c3
    labels_T      a1 a2  .  b1  . c1 c2 c3  .      . is IGNORE; so is every label whose token isn't trained
    positions_T    0  1  2  0  1  0  1  2  3
    starts         0        3     5           9    offset of each document, and T (`cu_seqlens` elsewhere)

Labels are already shifted: the model's output at t is compared with labels_T[t]. Shifting where the documents are still
known is what keeps a label from crossing into the next one.

How the documents are grouped for attention (`Documents`) and how many labels count are worked out once, by whoever
packs them, and travels with the batch: a forward neither repeats it nor waits for the device to be told.

A layer deep inside one of transformers' models is given its input and little else. Whatever more it needs to know of a
pass is in a `Pass`, and reaches it through the model's `Passing`: one small holder per model, which attention,
stand-ins and adapted layers keep from the moment they are put in place. Rejected: keyword arguments handed down through
the model's own code (linear layers never see them, and an unknown name may be refused on the way), a global (two models
run side by side in one process), and a thread-local (the backward, and what is recomputed in it, runs on another
thread).

Letters: T tokens, S documents + 1.
"""

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltaw.kernels.attention import Documents
from deltaw.kernels.logprobs import IGNORE
from deltaw.kernels.segments import Segment, Segments


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents laid end to end, int64: tokens_T, labels_T, positions_T (T,). Made by `Batch.of`.

    `supervised`: how many labels count; sums over batches divide by the sum of these, once. By document: `origins`, the
    row it was; `updates`, which of a layer's updates it takes (empty: all the first); `weights`, what it counts in the
    loss (empty: all 1). `rows_K`: the rows that the head is asked for, where it isn't to look for labels (filled.py).
    """

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    documents: Documents
    supervised: int
    origins: tuple[str, ...] = ()
    updates: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    rows_K: Tensor | None = None

    @staticmethod
    def of(
        tokens_T: Tensor,
        starts: Sequence[int],
        labels_T: Tensor | None = None,
        *,
        origins: tuple[str, ...] = (),
        updates: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> "Batch":
        """A batch of the documents that begin at `starts`, whose last entry is T; without labels none counts.

        Raises ValueError for an empty document.
        """
        documents, device = Documents(list(starts), tokens_T.device), tokens_T.device
        start_S = torch.tensor(documents.starts, device=device)
        positions_T = torch.arange(len(tokens_T), device=device) - start_S[:-1].repeat_interleave(start_S.diff())
        labels_T = torch.full_like(tokens_T, IGNORE) if labels_T is None else labels_T
        supervised = _count(labels_T)
        return Batch(tokens_T, labels_T, positions_T, documents, supervised, origins, tuple(updates), tuple(weights))

    @staticmethod
    def joined(batches: Sequence["Batch"]) -> "Batch":
        """Their documents, one batch's behind the other's. All say whose their documents are, or none does."""
        if len(batches) == 1:
            return batches[0]
        starts, weights = [0], list[float]()
        for batch in batches:
            starts += [starts[-1] + end for end in batch.starts[1:]]
            weights += batch.weights or [1.0] * (len(batch.starts) - 1)
        return Batch.of(
            torch.cat([batch.tokens_T for batch in batches]),
            starts,
            torch.cat([batch.labels_T for batch in batches]),
            origins=tuple(origin for batch in batches for origin in batch.origins),
            updates=tuple(update for batch in batches for update in batch.updates),
            weights=weights if any(batch.weights for batch in batches) else (),
        )

    @property
    def starts(self) -> list[int]:
        """The offset of each document, and T."""
        return self.documents.starts

    def segments(self) -> Segments | None:
        """The rows of each update; None where all take the first."""
        return segments_of(self.updates, self.starts) if self.updates else None

    def by_document(self, values_K: Tensor) -> Tensor:
        """[documents, ...]: what belongs to each label [K, ...], in the order of their rows, summed by document."""
        row_K = (self.labels_T != IGNORE).nonzero().squeeze(1)
        document_K = torch.bucketize(row_K, self.documents.starts_S[1:].long(), right=True)
        sums = values_K.new_zeros(len(self.starts) - 1, *values_K.shape[1:])
        return sums.index_add(0, document_K, values_K)

    def tokens_of(self, update: int) -> int:
        """How many tokens the documents of `update` have."""
        if not self.updates:
            return len(self.tokens_T)
        return sum(
            b - a
            for owner, (a, b) in zip(self.updates, itertools.pairwise(self.starts), strict=True)
            if owner == update
        )

    def labelled_for(self, update: int) -> "Batch":
        """The batch with the labels and the origins of `update`'s documents alone."""
        if not self.updates:
            return self
        labels_T = self.labels_T.clone()
        for owner, (start, end) in zip(self.updates, itertools.pairwise(self.starts), strict=True):
            if owner != update:
                labels_T[start:end] = IGNORE
        origins = tuple(o for o, owner in zip(self.origins, self.updates, strict=True) if owner == update)
        return replace(self.relabelled(labels_T), origins=origins)

    def relabelled(self, labels_T: Tensor) -> "Batch":
        """The batch with other labels, counted."""
        return replace(self, labels_T=labels_T, supervised=_count(labels_T), rows_K=None)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        tensors = {name: getattr(self, name).to(device) for name in ("tokens_T", "labels_T", "positions_T")}
        rows_K = None if self.rows_K is None else self.rows_K.to(device)
        return replace(self, **tensors, documents=self.documents.to(device), rows_K=rows_K)


def _count(labels_T: Tensor) -> int:
    """How many labels count."""
    return int((labels_T != IGNORE).sum())


def segments_of(updates: Sequence[int], starts: Sequence[int]) -> Segments | None:
    """Segments of documents that begin at `starts` (and end where the next begins) and take `updates`; None where all
    take the first. Neighbours of one update are one segment."""
    if not updates:
        return None
    segments: list[Segment] = []
    for update, (start, end) in zip(updates, itertools.pairwise(starts), strict=True):
        if segments and segments[-1].update == update:
            start = segments.pop().start
        segments.append(Segment(update, start, end))
    return tuple(segments)


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
    cache:     keys and values of earlier tokens, which attention adds to and reads; None: there are none
    below:     what enters the lowest adapted layer [T, D], computed before (prefix.py); None: it is computed now
    probe:     what watches the calls to attention (attention.py)
    ready:     what steps of decoding have ready of their layers (adapter/ready.py)
    """

    documents: Documents | None = None
    segments: Segments | None = None
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

    @contextmanager
    def running(self, this: Pass) -> Iterator[None]:
        """Inside, `this` is the pass that layers see."""
        before, self.current = self.current, this
        try:
            yield
        finally:
            self.current = before

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
