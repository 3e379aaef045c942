"""A base's weights by path, experts' matrices among them: `weights["….experts.down_proj[3]"]`.

Linear layers come from the files by their names alone (base/linear_weights.py). Where an expert's matrix lies only the
rules of transformers' loading know (base/names.py), so a skeleton is built where an adapter has updates of experts. The
last tensor of all experts that was read is kept: they are asked for one after the other.

Letters: E experts, M outputs, N inputs.
"""

import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from deltaw.adapter.checkpoints import Checkpoint, read
from deltaw.base.experts import expert_stacks
from deltaw.base.linear_weights import LinearWeights
from deltaw.base.load import open_skeleton
from deltaw.base.source import Source
from deltaw.config.adapter import expert_of, parameter_of
from deltaw.errors import InputError
from deltaw.kernels.weight import DenseWeight, Weight


class WithExperts(Mapping[str, Weight]):
    """`linear` and the experts of the base that it is of. Raises InputError for a path that the base doesn't have."""

    def __init__(self, linear: LinearWeights, source: Source) -> None:
        self._linear, self._source = linear, source
        skeleton = open_skeleton(source)
        self._checkpoint = Checkpoint(source.directory, skeleton)
        self._turned = {path: stack.turned for path, stack in expert_stacks(skeleton).items()}
        self._last: tuple[str, Tensor] | None = None
        self._lock = threading.Lock()

    def __getitem__(self, path: str) -> Weight:
        number, parameter = expert_of(path), parameter_of(path)
        if number is None:
            return self._linear[path]
        if parameter not in self._turned:
            raise InputError(f"{self._source.name}: has no experts at {parameter:.120}")
        if parameter in self._checkpoint.stored:
            w_MN = self._all(parameter)[number]
            return DenseWeight((w_MN.T if self._turned[parameter] else w_MN).contiguous())
        slots = self._checkpoint.slots
        own = [name for name in self._checkpoint.converted.get(parameter, ()) if name in slots]
        parts = sorted((name for name in own if slots[name].expert == number), key=lambda name: slots[name].part)
        if not parts:
            raise InputError(f"{self._source.name}: transformers makes {parameter:.120} in a way that isn't known here")
        return DenseWeight(torch.cat([read(self._checkpoint.stored[name]) for name in parts]))

    def _all(self, parameter: str) -> Tensor:
        with self._lock:
            if self._last is None or self._last[0] != parameter:
                self._last = (parameter, read(self._checkpoint.stored[parameter]))
            return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._linear)

    def __len__(self) -> int:
        return len(self._linear)
