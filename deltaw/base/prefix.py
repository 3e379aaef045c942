"""Prefix: the frozen layers below the lowest adapter, computed once instead of once per epoch.

A document's hidden states at the first adapted layer depend on its tokens and on nothing that trains. So they are
computed before the first step, for all documents, and kept (2 D bytes per token in bfloat16); from then on a pass
starts at that layer: what was kept is in the `Pass` (batch.py), the layers below hand their input on, and the last of
them hands out what was kept.

The documents are processed in a fixed order and in fixed batches, not as the steps happen to meet them: a sum's last
bits depend on the shape of the product that it is part of, and a resumed run, which starts with nothing kept, must come
to the same bits as one that was never stopped.

Letters: T tokens of a batch, D hidden size.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from deltaw.base.batch import Batch
from deltaw.base.passing import Passing, passing_of
from deltaw.base.stand_in import StandIn
from deltaw.show.progress import Progress

Rows = Callable[[Batch], Tensor]  # the model on a batch: a row per token


class Prefix:
    """What enters layer `first` of `layers`, by document. Stands in for the layers below until `remove`."""

    def __init__(self, model: nn.Module, layers: str, first: int) -> None:
        self.first = first
        self._model, self._path = model, layers
        self._kept: dict[bytes, Tensor] = {}
        for number in range(first):
            path = f"{layers}.{number}"
            below = _Below(model.get_submodule(path), passing_of(model), last=number + 1 == first)
            model.set_submodule(path, below)

    @torch.no_grad()
    def fill(self, rows: Rows, batches: Iterable[Batch], progress: Progress) -> bool:
        """Keep what enters the first adapted layer. False, with nothing kept, where that is not all that the layers
        above need: the first batch, begun there, must come to the same bits as begun at the bottom."""
        for number, batch in enumerate(batches):
            entering_TD = self._entering(rows, batch)
            if entering_TD is None:
                return False
            whole = rows(batch) if number == 0 else None  # after what entered: something a layer left behind shows now
            for key, rows_of in _examples(batch):
                self._kept[key] = entering_TD[rows_of]
            if whole is not None and not torch.equal(rows(batch), whole):
                self._kept.clear()
                return False
            progress(number + 1)
        return True

    def _entering(self, rows: Rows, batch: Batch) -> Tensor | None:
        """What the layers below hand to layer `first` [T, D]; None where that isn't one tensor, or none is called."""

        def catch(module: nn.Module, args: Any, output: Any) -> NoReturn:
            raise _Caught(output if isinstance(output, Tensor) else None)

        hook = self._model.get_submodule(f"{self._path}.{self.first - 1}").register_forward_hook(catch)
        try:
            rows(batch)
        except _Caught as caught:
            return None if caught.rows is None else caught.rows.reshape(len(batch.tokens_T), -1)
        finally:
            hook.remove()
        return None

    def kept(self, batch: Batch) -> Tensor | None:
        """What enters layer `first` for the rows of `batch` [T, D]; None where one of its examples isn't kept. A prefix
        that examples share has the rows of the last of them."""
        examples = [(self._kept.get(key), rows_of) for key, rows_of in _examples(batch)]
        known = [(row, rows_of) for row, rows_of in examples if row is not None]
        if len(known) < len(examples):
            return None
        if batch.documents.tree is None:
            return torch.cat([row for row, _ in known])
        first = known[0][0]
        below_TD = first.new_empty(len(batch.tokens_T), first.shape[1])
        for row, rows_of in known:
            below_TD[rows_of] = row
        return below_TD

    def remove(self) -> None:
        """Put the layers back."""
        for number in range(self.first):
            path = f"{self._path}.{number}"
            layer = self._model.get_submodule(path)
            assert isinstance(layer, _Below)
            self._model.set_submodule(path, layer.original)


class _Caught(Exception):
    """Ends a pass where the prefix ends: nothing above is needed."""

    def __init__(self, rows: Tensor | None) -> None:
        self.rows = rows


class _Below(StandIn):
    """A layer of the prefix: where the pass has what was kept it is passed over, else it runs."""

    def __init__(self, original: nn.Module, passing: Passing, last: bool) -> None:
        super().__init__(original)
        self.passing, self.last = passing, last

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own."""
        hidden = self.passing.current.below
        if hidden is None:
            return self.original(hidden_states, *args, **kwargs)
        return hidden.view_as(hidden_states) if self.last else hidden_states


def lowest_layer(paths: Sequence[str]) -> tuple[str, int] | None:
    """("model.layers", 22) for modules none of which lies below layer 22; None where they aren't numbered layers."""
    matches = [re.match(r"(.*?)\.(\d+)\.", path) for path in paths]
    lists = {match.group(1) if match else None for match in matches}
    if len(lists) != 1 or None in lists:
        return None
    return str(lists.pop()), min(int(match.group(2)) for match in matches if match)


def _examples(batch: Batch) -> list[tuple[bytes, list[int]]]:
    """(key, rows) of each example; its tokens are its key, since nothing else tells what it is down here."""
    tokens = batch.tokens_T.to("cpu", torch.int32).numpy()
    examples = [batch.rows_of(number) for number in range(batch.examples)]
    return [(tokens[rows].tobytes(), rows) for rows in examples]
