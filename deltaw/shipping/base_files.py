"""A base that is found but not loaded: merging, exporting and linting work on its files, so a base of any size needs
memory for its largest tensor only.

    skeleton      its modules without weights (on the meta device)
    checkpoint    where its files have each of the skeleton's parameters
    fingerprint   of these parameters by the model's own names, from the files, one in memory at a time

Each is made when first asked for, once per command.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from deltaw.adapter.checkpoints import Checkpoint
from deltaw.base.fingerprint import fingerprint_of
from deltaw.base.load import open_skeleton
from deltaw.base.source import Source
from deltaw.files.shards import read_tensors


@dataclass(frozen=True, eq=False)
class BaseFiles:
    """Each property raises InputError for a base that transformers can't open or that isn't a causal language model."""

    source: Source

    @cached_property
    def skeleton(self) -> nn.Module:
        return open_skeleton(self.source)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.source.directory, self.skeleton)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint that the opened model has; "" if the files don't hold the model's parameters one by one
        (experts that transformers stacks when it loads them)."""
        stored = [self.checkpoint.find(name) for name, _ in self.skeleton.named_parameters()]
        places = [place for place in stored if place is not None]
        if len(places) < len(stored):
            return ""
        names = {place.name for place in places}
        weights = (tensor for name, tensor in read_tensors(self.source.directory) if name in names)
        return fingerprint_of(weights, self.skeleton.config)
