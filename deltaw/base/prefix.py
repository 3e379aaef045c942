"""Prefix: the frozen layers below the lowest adapter, computed once and not once an epoch.

What a document is when it enters the first adapted layer depends on its tokens and on nothing that trains. So it is
computed before the first step, for all documents, and kept (2 D bytes a token in bfloat16); from then on a pass starts
at that layer. The layers below hand their input on, and the last of them hands out what was kept.

The documents are gone through in a fixed order and in fixed batches, not as the steps happen to meet them: a sum's last
bits depend on the shape of the product that it is part of, and a resumed run, which starts with nothing kept, must come
to the same bits as one that was never stopped.

Letters: T tokens of a batch, D hidden size.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.base.stand_in import StandIn

Tokens = tuple[Tensor, Tensor, Tensor]  # tokens_T, positions_T, starts_S of a batch
Pass = Callable[[Tensor, Tensor, Tensor], Tensor]  # the model on a batch: a row a token


class Prefix:
    """What enters layer `first` of `layers`, by document. Stands in for the layers below until `remove`."""

    def __init__(self, model: nn.Module, layers: str, first: int) -> None:
        self.first = first
        self._model, self._path = model, layers
        self._rows: dict[bytes, Tensor] = {}
        self._replay: Tensor | None = None
        self._filling = False
        for number in range(first):
            path = f"{layers}.{number}"
            model.set_submodule(path, _Below(model.get_submodule(path), self, last=number + 1 == first))

    @torch.no_grad()
    def fill(self, run: Pass, batches: Iterable[Tokens], progress: Callable[[int], None]) -> bool:
        """Keep what enters the first adapted layer. False, with nothing kept, where that is not all that the layers
        above need: the first batch, begun there, must come to the same bits as begun at the bottom."""
        for number, (tokens_T, positions_T, starts_S) in enumerate(batches):
            self._filling = True
            try:
                run(tokens_T, positions_T, starts_S)
                return False  # no layer below was called
            except _Caught as caught:
                if caught.rows is None:
                    return False
                rows_TD = caught.rows.reshape(len(tokens_T), -1)
            finally:
                self._filling = False
            for key, start, end in _documents(tokens_T, starts_S):
                self._rows[key] = rows_TD[start:end].clone()
            if number == 0 and not self._suffices(run, (tokens_T, positions_T, starts_S)):
                return False
            progress(number + 1)
        return True

    def _suffices(self, run: Pass, batch: Tokens) -> bool:
        whole = run(*batch)
        with self.replayed(batch[0], batch[2]):
            return torch.equal(run(*batch), whole)

    @contextmanager
    def replayed(self, tokens_T: Tensor, starts_S: Tensor) -> Iterator[None]:
        """Passes in this block begin above the prefix if all their documents are kept, else at the bottom."""
        rows = [self._rows.get(key) for key, _, _ in _documents(tokens_T, starts_S)]
        known = [row for row in rows if row is not None]
        self._replay = torch.cat(known) if len(known) == len(rows) else None
        try:
            yield
        finally:
            self._replay = None

    def remove(self) -> None:
        """Put the layers back."""
        for number in range(self.first):
            path = f"{self._path}.{number}"
            layer = self._model.get_submodule(path)
            assert isinstance(layer, _Below)
            self._model.set_submodule(path, layer.original)

    def pass_below(self, layer: "_Below", hidden: Tensor, args: Any, kwargs: Any) -> Any:
        """What a layer below gives: the kept rows, its input or, when nothing is replayed, its own output."""
        if self._replay is not None:
            return self._replay.view_as(hidden) if layer.last else hidden
        out = layer.original(hidden, *args, **kwargs)
        if layer.last and self._filling:
            raise _Caught(out if isinstance(out, Tensor) else None)
        return out


class _Caught(Exception):
    """Ends a pass where the prefix ends: nothing above is needed."""

    def __init__(self, rows: Tensor | None) -> None:
        self.rows = rows


class _Below(StandIn):
    """A layer of the prefix."""

    def __init__(self, original: nn.Module, prefix: Prefix, last: bool) -> None:
        super().__init__(original)
        self.prefix, self.last = prefix, last

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own."""
        return self.prefix.pass_below(self, hidden_states, args, kwargs)


def lowest_layer(paths: Sequence[str]) -> tuple[str, int] | None:
    """("model.layers", 22) for modules none of which lies below layer 22; None where they are no numbered layers."""
    found = [re.match(r"(.*?)\.(\d+)\.", path) for path in paths]
    lists = {match.group(1) if match else None for match in found}
    if len(lists) != 1 or None in lists:
        return None
    return str(lists.pop()), min(int(match.group(2)) for match in found if match)


def _documents(tokens_T: Tensor, starts_S: Tensor) -> list[tuple[bytes, int, int]]:
    """(key, start, end) of each document; its tokens are its key, since nothing else tells what it is down here."""
    starts, tokens = starts_S.tolist(), tokens_T.to("cpu", torch.int32).numpy()
    return [(tokens[a:b].tobytes(), a, b) for a, b in pairwise(starts)]
