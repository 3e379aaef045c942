"""Updates of experts as updates of the tensors that a base's files have for them.

Files have one matrix for each expert and projection, as transformers 4 kept them (`experts.3.gate_proj.weight`, which
takes some rows of the update of gate_up_proj[3]), or one tensor for all experts, which is a row for each expert here:

    [E, M, N], or [E, N, M] where the model says `is_transposed`, as [E, M·N]

`Stacked` is the latter's update. It is added by the row like any other and is nothing but that.

Letters: E experts, M outputs, N inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.config.adapter import expert_of, parameter_of
from deltaw.factors import LowRank
from deltaw.kinds import Dense
from deltaw.updates import Update


@dataclass(frozen=True, eq=False)
class Stacked:
    """Updates of some experts, one after the other. `turned`: each lies in the file as [N, M]."""

    each: tuple[LowRank, ...]
    turned: bool

    def rows(self, start: int, stop: int) -> "Stacked":
        """Those of these experts."""
        return Stacked(self.each[start:stop], self.turned)

    def relative_to(self, weight: object) -> Dense:
        """As one matrix [E, M·N]; it depends on no weight."""
        return Dense(torch.stack([self._flat(update) for update in self.each]))

    def _flat(self, update: LowRank) -> Tensor:
        delta_MN = update.dense()
        return (delta_MN.T if self.turned else delta_MN).reshape(-1)


def by_parameter(updates: Mapping[str, Update]) -> dict[str, Sequence[LowRank]]:
    """The updates of experts by the parameter of all, in their order."""
    some: dict[str, dict[int, LowRank]] = {}
    for path, update in updates.items():
        number = expert_of(path)
        if number is not None:
            some.setdefault(parameter_of(path), {})[number] = update.low_rank()
    return {path: [each[number] for number in sorted(each)] for path, each in some.items()}
