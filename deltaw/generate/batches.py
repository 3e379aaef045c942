"""Rows on transformers' own caches: for hybrids, state spaces, and any other model whose attention has no stand-in.

Such a cache can let go of a row and takes no new one, so rows that begin together stay together: each joining makes a
batch of its own, which is a pass of its own in every step. Each prompt gets what it gets alone: prompts of different
lengths are padded on the left and share a batch only where the model has shown that this changes nothing (together.py),
others with those of their own length. A row that has ended leaves its batch when an eighth of the rows have, since on a
CPU a step costs what its rows cost.

Batches run side by side where the trial has shown that all a model carries stands in its cache (`leaving`); where some
lies in its modules, one begins when the other has ended. So does a batch that goes beyond the border up to which a pass
leaves the model's rotary frequencies as they were; it finds them at rest, and leaves them so.

Letters: R rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.generate.cache import Cache, Row, State, padded
from deltaw.generate.together import Together, come_to_rest

DROP = 8  # copy the cache without its finished rows when 1/DROP of them are


@dataclass
class Group:
    """Rows that began together. One that has ended stays, as None, until the cache is copied without it."""

    rows: list[Row | None]
    state: State
    reach: int
    crosses: bool


class Batches(Cache):
    """`alone`: there is never more than one row. `beyond`: only rows beyond the border come. Both spare trials."""

    share, patience = 1, 64

    def __init__(self, model: nn.Module, *, alone: bool, beyond: bool) -> None:
        self.model, self.alone, self.beyond = model, alone, beyond
        self.device = next(model.parameters()).device
        self.together, self.known = Together(), 0
        self.groups: list[Group] = []

    @property
    def tokens(self) -> int:
        return sum(len(group.rows) * group.reach for group in self.groups)

    def learn(self, most: int) -> bool:
        """Find out what rows of up to `most` tokens allow. False where that must wait for those that are running."""
        if most <= self.known:
            return True
        if self.groups:
            return False
        with torch.inference_mode(False):  # the trial asks for gradients
            self.together, self.known = Together.on(self.model, most, alone=self.alone or self.beyond), most
            if self.beyond and not self.alone and self.together.border is not None:
                self.together = Together.on(self.model, most)
        return True

    def crosses(self, row: Row) -> bool:
        """Whether a row goes beyond the border."""
        return self.together.crosses(row.reach)

    def first(self, waiting: Sequence[Row], tokens: int) -> list[Row]:
        head = waiting[0]
        crosses, padding = self.crosses(head), self.together.padding
        if self.groups and (crosses or self.crossing or not self.together.leaving):
            return []
        chosen, reach = [head], head.reach
        for row in waiting[1:] if self.together.company else ():
            wider = max(reach, row.reach)
            alike = len(row.prompt) == len(head.prompt) or (
                padding and not crosses and not self.together.crosses(wider)
            )
            if alike and row.update == head.update and (len(chosen) + 1) * wider <= tokens:
                chosen.append(row)
                reach = wider
        return chosen if not self.groups or len(chosen) * reach <= tokens else []

    @property
    def crossing(self) -> bool:
        """Whether a batch is running that goes beyond the border."""
        return any(group.crosses for group in self.groups)

    def join(self, rows: Sequence[Row]) -> None:
        reach = max(row.reach for row in rows)
        crosses = self.together.crosses(reach)
        if crosses:
            come_to_rest(self.model)  # frequencies that an earlier pass has let grow
        state = State(self.model, *padded([row.prompt for row in rows], self.device), rows[0].update)
        self.groups.append(Group(list(rows), state, reach, crosses))

    def fill(self) -> Iterator[tuple[list[Row], Tensor]]:
        for group in list(self.groups):
            if not group.state.begun:
                logits_RV = group.state.forward()
                alive = [at for at, row in enumerate(group.rows) if row is not None]
                yield [row for row in group.rows if row is not None], logits_RV[alive]

    def steps(self) -> Iterator[tuple[list[Row], Tensor]]:
        for group in [group for group in self.groups if group.state.begun]:
            self._make_room(group)
            alive = [at for at, row in enumerate(group.rows) if row is not None]
            # An ended row goes on with some token: nobody looks at what comes of it.
            group.state.append(torch.tensor([0 if row is None else row.last for row in group.rows], device=self.device))
            logits_RV = group.state.forward()
            rows = [row for row in group.rows if row is not None]
            yield rows, logits_RV if len(rows) == len(group.rows) else logits_RV[alive]

    def _make_room(self, group: Group) -> None:
        """Copy the cache without the rows that have ended, if they are many."""
        alive = [at for at, row in enumerate(group.rows) if row is not None]
        if self.together.leaving and (len(group.rows) - len(alive)) * DROP >= len(group.rows):
            group.state.keep(torch.tensor(alive, device=self.device))
            group.rows = [group.rows[at] for at in alive]

    def leave(self, row: Row) -> None:
        for group in self.groups:
            if row in group.rows:
                group.rows[group.rows.index(row)] = None
                if not any(group.rows):
                    self._end(group)
                return

    def _end(self, group: Group) -> None:
        self.groups.remove(group)
        if group.crosses:
            come_to_rest(self.model)
